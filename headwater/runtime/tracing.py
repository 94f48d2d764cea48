"""Records what the threads of a node do, while the coordinator asks for it.

Off, it costs whoever asks `on` one branch. What is recorded waits here until a thread of its own sends it,
twice a second; of more than `_WAITING` events the newest are dropped and counted: a trace stops no node.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from headwater.messages import RecordTrace, TraceEvent, TraceEvents

_FLUSH_S = 0.5
_WAITING = 50_000
_A_MESSAGE = 5_000
"""Events that one message has at most."""


_Raw: TypeAlias = tuple[str, str, int, int, tuple[tuple[int, int], ...], str, dict[str, int]]

_local = threading.local()


def _this_thread() -> str:
    """Its name and number: several connections have threads of one name."""
    try:
        label: str = _local.label
    except AttributeError:
        own = threading.current_thread()
        label = _local.label = f"{own.name} {own.native_id}"
    return label


class TraceRecorder:
    """Of one node.

    Args:
        tell: sends to the coordinator.

    Attributes:
        on: whether anything is recorded now.
        now: reads the node's clock, in nanoseconds.
    """

    def __init__(
        self, tell: Callable[[TraceEvents], None], now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.on = False
        self.now = now
        self._tell = tell
        self._events: list[_Raw] = []
        self._dropped = 0
        self._until = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def obey(self, asked: RecordTrace) -> None:
        """Record for so long, or no longer; answers at once."""
        if asked.seconds <= 0:
            self.close()
            return
        self._tell(TraceEvents(self.now(), echo=asked.clock))
        with self._changed:
            self._until = self.now() + round(min(asked.seconds, 1e8) * 1e9)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="headwater-trace", daemon=True)
                self._thread.start()
            self.on = True

    def slice(
        self,
        name: str,
        began: int,
        ended: int,
        flows: tuple[tuple[int, int], ...] = (),
        place: str = "",
        **about: int,
    ) -> None:
        """This thread did something from `began` to `ended`."""
        if not self.on:
            return
        if len(self._events) >= _WAITING:
            self._dropped += 1
            return
        self._events.append((_this_thread(), name, began, ended - began, flows, place, about))

    def close(self) -> None:
        """Send what is left, as the last, and record nothing more; idempotent."""
        with self._changed:
            if not self.on:
                return
            self.on = False
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._flush(last=True)

    def _run(self) -> None:
        while self.on:
            with self._changed:
                self._changed.wait_for(lambda: not self.on, _FLUSH_S)
            if self.on:
                self._flush()
                if self.now() > self._until:
                    self.close()

    def _flush(self, *, last: bool = False) -> None:
        raw, self._events = self._events, []
        events = [TraceEvent(*one) for one in raw]
        dropped, self._dropped = self._dropped, 0
        while len(events) > _A_MESSAGE:
            self._tell(TraceEvents(self.now(), tuple(events[:_A_MESSAGE])))
            events = events[_A_MESSAGE:]
        if events or dropped or last:
            self._tell(TraceEvents(self.now(), tuple(events), dropped=dropped, last=last))
