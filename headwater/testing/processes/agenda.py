"""Virtual time: what is to happen, in the order in which it happens.

Nothing here or above it reads a clock. Two things at the same moment happen in the order in which they were
put down, so a run is a function of what is put down.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeAlias

Action: TypeAlias = Callable[..., None]


class Agenda:
    """A queue of actions by time.

    Attributes:
        now: seconds since the beginning.
        happened: actions so far.
        busy: actions to come that are not idle ones, which recur whether or not anything happens.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self.busy = 0
        self._put = 0
        self._heap: list[tuple[float, int, bool, Action, tuple[Any, ...]]] = []

    def at(self, time: float, action: Action, *arguments: Any, idle: bool = False) -> None:
        """Have `action(*arguments)` happen at `time`, now at the earliest."""
        self._put += 1
        self.busy += not idle
        heappush(self._heap, (time if time > self.now else self.now, self._put, idle, action, arguments))

    def step(self) -> bool:
        """Let the next thing happen; False, and nothing, where only idle actions are left."""
        if not self.busy:
            return False
        self.now, _, idle, action, arguments = heappop(self._heap)
        self.busy -= not idle
        self.happened += 1
        action(*arguments)
        return True
