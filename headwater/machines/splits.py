"""Who reads which part of a data set: parts that are fixed beforehand, and splits leased on demand.

State machines without I/O, clock or randomness. An epoch's order is a function of (length, groups, seed,
epoch), a part of (length, rank, workers), a split of the order in which leases are asked for.

Invariants of the lease book:
- What is handed out of an epoch, free, or done adds up to the epoch; no sample is leased twice at a time.
- What a worker was leased is its own until the worker says that steps with it are committed, or that
  its call is over. When it is gone, what the log did not record of it is free again.
- Epochs are leased in order: a later one only where nothing of the earlier ones is free.
- Nobody waits for a worker that waits itself, so somebody always goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ConfigurationError, ProtocolError
from headwater.log.positions import Ranges, VisitedCall
from headwater.messages import (
    DataProgress,
    Finish,
    InMeeting,
    Lease,
    Leased,
    Recut,
    Refused,
    Span,
    Unleased,
    Unvisited,
)

Indices: TypeAlias = NDArray[np.int64]
Places: TypeAlias = range | Indices
"""Positions in the order of an epoch, in the order in which they are read."""

Replies: TypeAlias = list[tuple[int, Leased | Unleased]]
"""Member and what it is told."""

SHARE = 8
"""A split is 1/SHARE of what each worker would get of the rest of the epoch.

Splits shrink with the rest (guided self-scheduling, Polychronopoulos and Kuck 1987, who take SHARE = 1), so
a worker that is up to SHARE times slower than the others ends its last large split no later than they end
the rest, and afterwards nobody is late by more than one batch.
"""


# ── the order of an epoch ───────────────────────────────────────────────────────────────────────


class Order:
    """The order in which an epoch visits the samples of a data set, the same on every worker.

    `groups`: how many samples each group of neighbours has that is best read together (a row group of a
    file); None where any order is as good. Groups are shuffled, and the samples within each, but the
    samples of two groups are never mixed.
    """

    def __init__(
        self, length: int, groups: tuple[int, ...] | None, *, shuffle: bool, seed: int, epoch: int
    ) -> None:
        self._shuffle, self._seed, self._epoch = shuffle, seed, epoch
        self._permutation: Indices | None = None
        self._visits: Indices | None = None
        if shuffle and groups is None:
            self._permutation = np.random.default_rng([seed, epoch]).permutation(length)
        elif shuffle and groups is not None:
            sizes = np.asarray(groups, dtype=np.int64)
            self._firsts = np.concatenate([[0], np.cumsum(sizes)])
            self._visits = np.random.default_rng([seed, epoch]).permutation(len(sizes))
            self._begins = np.concatenate([[0], np.cumsum(sizes[self._visits])])

    def at(self, positions: Places) -> Indices:
        """The samples at these positions of the order: int64[len(positions)]."""
        if self._permutation is not None and isinstance(positions, range):
            return self._permutation[positions.start : positions.stop : positions.step]
        wanted = numbered(positions)
        if self._permutation is not None:
            return self._permutation[wanted]
        return wanted if self._visits is None else self._in_groups(self._visits, wanted)

    def _in_groups(self, visits: Indices, wanted: Indices) -> Indices:
        turns = np.searchsorted(self._begins, wanted, side="right") - 1
        indices = np.empty(len(wanted), dtype=np.int64)
        for turn in np.unique(turns).tolist():
            group, here = int(visits[turn]), turns == turn
            first, size = self._firsts[group], self._firsts[group + 1] - self._firsts[group]
            rows = np.random.default_rng([self._seed, self._epoch, group]).permutation(size)
            indices[here] = first + rows[wanted[here] - self._begins[turn]]
        return indices


def part_of(length: int, rank: int, workers: int, *, grouped: bool) -> range:
    """The positions of every epoch's order that are `rank`'s: of all ranks together, each exactly once.

    Every `workers`-th one; where samples are best read in groups, one stretch of them instead.
    """
    if grouped:
        return range(length * rank // workers, length * (rank + 1) // workers)
    return range(rank, length, workers)


def numbered(positions: Places) -> Indices:
    """Positions as int64[len(positions)]."""
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
    return positions


def left_of(length: int, epoch: int, recuts: Iterable[Recut], *, grouped: bool) -> Places:
    """The positions of an epoch's order that were left when parts were cut anew for the last time."""
    left: Places = range(length)
    for recut in recuts:
        parts = []
        for rank, (at, done) in enumerate(recut.done):
            part = part_of(len(left), rank, recut.workers, grouped=grouped)
            parts.append(part[len(part) if at > epoch else done if at == epoch else 0 :])
        if sum(map(len, parts)) < len(left):
            rest = np.sort(np.concatenate([numbered(part) for part in parts]))
            left = numbered(left)[rest]
    return left


def part_of_rest(left: Places, rank: int, workers: int, *, grouped: bool) -> Places:
    """What of these positions is a rank's, as `part_of`."""
    part = part_of(len(left), rank, workers, grouped=grouped)
    return left[part.start : part.stop : part.step]


# ── splits leased on demand ─────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Reader:
    """A worker in a call. `taken`: what it was leased and may not have committed, in order.

    `split`: what it reads now, the last of `taken`, and `leased` the answer that said so. `waiting`: the
    number of its unanswered request; `told`: whether it knows that it waits. `meetings`: that it
    has been in; `meeting`: the last one that it told of, which it may be out of by now.
    """

    rank: int
    batch: int = 1
    taken: list[Span] = field(default_factory=list)
    split: Span | None = None
    leased: Leased | None = None
    waiting: int | None = None
    told: bool = False
    meetings: int = 0
    meeting: InMeeting | None = None

    def is_in_meeting(self, after: int) -> bool:
        """Whether it waits for those who have been in so many meetings so far."""
        return self.meeting is not None and self.meeting.number > after

    def keep_last(self, pending: int) -> None:
        """All that was taken but the last `pending` samples is part of committed steps."""
        kept: list[Span] = []
        for span in reversed(self.taken):
            length = min(pending, span.stop - span.start)
            if length <= 0:
                break
            kept.insert(0, Span(span.epoch, span.stop - length, span.stop))
            pending -= length
        self.taken = kept


class _Call:
    """One call of `batches`, which all workers make: what is free of it and who reads it.

    Attributes:
        total: samples that were not done when the call began.
        free: those that are neither leased nor done now.
    """

    def __init__(self, lease: Lease, visited: VisitedCall) -> None:
        visited.fit(lease.epochs, lease.size)
        self.number = lease.call
        self.plan = _plan(lease)
        self.total = self.free = max(0, lease.size * lease.epochs - visited.done())
        self.readers: dict[int, _Reader] = {}
        self._visited = visited
        self._begun = 0
        self._open: dict[int, Ranges] = {}
        self._closed = False
        self._abandoned = False

    def take(self, reader: _Reader, workers: int) -> Span | None:
        """Lease the next split to `reader`; None where nothing is free."""
        if self._closed or not self.free:
            return None
        while not self._open:
            rest = self._visited.rest(self._begun, 0, self._visited.size)
            if len(rest):
                self._open[self._begun] = rest
            self._begun += 1
        epoch = min(self._open)
        rest = self._open[epoch]
        batches = max(1, len(rest) // (SHARE * workers * reader.batch))
        span = Span(epoch, *rest.take(batches * reader.batch))
        if not len(rest):
            del self._open[epoch]
        self.free -= span.stop - span.start
        reader.taken.append(span)
        reader.split, reader.waiting, reader.told = span, None, False
        return span

    def give_back(self, spans: Iterable[Span]) -> None:
        """These are free again."""
        for span in spans:
            self._open.setdefault(span.epoch, Ranges()).add(span.start, span.stop)
            self.free += span.stop - span.start

    def abandon(self, spans: Iterable[Span]) -> None:
        """A worker is gone without having done these."""
        self.give_back(spans)
        self._abandoned = True

    def close(self) -> None:
        """Nothing of it is leased any more."""
        self._closed = True

    def is_over(self) -> bool:
        """Whether nobody reads it or will be leased more of it."""
        return not self.readers and (self._closed or not self.free)

    def unvisited(self) -> int:
        """Samples that a worker should have read and nobody does."""
        return self.free if self._abandoned and not self.readers and not self._closed else 0


class LeaseBook:
    """Which worker has leased which split, of every call that reads dynamic splits.

    `workers`: how many were declared; `recorded`: what is done already.
    """

    def __init__(self, workers: int, recorded: DataProgress | None = None) -> None:
        self._workers = workers
        self._recorded = recorded or DataProgress()
        self._first = self._recorded.first
        self._calls: dict[int, _Call] = {}
        self._begun: dict[int, int] = {}
        self._lost: list[Unvisited] = []

    def lease(self, member: int, rank: int, lease: Lease) -> Replies:
        """A worker wants its next split. It is told at once whether it gets one, waits, or is done.

        Raises:
            ConfigurationError: it describes the call differently than the others; nothing changed.
            ProtocolError: an impossible request.
        """
        if lease.batch < 1 or lease.size < 1 or lease.epochs < 0:
            raise ProtocolError(f"worker {rank} asks for splits of {lease.size} samples as {lease}")
        self._begun[rank] = max(lease.call, self._begun.get(rank, 0))
        self._forget_old_calls()
        if lease.call < self._first:
            return [(member, Unleased(lease.number, True, f"call {lease.call} of batches is over"))]
        call = self._call(rank, lease)
        reader = call.readers.pop(member, None) or _Reader(rank)
        if reader.leased is not None and reader.leased.number == lease.number:  # the answer was lost
            call.readers[member] = reader
            return [(member, reader.leased)]
        call.readers[member] = reader  # the last of those that wait
        reader.keep_last(lease.pending)
        reader.batch, reader.split, reader.waiting = lease.batch, None, lease.number
        reader.meetings = lease.meetings
        return self._settle()

    def finish(self, member: int, finish: Finish) -> Replies:
        """A worker reads no more of a call, of its own will."""
        call = self._calls.get(finish.call)
        reader = call.readers.pop(member, None) if call is not None else None
        if call is None or reader is None:
            return []
        if finish.stopped:
            call.close()
        elif reader.split is not None and finish.left > 0:
            epoch, start, stop = reader.split.epoch, reader.split.start, reader.split.stop
            call.give_back((Span(epoch, max(start, stop - finish.left), stop),))
        return self._settle()

    def meets(self, member: int, meeting: InMeeting) -> Replies:
        """A worker waits in a meeting, and does not go on with its splits before everybody is there."""
        for call in self._calls.values():
            if (reader := call.readers.get(member)) is not None:
                reader.meeting = meeting
        return self._settle()

    def gone(self, member: int, recorded: DataProgress) -> Replies:
        """A worker died or left: what it was leased and the log did not record goes back."""
        for call in self._calls.values():
            reader = call.readers.pop(member, None)
            if reader is not None:
                call.abandon(_undone(call.number, reader.taken, recorded))
        return self._settle()

    def unvisited(self) -> list[Unvisited]:
        """What is free of calls that workers are gone from and nobody reads any more."""
        left = [Unvisited(number, None, call.unvisited()) for number, call in self._calls.items()]
        return [*self._lost, *(one for one in left if one.samples)]

    # ── what follows ────────────────────────────────────────────────────────────────────────────

    def _call(self, rank: int, lease: Lease) -> _Call:
        call = self._calls.get(lease.call)
        if call is None:
            call = self._calls[lease.call] = _Call(lease, self._visited(lease))
        if call.plan != _plan(lease):
            raise ConfigurationError(
                f"call {lease.call} of batches: worker {rank} reads {_plan(lease)}, others {call.plan}: "
                f"dynamic splits need the same calls in the same order in every worker; pass the same "
                f"data set and arguments, or splits='static'"
            )
        return call

    def _visited(self, lease: Lease) -> VisitedCall:
        for visited in self._recorded.visited:
            if visited.call == lease.call:
                return VisitedCall.of(visited)
        return VisitedCall(lease.call, lease.epochs, lease.size)

    def _settle(self) -> Replies:
        """Answer everybody whose wait is over, one after the other, and tell the others that they wait."""
        replies: Replies = []
        while answered := self._answer_one():
            replies.append(answered)
        for call in self._calls.values():
            for member, reader in call.readers.items():
                if reader.waiting is not None and not reader.told:
                    reader.told = True
                    replies.append((member, Unleased(reader.waiting, False, self._reason(call, member))))
        return replies

    def _answer_one(self) -> tuple[int, Leased | Unleased] | None:
        for call in self._calls.values():
            for member, reader in call.readers.items():
                number = reader.waiting
                if number is None:
                    continue
                span = call.take(reader, max(self._workers, len(call.readers)))
                if span is not None:
                    reader.leased = Leased(number, span, call.total - call.free, call.total)
                    return member, reader.leased
                reading = self._reading(call, member)
                if not reading:
                    del call.readers[member]
                    return member, Unleased(number, True, f"call {call.number} of batches is read")
                if all(other.is_in_meeting(reader.meetings) for other in reading):
                    del call.readers[member]
                    why = f"{self._reason(call, member)}, {_met(reading, reader.rank)}"
                    return member, Unleased(number, True, why, Refused("DeadlockError", why))
        return None

    def _reading(self, call: _Call, member: int) -> list[_Reader]:
        """Who else has a split of the call, and can go on with it."""
        return [
            reader
            for other, reader in call.readers.items()
            if other != member and reader.split is not None and not self._waits(other)
        ]

    def _waits(self, member: int) -> bool:
        readers = [call.readers.get(member) for call in self._calls.values()]
        return any(reader is not None and reader.waiting is not None for reader in readers)

    def _reason(self, call: _Call, member: int) -> str:
        holders = "; ".join(
            f"worker {reader.rank} has samples {reader.split.start}–{reader.split.stop - 1} "
            f"of epoch {reader.split.epoch}"
            for reader in self._reading(call, member)
            if reader.split is not None
        )
        return f"the end of call {call.number} of batches waits for its last splits: {holders}"

    def _forget_old_calls(self) -> None:
        """Those that are read, or of which every declared rank has begun a later one; or there would be
        more and more of them."""
        begun = min(self._begun.values()) if len(self._begun) >= self._workers else 0
        while (call := self._calls.get(self._first)) is not None or self._first < begun:
            if call is not None and not call.is_over() and (call.readers or self._first >= begun):
                return
            if call is not None and call.unvisited():
                self._lost.append(Unvisited(call.number, None, call.unvisited()))
            self._calls.pop(self._first, None)
            self._first += 1


def _met(readers: Iterable[_Reader], rank: int) -> str:
    """Why they do not go on, in words."""
    return "; ".join(
        f"worker {one.rank} waits in {one.meeting.what} for worker {rank}" for one in readers if one.meeting
    )


def _plan(lease: Lease) -> str:
    """What all workers must agree on, in words."""
    order = f"shuffled with seed {lease.seed}" if lease.shuffle else "in order"
    return f"{lease.epochs} × {lease.size} samples {order}"


def _undone(call: int, taken: list[Span], recorded: DataProgress) -> Iterator[Span]:
    """What the log did not record of `taken`."""
    if call < recorded.first:
        return
    visited = next((visited for visited in recorded.visited if visited.call == call), None)
    known = VisitedCall.of(visited) if visited is not None else VisitedCall(call, 0, 0)
    for span in taken:
        for start, stop in known.rest(span.epoch, span.start, span.stop):
            yield Span(span.epoch, start, stop)


def unvisited_parts(recorded: DataProgress, ranks: set[int]) -> list[Unvisited]:
    """What is left of the static parts of ranks that are not among the living `ranks`."""
    lefts = [
        Unvisited(place.call, position.rank, (place.epochs - place.epoch) * place.size - place.done)
        for position in recorded.last
        for place in position.places
        if position.rank not in ranks and place.size >= 0
    ]
    return [left for left in lefts if left.samples > 0]
