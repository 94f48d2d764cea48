"""Where every worker is in its data, as the log records it: what a checkpoint keeps and a restart continues.

A state machine without I/O. Every server records the position that a committed step carries, so all of
them, and a checkpoint at one position of the log, say the same.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import msgspec

from headwater.messages import DataProgress, DynamicProgress, Position, Span, Visited


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
        )

    def _visit(self, visit: DynamicProgress) -> None:
        visited = self._visited.get(visit.call)
        if visited is None:
            visited = self._visited[visit.call] = VisitedCall(visit.call, visit.epochs, visit.size)
        visited.fit(visit.epochs, visit.size)
        visited.add(visit.spans)

    def _forget_old_calls(self) -> None:
        """Or there would be more and more of them."""
        over = min(position.over for position in self._last.values())
        while self._first < over or (
            self._first in self._visited and self._visited[self._first].is_complete()
        ):
            self._visited.pop(self._first, None)
            self._first += 1


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
