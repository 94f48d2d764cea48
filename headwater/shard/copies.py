"""Memory for the copies that checkpoints consist of, used for one after the other.

Memory that nobody has used takes several times as long to fill as memory in use, and a shard is locked while
it is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Copies:
    """Makes copies in memory that it has, or else in new memory. Does not lock by itself.

    Attributes:
        begun: whether memory is kept at all.
    """

    def __init__(self) -> None:
        self.begun = False
        self._expected: Counter[int] = Counter()
        self._free: dict[int, list[Array]] = {}

    def expect(self, arrays: Iterable[Array]) -> list[int]:
        """From now on memory is kept for a copy of each of these; returns their lengths, for `found`."""
        self.begun = True
        lengths = [len(array) for array in arrays]
        self._expected.update(lengths)
        return lengths

    def take_back(self, memory: Iterable[Array]) -> None:
        """Nobody else reads or writes these any more; those that are not needed for a copy are let go."""
        for array in memory:
            kept = self._free.setdefault(len(array), [])
            if len(kept) < self._expected[len(array)]:
                kept.append(array)

    def copy(self, array: Array) -> Array:
        """A copy of float32[n], the caller's until it gives it back."""
        kept = self._free.get(len(array))
        if not kept:
            return array.copy()
        made = kept.pop()
        np.copyto(made, array)
        return made


def found(lengths: Iterable[int]) -> list[Array]:
    """New arrays, float32[length] each, whose memory is there; blocks while the system finds it."""
    return [np.full(length, 0.0, np.float32) for length in lengths]
