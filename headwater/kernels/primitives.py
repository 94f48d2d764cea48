"""What generated loops need beyond Python, and how they are compiled.

Imported only by generated modules, so that numba is loaded with the first kernel and not before.

Invariants:
- Never fastmath, never parallel: the same bits whatever the machine, the length and the number of pieces.
- `floats` makes no copy and owns nothing: who passes an address keeps the memory alive.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

inner = njit(error_model="numpy")
"""For functions that only other compiled functions call."""

outer = functools.partial(njit, cache=True, nogil=True, error_model="numpy")
"""For kernels, with the one signature they are compiled for: `@outer("void(int64)")`."""


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """float32* of an int64 address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@inner
def floats(address: Any, start: Any, stop: Any) -> Any:
    """float32[stop − start] at `address` + 4 · `start` bytes."""
    return carray(_pointer(address + 4 * start), (stop - start,))
