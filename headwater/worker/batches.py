"""A worker's data: its calls of `batches` and `splits`, and where it is in each.

Calls are numbered in the order in which they are begun, so that they are the same calls in every worker
and after a restart. What is handed out counts as done with the next step that is applied; the step
carries it (`Position`), and the log records it.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from headwater import messages as m
from headwater.data import fetch, groups_of, length_of
from headwater.errors import ConfigurationError
from headwater.machines.splits import Indices, Order, batches_of, part_of
from headwater.runtime.session import Session
from headwater.worker.leases import LeaseClient

_log = logging.getLogger("headwater.worker")

Splits: TypeAlias = Literal["static", "dynamic"]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One call: `epochs` passes over `size` samples, in this order, `batch` at a time."""

    size: int
    groups: tuple[int, ...] | None
    batch: int
    epochs: int
    shuffle: bool
    seed: int
    splits: Splits


class _Call(Protocol):
    """A begun call.

    Attributes:
        planned: samples that this worker will have read of it, as far as is known.
    """

    planned: float

    def pieces(self) -> Iterator[tuple[int, range]]:
        """Epoch and positions of its order, piece by piece; may block for the next one."""

    def hand_out(self, epoch: int, positions: range) -> None:
        """The next step that is applied makes these done."""

    def applied(self) -> None:
        """A step was applied."""

    def place(self) -> m.StaticProgress | None:
        """Where the worker's own part is, if it has one."""

    def visit(self) -> m.DynamicProgress | None:
        """What the next step adds to what all do together, if they do."""

    def finish(self, interrupted: bool, stopped: bool) -> None:
        """The call is over; `interrupted` while the last batch handed out was with the caller."""


class _StaticPart:
    """A call that reads this worker's own part, from `place` on."""

    def __init__(
        self, number: int, plan: ReadPlan, rank: int, workers: int, place: m.StaticProgress | None
    ) -> None:
        self._number, self._plan = number, plan
        self._part = part_of(plan.size, rank % workers, workers, grouped=plan.groups is not None)
        self._epoch, self._done = (place.epoch, place.done) if place is not None else (0, 0)
        if place is not None and place.size != len(self._part):
            self._done = 0
            _log.warning(
                f"call {number} of batches: the part of worker {rank} has {len(self._part)} samples, but had "
                f"{place.size} when it was recorded: epoch {place.epoch} begins anew"
            )
        self.planned = max(0.0, (plan.epochs - self._epoch) * len(self._part) - self._done)

    def pieces(self) -> Iterator[tuple[int, range]]:
        begin, done = self._epoch, self._done
        for epoch in range(begin, self._plan.epochs):
            yield epoch, self._part[done if epoch == begin else 0 :]

    def hand_out(self, epoch: int, positions: range) -> None:
        if epoch != self._epoch:
            self._epoch, self._done = epoch, 0
        self._done += len(positions)

    def applied(self) -> None:
        pass  # a place counts from the beginning, so nothing is kept back for the next one

    def place(self) -> m.StaticProgress | None:
        return m.StaticProgress(self._number, self._plan.epochs, len(self._part), self._epoch, self._done)

    def visit(self) -> m.DynamicProgress | None:
        return None

    def finish(self, interrupted: bool, stopped: bool) -> None:
        pass


class _LeasedSplits:
    """A call whose splits all workers lease. `on_wait`: as for `LeaseClient.next`."""

    def __init__(
        self, number: int, plan: ReadPlan, workers: int, leases: LeaseClient, on_wait: Callable[[], None]
    ) -> None:
        self._number, self._plan = number, plan
        self._leases, self._on_wait = leases, on_wait
        self._mine = self._rest = self._last = 0
        self._pending: list[m.Span] = []
        self._over = False
        self.planned = plan.epochs * plan.size / workers

    def pieces(self) -> Iterator[tuple[int, range]]:
        self._over = True  # unless the coordinator says otherwise; also where it says nothing
        while (leased := self._leases.next(self._request, self._on_wait)) is not None:
            self._over = False
            positions = range(leased.span.start, leased.span.stop)
            self._rest = len(positions)
            self._mine += len(positions)
            self.planned = self._mine * leased.total / leased.handed
            yield leased.span.epoch, positions
            self._over = True
        self.planned = self._mine

    def hand_out(self, epoch: int, positions: range) -> None:
        self._rest -= len(positions)
        self._last = len(positions)
        start = positions.start
        if self._pending and (self._pending[-1].epoch, self._pending[-1].stop) == (epoch, start):
            start = self._pending.pop().start
        self._pending.append(m.Span(epoch, start, positions.stop))

    def applied(self) -> None:
        self._pending = []

    def place(self) -> m.StaticProgress | None:
        return None

    def visit(self) -> m.DynamicProgress | None:
        if not self._pending:
            return None
        return m.DynamicProgress(self._number, self._plan.epochs, self._plan.size, tuple(self._pending))

    def finish(self, interrupted: bool, stopped: bool) -> None:
        if not self._over:
            left = self._rest + (self._last if interrupted and self._pending else 0)
            self._leases.finish(m.Finish(self._number, left, stopped))
            self.planned = self._mine - left

    def _request(self, number: int) -> m.Lease:
        plan = self._plan
        pending = sum(span.stop - span.start for span in self._pending)
        return m.Lease(
            number, self._number, plan.epochs, plan.size, plan.shuffle, plan.seed, plan.batch, pending
        )


class DataReader:
    """What one worker reads.

    Attributes:
        samples: how many it has read.
        stopped: whether `batches` end now, because somebody asked for it.
    """

    def __init__(self, session: Session) -> None:
        self.samples = 0
        self.stopped = False
        self._session = session
        self._rank = session.welcome.member.index
        self._leases = LeaseClient(session)
        recorded = session.welcome.position or m.Position(self._rank, 0)
        self._over = recorded.over
        self._recorded = {place.call: place for place in recorded.places}  # of calls not begun again yet
        self._applied = recorded.places
        self._begun = 0
        self._open: dict[int, _Call] = {}
        self._planned = 0.0

    @property
    def planned(self) -> int:
        """Samples that the calls begun so far have for this worker; an estimate for dynamic splits."""
        return round(self._planned + sum(call.planned for call in self._open.values()))

    # ── what the user iterates over ─────────────────────────────────────────────────────────────

    def batches(self, plan: ReadPlan, dataset: Any) -> Iterator[Any]:
        """Batch by batch; a step that is taken before the next one is asked for makes it done."""
        with self._begin(plan) as call:
            for epoch, order, positions in _ordered(call, plan):
                for batch in batches_of(positions, plan.batch):
                    call.hand_out(epoch, batch)
                    yield fetch(dataset, order.at(batch))
                    self.samples += len(batch)
                    if self.stopped:
                        return

    def splits(self, plan: ReadPlan) -> Iterator[Indices]:
        """Split by split; one is done with the step after the next one was asked for."""
        with self._begin(plan) as call:
            for epoch, order, positions in _ordered(call, plan):
                yield order.at(positions)
                call.hand_out(epoch, positions)
                self.samples += len(positions)
                if self.stopped:
                    return

    @contextmanager
    def _begin(self, plan: ReadPlan) -> Iterator[_Call]:
        number = self._begun
        self._begun += 1
        self.stopped = False
        if number < self._over:
            _log.info("call %d of batches is over, as the log recorded it", number)
            yield _OVER
            return
        call = self._open[number] = self._make(number, plan)
        interrupted = True
        try:
            yield call
            interrupted = False
        finally:
            del self._open[number]
            if self._session.usable():
                call.finish(interrupted, self.stopped)
                self._end()
            self._planned += call.planned

    def _make(self, number: int, plan: ReadPlan) -> _Call:
        workers = self._session.welcome.workers
        place = self._recorded.pop(number, None)
        if plan.splits == "static":
            return _StaticPart(number, plan, self._rank, workers, place)
        return _LeasedSplits(number, plan, workers, self._leases, self._end)

    def _end(self) -> None:
        """Rounds, and whoever may not lead too far, wait for this worker no more until it steps again."""
        going = self._open.keys() | self._recorded.keys()
        position = m.Position(
            self._rank, self._lowest(), tuple(place for place in self._applied if place.call in going)
        )
        self._session.ask(lambda number: m.End(number, position), "end of batches")

    # ── where it is ─────────────────────────────────────────────────────────────────────────────

    def position(self) -> m.Position | None:
        """Where the worker is once the step that it now takes is applied; None where it has read nothing."""
        if not self._begun:
            return None
        places = [*(call.place() for call in self._open.values()), *self._recorded.values()]
        visits = [call.visit() for call in self._open.values()]
        return m.Position(
            self._rank,
            self._lowest(),
            tuple(place for place in places if place is not None),
            tuple(visit for visit in visits if visit is not None),
        )

    def applied(self, position: m.Position | None) -> None:
        """The step with this position was applied."""
        if position is not None:
            self._applied = position.places
        for call in self._open.values():
            call.applied()

    def _lowest(self) -> int:
        """The first call that is not over."""
        return min([*self._open, *self._recorded], default=max(self._begun, self._over))


_OVER = _StaticPart(0, ReadPlan(0, None, 1, 0, False, 0, "static"), 0, 1, None)
"""A call without samples."""


def _ordered(call: _Call, plan: ReadPlan) -> Iterator[tuple[int, Order, range]]:
    """The call's pieces, each with the order of its epoch."""
    epoch, order = -1, None
    for now, positions in call.pieces():
        if order is None or now != epoch:
            epoch = now
            order = Order(plan.size, plan.groups, shuffle=plan.shuffle, seed=plan.seed, epoch=epoch)
        yield epoch, order, positions


# ── what the user may ask for ───────────────────────────────────────────────────────────────────


def plan_of(
    dataset: Any, batch: int, epochs: int, shuffle: bool, seed: int, splits: Splits | None, *, rounds: bool
) -> ReadPlan:
    """A call with these arguments; `dataset` may be a plain number of samples.

    `splits` None: dynamic, but static where training goes in `rounds`.

    Raises:
        ConfigurationError: impossible arguments.
        DataError: a file of the data set cannot be read.
    """
    batch, epochs, seed = _count("batch_size", batch, 1), _count("epochs", epochs, 0), _count("seed", seed, 0)
    if splits is None:
        splits = "static" if rounds else "dynamic"
    if splits not in ("static", "dynamic"):
        raise ConfigurationError(f"batches: got splits={splits!r}, expected 'static' or 'dynamic'")
    if splits == "dynamic" and rounds:
        raise ConfigurationError(
            "batches: splits='dynamic' in synchronous mode, where the slowest worker sets the pace of all "
            "anyway: leave it out, or train with sync='async' or 'ssp:N'"
        )
    counted = isinstance(dataset, numbers.Integral) and not isinstance(dataset, bool)
    size = int(dataset) if counted else length_of(dataset)
    if size < 1:
        raise ConfigurationError(f"batches: the data set has {size} samples, expected at least one")
    return ReadPlan(size, None if counted else groups_of(dataset), batch, epochs, shuffle, seed, splits)


def _count(name: str, value: Any, least: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value < 2**63:
        raise ConfigurationError(f"batches: got {name}={value!r}, expected a whole number ≥ {least}")
    return int(value)
