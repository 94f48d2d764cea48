"""The loop that row Adagrad is held against: C with software prefetch, compiled for this machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_SOURCE = """
#include <math.h>
#include <stdint.h>

void adagrad(const int32_t *rows, int64_t n, const float *restrict gradients, float *restrict values,
             float *restrict squares, float lr, float eps) {
  for (int64_t i = 0; i < n; i++) {
    if (i + 16 < n) {
      int64_t ahead = (int64_t)rows[i + 16] * DIM;
      for (int j = 0; j < DIM; j += 16) {
        __builtin_prefetch(values + ahead + j, 1);
        __builtin_prefetch(squares + ahead + j, 1);
      }
    }
    const float *restrict g = gradients + i * DIM;
    float *restrict v = values + (int64_t)rows[i] * DIM;
    float *restrict s = squares + (int64_t)rows[i] * DIM;
    for (int j = 0; j < DIM; j++) {
      s[j] += g[j] * g[j];
      v[j] -= lr * g[j] / (sqrtf(s[j]) + eps);
    }
  }
}
"""
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")


def compiled_adagrad(
    dim: int,
) -> Callable[[NDArray[np.int32], Array, Array, Array, float, float], None] | None:
    """Adagrad over rows of flat float32[rows, dim] values and squares; None where there is no gcc."""
    if shutil.which("gcc") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "adagrad.c", Path(folder) / "adagrad.so"
        source.write_text(_SOURCE)
        subprocess.run(["gcc", *_FLAGS, f"-DDIM={dim}", source, "-o", library, "-lm"], check=True, timeout=60)
        function = ctypes.CDLL(str(library)).adagrad
    address = ctypes.c_void_p
    function.argtypes = [
        *(address, ctypes.c_int64, address, address, address),
        *(ctypes.c_float, ctypes.c_float),
    ]
    function.restype = None

    def adagrad(
        rows: NDArray[np.int32], gradients: Array, values: Array, squares: Array, lr: float, eps: float
    ) -> None:
        arrays = (array.ctypes.data for array in (gradients, values, squares))
        function(rows.ctypes.data, len(rows), *arrays, lr, eps)

    return adagrad
