"""Where one begun call of `batches` or `splits` gets its samples from: a part of its own, or leased splits.

A call hands out positions of an epoch's order. What is handed out is done with the next step that is applied;
`place` and `visit` say so in the position that the step carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.loggers import logger
from headwater.machines.splits import Places, left_of, part_of, part_of_rest
from headwater.runtime.client import Client
from headwater.worker.plan import ReadPlan

_log = logger("headwater.worker")


class Call(Protocol):
    """A begun call.

    Attributes:
        planned: samples that this worker will have read of it, as far as is known.
        left: whoever read it has gone on without its end.
    """

    planned: float
    left: bool

    def next_piece(self) -> tuple[int, Places] | None:
        """Epoch and positions of its order; None at the end. Blocks; may be called again after an error."""

    def hand_out(self, epoch: int, positions: Places) -> None:
        """The next step that is applied makes these done."""

    def applied(self, visits: Sequence[m.DynamicProgress]) -> None:
        """A step was applied that says this of what all read together."""

    def place(self) -> m.StaticProgress | None:
        """Where the worker's own part is, if it has one."""

    def visit(self) -> m.DynamicProgress | None:
        """What the next step adds to what all do together, if they do."""

    def finish(self, interrupted: bool, stopped: bool) -> None:
        """The call is over; `interrupted` while the last batch handed out was with the caller."""


def batches_an_epoch(plan: ReadPlan, rank: int, workers: int) -> int:
    """How many batches a static part has in each epoch, unless it was cut anew."""
    if plan.drop_last:
        return plan.size // workers // plan.batch
    return -(-len(part_of(plan.size, rank, workers, grouped=plan.groups is not None)) // plan.batch)


class StaticPart:
    """A call that reads this worker's own part, from `place` on.

    `recuts`: how the parts of this call were cut anew, because there were more or fewer workers.

    Raises:
        ConfigurationError: the worker joined beyond the declared ones, for which nothing was cut.
    """

    def __init__(
        self,
        number: int,
        plan: ReadPlan,
        rank: int,
        workers: int,
        place: m.StaticProgress | None,
        recuts: Sequence[m.Recut] = (),
    ) -> None:
        if rank >= workers:
            raise ConfigurationError(
                f"batches: worker {rank} joined beyond the {workers} declared workers, which have all of a "
                f"data set that is cut into static parts: pass splits='dynamic' in asynchronous or bounded-"
                f"staleness mode, or stop and resume with workers={rank + 1}, which cuts what is left anew"
            )
        self.left = False
        self._number, self._plan = number, plan
        self._rank, self._workers, self._recuts = rank, workers, recuts
        self._epoch, self._done = (place.epoch, place.done) if place is not None else (0, 0)
        self._part, self._cut_epoch = self._part_of(self._epoch), self._epoch
        if place is not None and place.size not in (-1, len(self._part)):
            self._done = 0
            _log.warning(
                f"call {number} of batches: the part of worker {rank} has {len(self._part)} samples, but had "
                f"{place.size} when it was recorded: epoch {place.epoch} begins anew"
            )
        self._next = self._epoch
        self._skip = self._done
        self.planned = 0.0
        if self._epoch < plan.epochs:
            later = (plan.epochs - self._epoch - 1) * len(self._part_of(plan.epochs - 1))
            self.planned = float(len(self._part) - self._done + later)

    def _part_of(self, epoch: int) -> Places:
        grouped = self._plan.groups is not None
        left = left_of(self._plan.size, epoch, self._recuts, grouped=grouped)
        part = part_of_rest(left, self._rank, self._workers, grouped=grouped)
        if self._plan.drop_last:
            part = part[: len(left) // self._workers // self._plan.batch * self._plan.batch]
        return part

    def next_piece(self) -> tuple[int, Places] | None:
        if self._next >= self._plan.epochs:
            return None
        epoch, skip = self._next, self._skip
        self._next, self._skip = epoch + 1, 0
        return epoch, self._part_of(epoch)[skip:]

    def hand_out(self, epoch: int, positions: Places) -> None:
        if epoch != self._epoch:
            self._epoch, self._done = epoch, 0
        self._done += len(positions)

    def applied(self, visits: Sequence[m.DynamicProgress]) -> None:
        pass  # a place counts from the beginning, so nothing is kept back for the next one

    def place(self) -> m.StaticProgress | None:
        if self._cut_epoch != self._epoch:
            self._part, self._cut_epoch = self._part_of(self._epoch), self._epoch
        return m.StaticProgress(self._number, self._plan.epochs, len(self._part), self._epoch, self._done)

    def visit(self) -> m.DynamicProgress | None:
        return None

    def finish(self, interrupted: bool, stopped: bool) -> None:
        pass


class LeasedSplits:
    """A call whose splits all workers lease.

    `on_wait`: as for `Client.next_split`; `meetings`: how many the program has been in.
    """

    def __init__(
        self,
        number: int,
        plan: ReadPlan,
        workers: int,
        client: Client,
        on_wait: Callable[[], None],
        meetings: Callable[[], int],
    ) -> None:
        self.left = False
        self._number, self._plan = number, plan
        self._client, self._on_wait, self._meetings = client, on_wait, meetings
        self._mine = self._rest = self._last = 0
        self._pending: list[m.Span] = []
        self._over = True  # until the coordinator says otherwise
        self.planned = plan.epochs * plan.size / workers

    def next_piece(self) -> tuple[int, Places] | None:
        self._over = False  # whatever becomes of the request, the coordinator is told of the end
        leased = self._client.next_split(self._request, self._on_wait)
        if leased is None:
            self._over = True
            self.planned = self._mine
            return None
        positions = range(leased.span.start, leased.span.stop)
        self._rest = len(positions)
        self._mine += len(positions)
        self.planned = self._mine * leased.total / leased.handed
        return leased.span.epoch, positions

    def hand_out(self, epoch: int, positions: Places) -> None:
        assert isinstance(positions, range), "a lease is a stretch of the order"
        self._rest -= len(positions)
        self._last = len(positions)
        start = positions.start
        if self._pending and (self._pending[-1].epoch, self._pending[-1].stop) == (epoch, start):
            start = self._pending.pop().start
        self._pending.append(m.Span(epoch, start, positions.stop))

    def applied(self, visits: Sequence[m.DynamicProgress]) -> None:
        """What was handed out since the step was sent is for the next one."""
        mine = (visit.spans for visit in visits if visit.call == self._number)
        done = sum(span.stop - span.start for spans in mine for span in spans)
        left: list[m.Span] = []
        for span in self._pending:
            skipped = min(done, span.stop - span.start)
            done -= skipped
            if span.start + skipped < span.stop:
                left.append(m.Span(span.epoch, span.start + skipped, span.stop))
        self._pending = left

    def place(self) -> m.StaticProgress | None:
        return None

    def visit(self) -> m.DynamicProgress | None:
        if not self._pending:
            return None
        return m.DynamicProgress(self._number, self._plan.epochs, self._plan.size, tuple(self._pending))

    def finish(self, interrupted: bool, stopped: bool) -> None:
        if not self._over:
            self._over = True
            left = self._rest + (self._last if interrupted and self._pending else 0)
            self._client.tell(m.Finish(self._number, left, stopped))
            self.planned = self._mine - left

    def _request(self, number: int) -> m.Lease:
        plan = self._plan
        pending = sum(span.stop - span.start for span in self._pending)
        return m.Lease(
            number,
            self._number,
            plan.epochs,
            plan.size,
            plan.shuffle,
            plan.seed,
            plan.batch,
            pending,
            self._meetings(),
        )
