"""Plain loops over float32 vectors, beside which the generated kernels are shown; imports numba."""

from __future__ import annotations

import numpy as np
from numba import float32, njit
from numpy.typing import NDArray

Array = NDArray[np.float32]


@njit(cache=True, nogil=True, error_model="numpy")
def fused(a: Array, b: Array, values: Array, first: Array, second: Array, lr: np.float32) -> None:
    """A synchronous round of two workers: two gradients and the values in, the values and two windows out."""
    half = float32(0.5)
    for i in range(len(values)):
        value = values[i] - lr * ((a[i] + b[i]) * half)
        values[i] = value
        first[i] = value
        second[i] = value


@njit(cache=True, nogil=True, error_model="numpy")
def update(gradient: Array, values: Array, window: Array, lr: np.float32) -> None:
    """An update of one worker and its answer: a gradient and the values in, the values and a window out."""
    for i in range(len(values)):
        value = values[i] - lr * gradient[i]
        values[i] = value
        window[i] = value
