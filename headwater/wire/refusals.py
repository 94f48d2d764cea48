"""The log of refused connections, which strangers must not be able to fill a disk with."""

from __future__ import annotations

import time
from collections.abc import Callable

from headwater.loggers import logger

_SHOWN = 20
_PERIOD_S = 60.0

_log = logger("headwater.wire")


class RefusalLog:
    """Logs the first 20 refusals of each minute, and how many others there were.

    For one thread at a time. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = float("-inf")
        self._count = 0

    def __call__(self, reason: str) -> None:
        """Log that a connection was refused."""
        now = self._clock()
        if now >= self._until:
            if self._count > _SHOWN:
                _log.warning("and %d more connections were refused", self._count - _SHOWN)
            self._count, self._until = 0, now + _PERIOD_S
        self._count += 1
        if self._count <= _SHOWN:
            _log.warning("connection refused: %s", reason)
        if self._count == _SHOWN:
            _log.warning("further refusals of this minute are only counted")
