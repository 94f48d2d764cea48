"""Takes what workers log as it comes, keeps it, and hands it to sinks in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from headwater.errors import ConfigurationError
from headwater.loggers import logger
from headwater.machines.coordinator import Logged
from headwater.observe.history import History, Point
from headwater.observe.sinks import LogSink
from headwater.spec.words import option

_log = logger("headwater.sinks")

_WAITING = 100_000
"""Points that may wait for a slow sink; further ones are left out there, and counted."""
_LAST_S = 30.0
"""How long sinks may take to write what is left, in seconds."""


class Recorder:
    """Of one cluster.

    Args:
        sinks: are closed with it.
        clock: seconds since 1970.

    Attributes:
        history: what was logged.

    Raises:
        ConfigurationError: not a sink.
    """

    def __init__(self, sinks: Sequence[LogSink] = (), clock: Callable[[], float] = time.time) -> None:
        self._sinks = checked(sinks)
        self._clock = clock
        self.history = History()
        self._queue: queue.SimpleQueue[list[Point] | None] = queue.SimpleQueue()
        self._waiting = self._lost = 0
        self._failed: set[int] = set()
        self._closed = False
        self._thread: threading.Thread | None = None
        if self._sinks:
            self._thread = threading.Thread(target=self._run, name="headwater-sinks", daemon=True)
            self._thread.start()

    def take(self, logged: Logged) -> None:
        """What a worker told; from any thread, does not block."""
        now = self._clock()
        points = [
            Point(now - one.age, logged.generation, one.version, one.step, logged.rank, one.metrics)
            for one in logged.points
        ]
        self.history.add(points)
        if self._thread is None or self._closed:
            return
        if self._waiting > _WAITING:
            self._lost += len(points)
            return
        self._waiting += len(points)
        self._queue.put(points)

    def close(self) -> None:
        """Have the sinks write what is left, for at most half a minute, and close them; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(_LAST_S)
        if self._thread.is_alive():
            _log.warning("a sink of log_to is still writing after %g s, and is left behind", _LAST_S)
        if self._lost:
            _log.warning("%d points were left out for sinks that could not keep up", self._lost)

    def _run(self) -> None:
        over = False
        while not over:
            points = self._queue.get()
            more: list[Point] = list(points or ())
            over = points is None
            while not over and not self._queue.empty():
                points = self._queue.get()
                more += points or ()
                over = points is None
            self._waiting -= len(more)
            if more:
                self._each(lambda sink, more=more: sink.write(more))  # type: ignore[misc]
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[LogSink], None]) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                call(sink)
            except BaseException as error:  # noqa: BLE001 - whatever a sink raises, SystemExit too
                if number not in self._failed:
                    self._failed.add(number)
                    plain = isinstance(error, OSError)  # a full disk needs no traceback
                    _log.warning(
                        "log_to: %s failed: %r; training goes on",
                        type(sink).__name__,
                        error,
                        exc_info=not plain,
                    )


def checked(sinks: object) -> tuple[LogSink, ...]:
    """The sinks of a list.

    Raises:
        ConfigurationError: not a list of sinks.
    """
    if not isinstance(sinks, Sequence) or isinstance(sinks, str):
        raise ConfigurationError(f"{option('log_to')}: got {sinks!r}, expected a list of sinks (hw.sinks)")
    for one in sinks:
        if not isinstance(one, LogSink) or isinstance(one, type):
            raise ConfigurationError(
                f"{option('log_to')}: got {one!r}, expected an object with write(points) and close(), "
                "such as hw.sinks.Jsonl(path)"
            )
    return tuple(sinks)
