"""A worker's data: its calls of `batches` and `splits`, and where it is in each.

Calls are numbered in the order in which they are begun, so that they are the same calls in every worker and
after a restart. What is handed out counts as done with the next step that is applied; the step carries it
(`Position`), and the log records it.

Invariants:
- A call is over when its data are at an end, when `stop` or `close` said so, or when the program went on
  without it: it left the loop, and then took a step, met the others or began another call. An exception is
  none of these, so the worker that comes next continues the call.
- Nothing is sent from a finaliser. A reading that is collected, in whichever thread and in the middle of
  whichever exchange, sets a flag; the worker's next call draws the consequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from headwater import messages as m
from headwater.data import fetch
from headwater.errors import DeadlockError
from headwater.loggers import logger
from headwater.machines.splits import Indices, Order, Places
from headwater.runtime.client import Client
from headwater.worker.parts import Call, LeasedSplits, StaticPart, batches_an_epoch
from headwater.worker.plan import ReadPlan
from headwater.worker.program import Program
from headwater.worker.stream_part import StreamPart, StreamPlan

_log = logger("headwater.worker")

Item = TypeVar("Item")


class DataReader:
    """What one worker reads.

    Args:
        recorded: where the log recorded its rank; None where it did not.
        recuts: how static parts were cut anew for another number of workers.

    Attributes:
        begun: calls that the program has begun, those of before that it skipped among them.
        samples: how many it has read.
        stopped: whether `batches` end now, because somebody asked for it.
    """

    def __init__(
        self,
        session: Client,
        program: Program,
        recorded: m.Position | None,
        recuts: Sequence[m.Recut] = (),
    ) -> None:
        self.samples = 0
        self.stopped = False
        self.begun = 0
        self._session = session
        self._program = program
        self._rank = session.welcome.member.index
        self._recuts = recuts
        recorded = recorded or m.Position(self._rank, 0)
        self._over = recorded.over
        self._recorded = {place.call: place for place in recorded.places}  # of calls not begun again yet
        self._recorded_streams = {one.call: one for one in recorded.streams}
        self._applied, self._applied_streams = recorded.places, recorded.streams
        self._open: dict[int, Call] = {}
        self._planned = 0.0

    @property
    def planned(self) -> int:
        """Samples that the calls begun so far have for this worker; an estimate for dynamic splits."""
        return round(self._planned + sum(call.planned for call in self._open.values()))

    def batches(self, plan: ReadPlan, dataset: Any) -> Batches:
        """Batch by batch; a step that is taken before the next one is asked for makes it done."""
        return Batches(self, plan, dataset)

    def events(self, plan: StreamPlan) -> StreamBatches:
        """Events of a stream, batch by batch; a step that is taken before the next one makes it done."""
        return StreamBatches(self, plan)

    def splits(self, plan: ReadPlan) -> Splits:
        """Split by split; one is done with the step after the next one was asked for."""
        return Splits(self, plan)

    # ── calls ───────────────────────────────────────────────────────────────────────────────────

    def begin_reading(self) -> tuple[int, float]:
        """What `end_reading` takes: moment and seconds in exchanges, before the next piece is looked for."""
        self._session.stages.begin(self._session.waiting)
        return self._session.stages.now(), self._session.waiting

    def end_reading(self, began: int, waited: float) -> None:
        """The next piece is there, or there is none."""
        self._session.stages.read(began, self._session.waiting - waited)

    def begin(self, plan: ReadPlan | StreamPlan) -> Call | None:
        """Begin the next call; None where the log has recorded that it is over."""
        self._check_dismissed()
        self.settle()
        number = self.begun
        self.begun += 1
        self.stopped = False
        if number < self._over:
            _log.info("call %d of batches is over, as the log recorded it", number)
            return None
        call = self._open[number] = self._make(number, plan)
        return call

    def _make(self, number: int, plan: ReadPlan | StreamPlan) -> Call:
        place = self._recorded.pop(number, None)
        if isinstance(plan, StreamPlan):
            recorded = self._recorded_streams.pop(number, None)
            return StreamPart(number, plan, self._rank, self.workers, recorded)
        if plan.splits == "static":
            recuts = [cut for cut in self._recuts if cut.call == number]
            return StaticPart(number, plan, self._rank, self.workers, place, recuts)
        return LeasedSplits(
            number, plan, self.workers, self._session, self._send_end, lambda: self._program.meetings
        )

    @property
    def workers(self) -> int:
        """How many workers the parts of a call are cut for."""
        return self._session.welcome.workers

    @property
    def rank(self) -> int:
        """This worker's."""
        return self._rank

    def end(self, call: Call, *, interrupted: bool) -> None:
        """A call is over: rounds do not wait for this worker until it steps again; blocks for an exchange.

        `interrupted`: its last batch was not done with.
        """
        self._close(call, interrupted)
        if self._session.usable():
            self._send_end()

    def settle(self) -> None:
        """The worker goes on: calls that were left are over with what the log records next. Sends only to the
        coordinator, and does not wait."""
        self._program.settle(self)
        for call in [call for call in self._open.values() if call.left]:
            self._close(call, interrupted=True)

    def _close(self, call: Call, interrupted: bool) -> None:
        for number in [number for number, known in self._open.items() if known is call]:
            del self._open[number]
            if self._session.usable():
                call.finish(interrupted, self.stopped)
            self._planned += call.planned

    def _send_end(self) -> None:
        """Rounds, and whoever may not lead too far, wait for this worker no more until it steps again."""
        position, kept = self.resting(), self._program.unsent()
        self._session.ask(lambda number: m.End(number, position, kept), "end of batches")
        self._program.recorded(kept)

    def holds_split(self) -> bool:
        """Whether others may wait for what this worker has leased."""
        return any(isinstance(call, LeasedSplits) for call in self._open.values())

    def stall(self, why: str) -> None:
        """Have meetings that wait for this worker fail, for it waits for them."""
        position, kept = self.resting(), self._program.unsent()
        self._session.ask(lambda number: m.End(number, position, kept, why), "end of batches")

    def check(self) -> None:
        """Raises SystemExit where this worker was dismissed: its data are not at an end by that."""
        self._check_dismissed()

    def _check_dismissed(self) -> None:
        if self._session.dismissed is not None:
            raise SystemExit(self._session.dismissed)

    # ── where it is ─────────────────────────────────────────────────────────────────────────────

    def position(self) -> m.Position | None:
        """Where the worker is once the step that it now takes is applied; None where it has begun nothing."""
        self._program.settle(self)
        loops = self._program.loops()
        if not self.begun and not loops:
            return None
        places = [*(call.place() for call in self._going().values()), *self._recorded.values()]
        visits = [call.visit() for call in self._open.values()]
        return m.Position(
            self._rank,
            self._first(self._going().keys() | self._recorded.keys() | self._recorded_streams.keys()),
            tuple(place for place in places if place is not None),
            tuple(visit for visit in visits if visit is not None),
            loops,
            (
                *(call.stream() for call in self._going().values() if isinstance(call, StreamPart)),
                *self._recorded_streams.values(),
            ),
        )

    def resting(self, *, leaving: bool = False) -> m.Position | None:
        """Where the worker is apart from what it has in hand, which no step has followed yet.

        `leaving`: calls that were left are not over, for nothing came after them.
        """
        loops = self._program.loops()
        if not self.begun and not loops:
            return None
        going = (self._open if leaving else self._going()).keys() | self._recorded.keys()
        going |= self._recorded_streams.keys()
        places = tuple(place for place in self._applied if place.call in going)
        streams = tuple(stream for stream in self._applied_streams if stream.call in going)
        return m.Position(self._rank, self._first(going), places, (), loops, streams)

    def applied(self, position: m.Position | None) -> None:
        """The step with this position was applied."""
        if position is not None:
            self._applied, self._applied_streams = position.places, position.streams
        visits = () if position is None else position.visits
        for call in self._open.values():
            call.applied(visits)

    def _going(self) -> dict[int, Call]:
        """The open calls that somebody may still read."""
        return {number: call for number, call in self._open.items() if not call.left}

    def _first(self, going: Iterable[int]) -> int:
        """The first call that is not over, where these are not."""
        return min(going, default=max(self.begun, self._over))


class _Reading(Iterator[Item]):
    """One call, piece by piece. It begins with the first item that is asked for.

    Iterated over once more after its end, it is the next call, which reads everything again.
    """

    def __init__(self, reader: DataReader, plan: ReadPlan | StreamPlan) -> None:
        self._call: Call | None = None
        self._over = False
        self._reader = reader
        self._plan = plan
        self._epoch = -1
        self._order: Order | None = None
        self._rest: Places = range(0)

    def __iter__(self) -> Iterator[Item]:
        if self._over:
            self._call, self._over, self._rest = None, False, range(0)
        return self

    def close(self) -> None:
        """End this call here, as if there were no more data for this worker; blocks for an exchange.

        What is left of a static part is read by nobody, also after a restart; what is left of leased splits
        the other workers read. Nothing happens where the call has not begun or is over.
        """
        if self._call is not None and not self._over:
            self._end(interrupted=True)

    def __del__(self) -> None:
        # From any thread, at any moment: the worker's next call sees it.
        if self._call is not None and not self._over:
            self._call.left = True

    def _going(self) -> Call | None:
        """The call, begun if need be; None where it is over."""
        if self._over:
            return None
        self._reader.check()
        if self._call is None:
            self._call = self._reader.begin(self._plan)
            self._over = self._call is None
        return self._call

    def _advance(self, call: Call) -> bool:
        """Go on to the next piece; False at the end, which is told to everybody."""
        try:
            piece = call.next_piece()
        except DeadlockError as error:
            self._reader.stall(str(error))
            raise
        if piece is None:
            self._end(interrupted=False)
            return False
        epoch, self._rest = piece
        if self._order is None or epoch != self._epoch:
            plan = self._plan
            assert isinstance(plan, ReadPlan)
            self._order = Order(plan.size, plan.groups, shuffle=plan.shuffle, seed=plan.seed, epoch=epoch)
            self._epoch = epoch
        return True

    def _end(self, *, interrupted: bool) -> None:
        assert self._call is not None
        self._over = True
        self._reader.end(self._call, interrupted=interrupted)

    def _indices(self, positions: Places) -> Indices:
        assert self._order is not None
        return self._order.at(positions)


class Batches(_Reading[Any]):
    """This worker's batches of one call: what `worker.batches` returns. An iterator.

    `len` is the number of batches that a static part has, in all its epochs, whatever was read of them before
    a restart; with dynamic splits nobody knows it, and `len` raises TypeError.
    """

    _plan: ReadPlan

    def __init__(self, reader: DataReader, plan: ReadPlan, dataset: Any) -> None:
        super().__init__(reader, plan)
        self._dataset = dataset
        self._handed_out = 0

    def __next__(self) -> Any:
        began, waited = self._reader.begin_reading()
        try:
            return self._next()
        finally:
            self._reader.end_reading(began, waited)

    def _next(self) -> Any:
        call = self._going()
        if call is None:
            raise StopIteration
        self._reader.samples += self._handed_out
        self._handed_out = 0
        if self._reader.stopped:
            self._end(interrupted=False)
            raise StopIteration
        batch = self._next_batch(call)
        if batch is None:
            raise StopIteration
        found = fetch(self._dataset, self._indices(batch))  # where it fails, the batch is still to be read
        self._take(call, batch)
        self._handed_out = len(batch)
        return found

    def _next_batch(self, call: Call) -> Places | None:
        while True:
            batch = self._rest[: self._plan.batch]
            if len(batch) == self._plan.batch or (len(batch) and not self._plan.drop_last):
                return batch
            if len(batch):
                self._take(call, batch)
            elif not self._advance(call):
                return None

    def _take(self, call: Call, batch: Places) -> None:
        call.hand_out(self._epoch, batch)
        self._rest = self._rest[len(batch) :]

    def __len__(self) -> int:
        if self._plan.splits == "dynamic":
            raise TypeError(
                "nobody knows how many batches this worker gets of splits that workers lease on demand: "
                "pass splits='static', or count by worker.steps"
            )
        reader = self._reader
        return self._plan.epochs * batches_an_epoch(self._plan, reader.rank, reader.workers)


class StreamBatches(_Reading[dict[str, NDArray[Any]]]):
    """This worker's batches of a stream's events: what `worker.batches` returns for one. An iterator.

    Field → an array with one value an event. An endless stream ends with `stop` and `close` only.
    """

    _plan: StreamPlan

    def __init__(self, reader: DataReader, plan: StreamPlan) -> None:
        super().__init__(reader, plan)
        self._handed_out = 0

    def __next__(self) -> dict[str, NDArray[Any]]:
        began, waited = self._reader.begin_reading()
        try:
            return self._next()
        finally:
            self._reader.end_reading(began, waited)

    def _next(self) -> dict[str, NDArray[Any]]:
        call = self._going()
        if call is None:
            raise StopIteration
        assert isinstance(call, StreamPart)
        self._reader.samples += self._handed_out
        self._handed_out = 0
        batch = None if self._reader.stopped else call.next_batch(self._reader.check)
        if batch is None:
            self._end(interrupted=False)
            raise StopIteration
        self._handed_out = len(next(iter(batch.values())))
        return batch


class Splits(_Reading[Indices]):
    """What this worker is to read, split by split: what `worker.splits` returns. An iterator."""

    def __init__(self, reader: DataReader, plan: ReadPlan) -> None:
        super().__init__(reader, plan)
        self._given: Places | None = None

    def __next__(self) -> Indices:
        began, waited = self._reader.begin_reading()
        try:
            return self._next()
        finally:
            self._reader.end_reading(began, waited)

    def _next(self) -> Indices:
        call = self._going()
        if call is None:
            raise StopIteration
        if self._given is not None:
            call.hand_out(self._epoch, self._given)
            self._reader.samples += len(self._given)
            self._given = None
        if self._reader.stopped:
            self._end(interrupted=False)
            raise StopIteration
        while not len(self._rest):
            if not self._advance(call):
                raise StopIteration
        self._given, self._rest = self._rest, range(0)
        return self._indices(self._given)
