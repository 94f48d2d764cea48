"""Memory for the copies that a snapshot consists of, used for one snapshot after the other.

Memory that nobody has used takes several times as long to fill as memory in use, and a shard is locked while
it is copied.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Copies:
    """Makes copies in memory that it has, or else in new memory. Does not lock by itself."""

    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}
        self._begun = False

    def begin(self, arrays: Iterable[Array]) -> None:
        """Have memory for a copy of each of these, and of all that `expect` is told of from now on."""
        if not self._begun:
            self._begun = True
            self.expect(arrays)

    def expect(self, arrays: Iterable[Array]) -> None:
        """New arrays may be copied; blocks while the system finds memory, if any copies are made at all."""
        if self._begun:
            self.take_back(np.full(len(array), 0.0, np.float32) for array in arrays)

    def take_back(self, copies: Iterable[Array]) -> None:
        """Nobody reads these any more: the next ones are written over them."""
        for array in copies:
            self._free.setdefault(len(array), []).append(array)

    def copy(self, array: Array) -> Array:
        """A copy of float32[n], the caller's until it gives it back."""
        kept = self._free.get(len(array))
        if not kept:
            return array.copy()
        made = kept.pop()
        np.copyto(made, array)
        return made
