"""Where every worker is in its data, as the log records it: what a checkpoint keeps and a restart continues.

A state machine without I/O. Every server records the position that a committed step carries, so all of
them, and a checkpoint at one position of the log, say the same.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import msgspec

from headwater.messages import (
    DataProgress,
    DynamicProgress,
    Position,
    Recut,
    Span,
    StaticProgress,
    StreamProgress,
    Visited,
)


class Ranges:
    """A set of integers as sorted, disjoint, non-adjacent ranges [start, stop)."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        """How many integers are in the set."""
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop)."""
        if start >= stop:
            return
        i, j = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if i < j:
            start, stop = min(start, self._starts[i]), max(stop, self._stops[j - 1])
        self._starts[i:j], self._stops[i:j] = [start], [stop]

    def remove(self, start: int, stop: int) -> None:
        """Remove [start, stop)."""
        i, j = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if start >= stop or i >= j:
            return
        rest = [(self._starts[i], start), (stop, self._stops[j - 1])]
        rest = [(first, last) for first, last in rest if first < last]
        self._starts[i:j], self._stops[i:j] = [first for first, _ in rest], [last for _, last in rest]

    def take(self, most: int) -> tuple[int, int]:
        """Remove the lowest integers, at most `most`, and return them as one range."""
        start, stop = self._starts[0], min(self._stops[0], self._starts[0] + most)
        self.remove(start, stop)
        return start, stop


class Positions:
    """The last position of each rank, and what all of them together did of calls with dynamic splits."""

    def __init__(self, recorded: DataProgress | None = None) -> None:
        recorded = recorded or DataProgress()
        self._last = {position.rank: position for position in recorded.last}
        self._first = recorded.first
        self._visited = {visited.call: VisitedCall.of(visited) for visited in recorded.visited}
        self._workers = recorded.workers
        self._recuts = list(recorded.recuts)

    def record(self, position: Position) -> None:
        """Take what a committed step, or the end of a worker's batches, carried."""
        for visit in position.visits:
            if visit.call >= self._first:
                self._visit(visit)
        before = self._last.get(position.rank)
        self._last[position.rank] = (
            msgspec.structs.replace(position, visits=()) if position.visits else position
        )
        if position.visits or before is None or before.over != position.over:
            self._forget_old_calls()

    def of(self, rank: int) -> Position | None:
        """Where a rank is; None where it never said."""
        return self._last.get(rank)

    def recorded(self) -> DataProgress:
        """Everything, as a message; `Positions(recorded)` is equal to this."""
        return DataProgress(
            tuple(self._last[rank] for rank in sorted(self._last)),
            tuple(self._visited[call].to_message() for call in sorted(self._visited)),
            self._first,
            self._workers,
            tuple(self._recuts),
        )

    @property
    def recuts(self) -> tuple[Recut, ...]:
        """How static parts of calls that are not over were cut anew, the oldest first."""
        return tuple(self._recuts)

    # ── another number of workers ───────────────────────────────────────────────────────────────

    def cut_for(self, workers: int) -> None:
        """Static parts are for so many workers from now on: what is left of every call is cut anew.

        For the beginning of a generation, when nobody has anything in hand. All ranks go on with the first
        call that is not over for all of them, at the place in their programs of the rank that is least far.
        """
        before, self._workers = self._workers, workers
        if before in (0, workers):
            return
        last = [self._last.get(rank) or Position(rank, 0) for rank in range(before)]
        first, begun = min(one.over for one in last), max(_begun(one) for one in last)
        for call in range(first, begun):
            self._recuts.append(Recut(call, before, tuple(_done(one, call) for one in last)))
        least = min(last, key=lambda one: [(loop.loop, loop.epoch) for loop in one.loops])
        epochs = {place.call: place.epochs for one in last for place in one.places}
        places = tuple(
            StaticProgress(cut.call, epochs.get(cut.call, 0), -1, min(epoch for epoch, _ in cut.done), 0)
            for cut in self._recuts[len(self._recuts) - (begun - first) :]
        )
        streams = _streams_of(last)
        self._last = {
            rank: Position(rank, first, places, (), least.loops, streams) for rank in range(workers)
        }
        self._forget_old_calls()

    def _visit(self, visit: DynamicProgress) -> None:
        visited = self._visited.get(visit.call)
        if visited is None:
            visited = self._visited[visit.call] = VisitedCall(visit.call, visit.epochs, visit.size)
        visited.fit(visit.epochs, visit.size)
        visited.add(visit.spans)

    def _forget_old_calls(self) -> None:
        """Or there would be more and more of them. For a rank that has recorded nothing yet none is over."""
        over = min((position.over for position in self._last.values()), default=0)
        if any(rank not in self._last for rank in range(self._workers)):
            over = 0
        while self._first < over or (
            self._first in self._visited and self._visited[self._first].is_complete()
        ):
            self._visited.pop(self._first, None)
            self._first += 1
        self._recuts = [cut for cut in self._recuts if cut.call >= self._first]


_ALL = 1 << 62
"""An epoch after every epoch."""


def _begun(position: Position) -> int:
    """One more than the last call of which a rank has read something."""
    calls = [place.call for place in position.places] + [stream.call for stream in position.streams]
    return max([position.over, *(call + 1 for call in calls)])


def owner_of(partition: str, workers: int) -> int:
    """The rank that reads a partition of a stream."""
    return zlib.crc32(partition.encode()) % workers


def _streams_of(last: list[Position]) -> tuple[StreamProgress, ...]:
    """All offsets, of each partition as the rank has it that reads it; for everybody, as others will."""
    offsets: dict[int, dict[str, str]] = {}
    for position in last:
        for stream in position.streams:
            for partition, offset in stream.offsets:
                if owner_of(partition, len(last)) == position.rank:
                    offsets.setdefault(stream.call, {})[partition] = offset
    return tuple(StreamProgress(call, tuple(sorted(of.items()))) for call, of in sorted(offsets.items()))


def _done(position: Position, call: int) -> tuple[int, int]:
    """The epoch in which a rank is in a call, and how much of its part it has done."""
    if call < position.over:
        return _ALL, 0
    places = [place for place in position.places if place.call == call]
    return (places[0].epoch, places[0].done) if places else (0, 0)


class VisitedCall:
    """What is done of one call with dynamic splits: `epochs` passes over `size` samples."""

    def __init__(self, call: int, epochs: int, size: int, complete: int = 0) -> None:
        self.call, self.epochs, self.size = call, epochs, size
        self._complete = complete
        self._open: dict[int, Ranges] = {}

    @classmethod
    def of(cls, visited: Visited) -> VisitedCall:
        """The inverse of `to_message`."""
        call = cls(visited.call, visited.epochs, visited.size, visited.complete)
        call.add(visited.spans)
        return call

    def to_message(self) -> Visited:
        """As a message."""
        spans = [
            Span(epoch, start, stop) for epoch in sorted(self._open) for start, stop in self._open[epoch]
        ]
        return Visited(self.call, self.epochs, self.size, self._complete, tuple(spans))

    def fit(self, epochs: int, size: int) -> None:
        """The call is made with these now: another size begins the unfinished epochs anew."""
        if size != self.size:
            self._open.clear()
        self.epochs, self.size = epochs, size

    def add(self, spans: Iterable[Span]) -> None:
        """These are done."""
        for span in spans:
            if span.epoch >= self._complete:
                self._open.setdefault(span.epoch, Ranges()).add(span.start, span.stop)
        while self._complete in self._open and len(self._open[self._complete]) == self.size:
            del self._open[self._complete]
            self._complete += 1

    def is_complete(self) -> bool:
        """Whether every sample of every epoch is done."""
        return self._complete >= self.epochs

    def done(self) -> int:
        """Samples that are done, of all epochs."""
        return self._complete * self.size + sum(map(len, self._open.values()))

    def rest(self, epoch: int, start: int, stop: int) -> Ranges:
        """What of [start, stop) of an epoch is not done."""
        rest = Ranges([(start, stop)] if epoch >= self._complete else [])
        for span in self._open.get(epoch, ()):
            rest.remove(*span)
        return rest
