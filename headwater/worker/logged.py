"""What `Worker.log` was told: the newest value of each metric, and the points of the next report.

Bounds: `NAMES` names of `LONGEST` characters; further ones are counted and dropped. `POINTS` points in a
report: where there are more, every second one is left out, so that what is kept covers all of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headwater import messages as m
from headwater.errors import UsageError
from headwater.loggers import logger

NAMES = 100
"""Names of metrics that one worker may use."""
LONGEST = 100
"""Characters of such a name."""
POINTS = 256
"""Points that one report has at most."""

_log = logger("headwater.worker")


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a user logs, as numbers. Raises UsageError."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"log: {name} is {value!r}, expected a number; nothing was logged") from error
    return numbers


class LoggedMetrics:
    """Keeps what one worker logs.

    Attributes:
        newest: value of each metric, by name.
    """

    def __init__(self) -> None:
        self.newest: dict[str, float] = {}
        self._dropped: set[int] = set()
        self._points: list[tuple[int, int, float, dict[str, float]]] = []
        self._stride = 1
        self._told = 0

    @property
    def dropped(self) -> int:
        """How many names were dropped; not more than 10,000 are told apart."""
        return len(self._dropped)

    def add(self, metrics: Mapping[str, float], step: int, version: int, now: float) -> None:
        """Note what was told at `now` (monotonic seconds)."""
        taken: dict[str, float] = {}
        for name, value in metrics.items():
            if self._takes(name):
                self.newest[name] = taken[name] = value
        if not taken:
            return
        points = self._points
        if points and points[-1][:2] == (step, version):
            points[-1] = (step, version, now, {**points[-1][3], **taken})
            return
        self._told += 1
        if self._told % self._stride == 0:
            points.append((step, version, now, taken))
        if len(points) > POINTS:
            self._points = points[1::2]
            self._stride *= 2

    def news(self, now: float) -> tuple[m.LoggedPoint, ...]:
        """The points since the last call, the oldest first."""
        points, self._points = self._points, []
        self._stride, self._told = 1, 0
        return tuple(m.LoggedPoint(step, version, now - at, taken) for step, version, at, taken in points)

    def _takes(self, name: str) -> bool:
        if name in self.newest:
            return True
        if len(self.newest) < NAMES and len(name) <= LONGEST:
            return True
        if not self._dropped:
            _log.warning(
                "log: %r is not kept: a worker may use %d names of at most %d characters; further ones are "
                "counted, not kept",
                name[:LONGEST],
                NAMES,
                LONGEST,
            )
        if len(self._dropped) < 10_000:
            self._dropped.add(hash(name))
        return False
