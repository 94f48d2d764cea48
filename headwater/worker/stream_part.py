"""One begun call of `batches` over a stream: which partitions are this worker's, how far it is in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.data.event_stream import BEGINNING, Stream
from headwater.errors import ConfigurationError, DataError
from headwater.log.positions import owner_of
from headwater.spec.seconds import seconds
from headwater.worker.plan import count_of

_POLL_S = 0.02
_LIST_S = 0.5


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """A call: events of `stream`, `batch` at a time.

    `linger`: seconds after which a batch that has some events is not waited for to be full.
    """

    stream: Stream
    batch: int
    linger: float


def stream_plan_of(stream: Stream, batch: int, linger: float, *, ordered: bool) -> StreamPlan:
    """A call of `batches` with a stream. `ordered`: the call asks for an order or a number of passes.

    Raises:
        ConfigurationError: impossible arguments.
    """
    batch, linger = count_of("batches", "batch_size", batch, 1), seconds("linger", linger, zero=True)
    if ordered:
        raise ConfigurationError(
            "batches: a stream is read once, in its order, each partition by one worker: leave out epochs, "
            "shuffle, splits and drop_last"
        )
    return StreamPlan(stream, batch, linger)


class StreamPart:
    """What worker `rank` of `workers` reads, from where the log recorded it.

    Attributes:
        planned: events handed out. left: whoever read it has gone on without its end.
    """

    def __init__(
        self, number: int, plan: StreamPlan, rank: int, workers: int, recorded: m.StreamProgress | None
    ) -> None:
        self.planned = 0.0
        self.left = False
        self._number, self._plan = number, plan
        self._rank, self._workers = rank, workers
        self._recorded = dict(recorded.offsets) if recorded is not None else {}
        self._offsets = {
            partition: offset for partition, offset in self._recorded.items() if self._is_own(partition)
        }
        self._turn = 0
        self._listed = 0.0
        self._partitions: list[str] = []

    def _is_own(self, partition: str) -> bool:
        return owner_of(partition, self._workers) == self._rank

    def next_batch(self, check: Callable[[], None]) -> dict[str, NDArray[Any]] | None:
        """The next events, field → one value an event; None at the end. Blocks until there is one.

        `check` is called while it waits.
        """
        events: list[Mapping[str, Any]] = []
        over: float | None = None
        while True:
            endless = self._plan.stream.endless  # asked first: the last events may come before the end does
            came = self._poll(events, endless)
            now = time.monotonic()
            if events and over is None:
                over = now + self._plan.linger
            if len(events) >= self._plan.batch or (over is not None and now >= over):
                break
            if not came:
                if not endless:
                    break
                check()
                time.sleep(_POLL_S)
        self.planned += len(events)
        return _columns(events) if events else None

    def _poll(self, events: list[Mapping[str, Any]], endless: bool) -> bool:
        """Take what is there, a partition after the other; whether anything was."""
        came = False
        partitions = self._list(endless)
        for _ in range(len(partitions)):
            if len(events) >= self._plan.batch:
                return True
            partition = partitions[self._turn % len(partitions)]
            self._turn += 1
            offset = self._offsets.get(partition, BEGINNING)
            for event in self._plan.stream.read(partition, offset, self._plan.batch - len(events)):
                came = True
                self._offsets[partition] = event.offset
                if event.value is not None:
                    events.append(event.value)
        return came

    def _list(self, endless: bool) -> list[str]:
        now = time.monotonic()
        if not self._partitions or now >= self._listed + _LIST_S or not endless:
            self._listed = now
            there = [one for one in self._plan.stream.partitions() if self._is_own(one)]
            gone = self._offsets.keys() - set(there)
            if gone:
                raise DataError(
                    f"{self._plan.stream!r}: {min(gone)!r} was read up to {self._offsets[min(gone)]}, and is "
                    f"there no more"
                )
            self._partitions = there
        return self._partitions

    # ── as a call ───────────────────────────────────────────────────────────────────────────────

    def stream(self) -> m.StreamProgress:
        """Where it is, once the step that follows what was handed out is applied."""
        return m.StreamProgress(self._number, tuple(sorted(self._offsets.items())))

    def next_piece(self) -> None:
        """A stream has no pieces."""
        raise AssertionError(self)

    def hand_out(self, epoch: int, positions: Any) -> None:
        """`next_batch` has noted it."""

    def applied(self, visits: Sequence[m.DynamicProgress]) -> None:
        """Nothing is read together."""

    def place(self) -> None:
        """It has offsets instead."""

    def visit(self) -> None:
        """Nothing is read together."""

    def finish(self, interrupted: bool, stopped: bool) -> None:
        """The call is over."""
        self._plan.stream.close()


def _columns(events: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    names = events[0].keys()
    for event in events:
        if event.keys() != names:
            raise DataError(f"events with the fields {sorted(names)} and {sorted(event)} cannot be one batch")
    return {name: np.asarray([event[name] for event in events]) for name in names}
