"""A rule's scalars for rows that differ in their count of updates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headwater.kernels.arrange import unite
from headwater.spec.rules import Rule

Lines = NDArray[np.float32]
Counts = NDArray[np.int32]

_KEPT = 1 << 18
_ALL_THE_SAME = np.empty(0, dtype=np.int32)


class Scalars:
    """Looks up the scalars of one rule.

    A line is float32[k], what the rule's function takes after the states.

    Without a schedule, lines are kept by count up to `_KEPT` (at most 10 MB for Adam), so an update computes
    only those of counts that no row had before. Otherwise it computes one for each different count.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._width = len(rule.scalars(0, 1))
        self._varies = bool(self._width) and rule.counted
        self._kept: Lines = np.zeros((1, self._width), dtype=np.float32)
        self._known = 1

    def look_up(self, updates: int, counts: Counts) -> tuple[Lines, Counts]:
        """Lines float32[m, k], and which of them each of n rows takes (int32[n]; empty: all the first)."""
        if not self._varies or len(counts) == 0:
            return self._compute(updates, [1]), _ALL_THE_SAME
        most = int(counts.max())
        if self._rule.scheduled or most >= _KEPT:
            distinct, (which,) = unite([counts.astype(np.int64)])
            return self._compute(updates, distinct.tolist()), which.astype(np.int32)
        if most >= self._known:
            self._learn(most)
        return self._kept, counts

    def _compute(self, updates: int, counts: list[int]) -> Lines:
        """One line a count; a count of 0, of a refused id, is never used."""
        lines = [self._rule.scalars(updates, max(count, 1)) for count in counts]
        return np.array(lines, dtype=np.float32).reshape(len(counts), self._width)

    def _learn(self, most: int) -> None:
        """Keep the lines of counts up to `most`."""
        if most >= len(self._kept):
            larger = np.zeros((min(_KEPT, max(most + 1, 2 * len(self._kept))), self._width), dtype=np.float32)
            larger[: self._known] = self._kept[: self._known]
            self._kept = larger
        self._kept[self._known : most + 1] = self._compute(0, list(range(self._known, most + 1)))
        self._known = most + 1
