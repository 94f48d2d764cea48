"""The clocks of active workers: how many steps each finished, and the smallest of them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Clocks:
    """A multiset of clocks; every operation is cheap however many workers there are.

    Attributes:
        slowest: the smallest clock; 0 when there is none.
    """

    def __init__(self) -> None:
        self.slowest = 0
        self._workers_at: dict[int, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, clock: int) -> None:
        """A worker with this clock became active."""
        self.slowest = min(self.slowest, clock) if self._size else clock
        self._workers_at[clock] = self._workers_at.get(clock, 0) + 1
        self._size += 1

    def remove(self, clock: int) -> None:
        """A worker with this clock is no longer active."""
        self._size -= 1
        self._workers_at[clock] -= 1
        if self._workers_at[clock] == 0:
            del self._workers_at[clock]
            if clock == self.slowest:
                self.slowest = min(self._workers_at, default=0)

    def slowest_after(self, clocks: Sequence[int]) -> int:
        """What `slowest` will be when workers with these clocks have finished a step each."""
        if self._workers_at[self.slowest] > len(clocks):
            return self.slowest
        if len(self._workers_at) == 1 and len(clocks) == self._size:
            return self.slowest + 1
        advanced = Counter(clocks)
        if self._workers_at[self.slowest] > advanced[self.slowest]:
            return self.slowest
        stay = (clock for clock, workers in self._workers_at.items() if workers > advanced[clock])
        return min((*stay, *(clock + 1 for clock in advanced)))

    def advance(self, clock: int) -> None:
        """A worker with this clock finished a step."""
        self._workers_at[clock + 1] = self._workers_at.get(clock + 1, 0) + 1
        self._size += 1
        self.remove(clock)
