"""Gradients of a table's rows that came in several parts, summed by id.

Time is proportional to what is added, memory to the different ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headwater.kernels import finite
from headwater.kernels.arrange import Ids, Numbering

Array = NDArray[np.float32]


class RowSums:
    """Of rows of `dim` columns.

    Attributes:
        ids: int64[u], each once, in order of first appearance.
        rows: float32[u, dim], the sum of each; a view that `add` makes stale.
    """

    def __init__(self, dim: int) -> None:
        self._numbers = Numbering()
        self._rows = np.empty((0, dim), dtype=np.float32)

    @property
    def ids(self) -> Ids:
        return self._numbers.ids

    @property
    def rows(self) -> Array:
        return self._rows[: self._numbers.known]

    def __len__(self) -> int:
        return self._numbers.known

    def add(self, ids: Ids, gradients: Array, *, tested: bool = True) -> bool:
        """Add float32[n, dim] gradients of int64[n] ids, each once; whether it did.

        With `tested` nothing is added where a sum would be NaN or infinite.
        """
        known = len(self)
        numbers = self._numbers.add(ids)
        sums = self._sums(numbers, known, gradients)
        if tested and not finite(sums.reshape(-1)):
            self._numbers.truncate(known)
            return False
        if len(self) > len(self._rows):
            larger = np.empty((2 * len(self), self._rows.shape[1]), dtype=np.float32)
            larger[:known] = self._rows[:known]
            self._rows = larger
        self._rows[numbers] = sums
        return True

    def would_be_finite(self, ids: Ids, gradients: Array) -> bool:
        """Whether `add` would add these."""
        known = len(self)
        sums = self._sums(self._numbers.add(ids), known, gradients)
        self._numbers.truncate(known)
        return finite(sums.reshape(-1))

    def _sums(self, numbers: Ids, known: int, gradients: Array) -> Array:
        """float32[n, dim], contiguous: what the rows of these numbers come to, of which those below `known`
        have one."""
        old = numbers < known
        if not old.any():
            return np.ascontiguousarray(gradients)
        sums = np.array(gradients, dtype=np.float32, order="C")
        with np.errstate(all="ignore"):
            sums[old] = self._rows[numbers[old]] + sums[old]
        return sums
