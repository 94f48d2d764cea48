"""float32 to bfloat16 and back: rounded to nearest, ties to even; NaN stays NaN."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` (any shape) as bfloat16, in a new array of the same shape.

    The upper half of a float32 is the bfloat16 below it; half a unit in the last place, less one where that
    place is even, carries into the upper half exactly when rounding goes up.
    """
    bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values that bfloat16 `bits` stand for, exactly, in a new array of the same shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
