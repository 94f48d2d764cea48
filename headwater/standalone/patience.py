"""Start order does not matter: what is not there yet is tried again for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from headwater.errors import ClusterEndedError, ConnectionLostError
from headwater.loggers import logger

Came = TypeVar("Came")

_log = logger("headwater")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


def patiently(call: Callable[[], Came], seconds: float) -> Came:
    """What `call` returns, as soon as it does not raise ConnectionLostError; blocks.

    Raises:
        ConnectionLostError: it still raised that after `seconds` seconds.
        Whatever else `call` raises, ClusterEndedError too, at once.
    """
    until, pause, told = time.monotonic() + seconds, _FIRST_PAUSE_S, False
    while True:
        began = time.monotonic()
        try:
            return call()
        except ClusterEndedError:
            raise  # somebody is there, and says that this is over
        except ConnectionLostError as error:
            now = time.monotonic()
            if now - began > _LONGEST_PAUSE_S:
                until = now + seconds  # somebody was there, and is gone
            if now >= until:
                raise ConnectionLostError(f"{error} (tried for {seconds:g} s)") from error
            if not told:
                _log.warning("%s; tries again for %g s", error, seconds)
                told = True
        time.sleep(min(pause, max(0.0, until - now)))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
