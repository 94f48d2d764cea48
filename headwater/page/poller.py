"""Asks a cluster again and again, in a thread of its own, and keeps what a page shows: also of a while ago.

Invariants:
- A coordinator that does not answer ends nothing: the last moment stays, and the coordinator is asked on.
- Memory is bounded: `POINTS` points of each curve, `EVENTS` events.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from headwater.errors import HeadwaterError
from headwater.messages import ClusterStatistics
from headwater.page.events import events_between
from headwater.page.moment import Moment, moment_of

POINTS = 900
EVENTS = 200
CURVES = 8
"""Metrics of `Worker.log` of which curves are kept."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One moment of the curves: `time` in seconds since the page began."""

    time: float
    steps_per_s: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, `time` seconds after the page began."""

    time: float
    text: str


@dataclass(frozen=True, slots=True)
class PageState:
    """What a page shows now.

    Attributes:
        moment: the newest; None before the first answer.
        error: why there is no newer one; "" while the coordinator answers.
        since: seconds since the newest moment.
        number: grows with everything new.
        time: of this moment, in seconds since the page began.
    """

    moment: Moment | None
    error: str
    since: float
    number: int
    time: float
    points: tuple[CurvePoint, ...] = field(repr=False)
    events: tuple[Event, ...] = field(repr=False)


class Poller:
    """A thread that asks every `every_s` seconds until it is closed.

    Args:
        ask: the cluster's statistics; blocks, and raises a HeadwaterError where nobody answers.
    """

    def __init__(self, ask: Callable[[], ClusterStatistics], every_s: float = 0.5) -> None:
        self._ask, self._every_s = ask, every_s
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._moment: Moment | None = None
        self._error = "the cluster was not asked yet"
        self._number = 0
        self._points: deque[CurvePoint] = deque(maxlen=POINTS)
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headwater-page", daemon=True)
        self._thread.start()

    def shown(self) -> PageState:
        """What is to be seen now. From any thread."""
        with self._lock:
            since = time.monotonic() - self._moment.time if self._moment is not None else 0.0
            return PageState(
                self._moment,
                self._error,
                since,
                self._number,
                time.monotonic() - self._began,
                tuple(self._points),
                tuple(self._events),
            )

    def close(self) -> None:
        """Ask no more; idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._took(self._ask())
            except HeadwaterError as error:
                self._missed(str(error))
            self._closing.wait(max(0.0, began + self._every_s - time.monotonic()))

    def _took(self, statistics: ClusterStatistics) -> None:
        now = time.monotonic()
        with self._lock:
            before, at = self._moment, now - self._began
            new = moment_of(statistics, now, before)
            if before is not None:
                self._events.extend(Event(at, text) for text in events_between(before, new))
                if self._error:
                    self._events.append(Event(at, "the coordinator answers again"))
            if new.steps_per_s is not None:
                kept = dict(list(new.metrics.items())[:CURVES])
                self._points.append(CurvePoint(at, new.steps_per_s, kept))
            self._moment, self._error = new, ""
            self._number += 1

    def _missed(self, why: str) -> None:
        with self._lock:
            if not self._error and self._moment is not None:
                at = time.monotonic() - self._began
                self._events.append(Event(at, f"the coordinator does not answer: {why}"))
            self._error = why
            self._number += 1
