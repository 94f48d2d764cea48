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
    only those of counts that no row had before. Otherwise it computes one for each different count. So a
    rule whose settings change often costs what the counts of the rows pushed since then do, not all counts.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._width = len(rule.scalars(0, 1))
        self._varies = bool(self._width) and rule.counted
        self._kept: Lines = np.zeros((1, self._width), dtype=np.float32)
        self._known = np.ones(1, dtype=np.bool_)  # a count of 0, of a refused id, is never used
        self._all_known_below = 1

    def look_up(self, updates: int, counts: Counts) -> tuple[Lines, Counts]:
        """Lines float32[m, k], and which of them each of n rows takes (int32[n]; empty: all the first)."""
        if not self._varies or len(counts) == 0:
            return self._compute(updates, [1]), _ALL_THE_SAME
        most = int(counts.max())
        if self._rule.scheduled or most >= _KEPT:
            distinct, (which,) = unite([counts.astype(np.int64)])
            return self._compute(updates, distinct.tolist()), which.astype(np.int32)
        if most >= len(self._kept):
            self._make_room(most)
        if most >= self._all_known_below:
            self._learn(np.unique(counts[~self._known[counts]]))
        return self._kept, counts

    def _compute(self, updates: int, counts: list[int]) -> Lines:
        """One line a count; a count of 0, of a refused id, is never used."""
        lines = [self._rule.scalars(updates, max(count, 1)) for count in counts]
        return np.array(lines, dtype=np.float32).reshape(len(counts), self._width)

    def _learn(self, counts: Counts) -> None:
        """Keep the lines of these counts, which differ and are not known."""
        self._kept[counts] = self._compute(0, counts.tolist())
        self._known[counts] = True
        for count in counts.tolist():
            if count == self._all_known_below:
                self._all_known_below += 1

    def _make_room(self, most: int) -> None:
        """For lines of counts up to `most`; the system gives memory only for those that are written."""
        size = min(_KEPT, max(most + 1, 2 * len(self._kept)))
        kept, known = np.zeros((size, self._width), dtype=np.float32), np.zeros(size, dtype=np.bool_)
        kept[: len(self._kept)], known[: len(self._known)] = self._kept, self._known
        self._kept, self._known = kept, known
