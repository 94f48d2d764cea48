"""The seconds for which a judge itself has run: what it cannot have heard it may not hold against anybody.

A process that was stopped, or whose interpreter was held, wakes up with all clocks ahead of what it has read
from its connections. In its own time a standstill is as long as one of its naps, so heartbeats that wait in
its sockets are read before anybody's silence counts.
"""

from __future__ import annotations

_MARGIN_S = 1e-6
"""More than a clock's value can lose when an offset is added and taken away again, in seconds."""


class OwnTime:
    """Follows the driver's clock, but passes over standstills.

    Args:
        nap: the longest pause between two looks at the clock that is no standstill, in seconds.

    Attributes:
        now: seconds of own time.
    """

    def __init__(self, nap: float, clock: float) -> None:
        self.now = 0.0
        self._nap = nap
        self._clock = clock
        self._offset = clock

    def advance(self, clock: float) -> float:
        """The driver's clock says `clock`; returns how long it stood still just now, 0.0 if it did not."""
        still = max(0.0, clock - self._clock - self._nap)
        self._clock = max(clock, self._clock)
        self._offset += still
        self.now = max(self.now, self._clock - self._offset)
        return still

    def clock_at(self, moment: float) -> float:
        """What the driver's clock says when this moment of own time has come, if nothing stands still."""
        return moment + self._offset + _MARGIN_S
