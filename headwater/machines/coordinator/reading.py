"""Who reads what, as the coordinator knows it: splits leased on demand, and what the log has recorded.

What the log recorded of everybody's reading is server 0's to say, and takes a question: whatever depends on
it waits here. An answer counts for what waited when the question was asked, never for what came later: the
answer may be older than that. Nor does one count in which a worker that is gone may still take a step.

- The book of leases is opened with what is recorded when the first worker asks: by then a restored server
  knows what is done, and so does one that went on while there was no coordinator.
- A worker that is gone gives back what it was leased and the log has not recorded.
- A newcomer is told where the log recorded its rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headwater.errors import HeadwaterError
from headwater.machines.splits import LeaseBook, Replies, unvisited_parts
from headwater.messages import (
    DataProgress,
    Finish,
    InMeeting,
    Lease,
    Member,
    Position,
    Refused,
    Unleased,
    Unvisited,
)


@dataclass(slots=True)
class _Waiting:
    """What waits for an answer of server 0."""

    requests: list[tuple[Member, Lease | Finish | InMeeting]] = field(default_factory=list)
    gone: list[tuple[Member, bool]] = field(default_factory=list)
    newcomers: list[Member] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.requests or self.gone or self.newcomers)


@dataclass(slots=True)
class Recorded:
    """What follows from an answer: replies to workers, positions of newcomers by id, and samples of static
    parts that nobody reads any more, by the worker that left them."""

    replies: Replies = field(default_factory=list)
    positions: dict[int, Position | None] = field(default_factory=dict)
    unread: dict[int, int] = field(default_factory=dict)


class Reading:
    """Of a cluster that declared so many workers.

    Attributes:
        wanted: whether server 0 is to be asked what the log has recorded.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._book: LeaseBook | None = None
        self._waiting = _Waiting()
        self._asked: _Waiting | None = None

    @property
    def wanted(self) -> bool:
        """Whether something waits for a question that was not asked yet."""
        return self._asked is None and bool(self._waiting)

    def serve(self, worker: Member, message: Lease | Finish | InMeeting) -> Replies:
        """A worker asks for a split, gives one back, or meets; answers whoever is answered by it."""
        if self._book is None:
            self._waiting.requests.append((worker, message))
            return []
        return _served(self._book, worker, message)

    def gone(self, worker: Member, *, died: bool) -> None:
        """A worker died or left: what it was leased goes back once server 0 has said what is recorded."""
        if died or self._book is not None:
            self._waiting.gone.append((worker, died))
        for waiting in (self._waiting, self._asked or _Waiting()):
            waiting.requests = [one for one in waiting.requests if one[0].id != worker.id]

    def newcomer(self, worker: Member) -> None:
        """A worker is to be told where its rank is."""
        self._waiting.newcomers.append(worker)

    def asked(self) -> None:
        """Server 0 was asked just now."""
        self._asked, self._waiting = self._waiting, _Waiting()

    def unanswered(self) -> None:
        """Server 0 did not answer: what waits goes on waiting."""
        asked, self._asked = self._asked or _Waiting(), None
        self._waiting = _Waiting(
            asked.requests + self._waiting.requests,
            asked.gone + self._waiting.gone,
            asked.newcomers + self._waiting.newcomers,
        )

    def answered(self, recorded: DataProgress, ranks: set[int]) -> Recorded:
        """Server 0 has answered; `ranks`: of the living workers."""
        asked, self._asked = self._asked or _Waiting(), None
        follows = Recorded()
        if asked.requests and self._book is None:
            self._book = LeaseBook(self._workers, recorded)
        if self._book is not None:
            for worker, _ in asked.gone:
                follows.replies += self._book.gone(worker.id, recorded)
            for worker, message in asked.requests:
                follows.replies += _served(self._book, worker, message)
            late, self._waiting.requests = self._waiting.requests, []
            for worker, message in late:
                follows.replies += _served(self._book, worker, message)
        last = {position.rank: position for position in recorded.last}
        follows.positions = {one.id: last.get(one.index) for one in asked.newcomers}
        rest = unvisited_parts(recorded, ranks)
        for worker, died in asked.gone:
            samples = sum(one.samples for one in rest if one.rank == worker.index)
            if samples and died:
                follows.unread[worker.index] = samples
        return follows

    def unvisited(self) -> list[Unvisited]:
        """What nobody reads any more of what all should have read together."""
        return self._book.unvisited() if self._book is not None else []


def _served(book: LeaseBook, worker: Member, message: Lease | Finish | InMeeting) -> Replies:
    if isinstance(message, Finish):
        return book.finish(worker.id, message)
    if isinstance(message, InMeeting):
        return book.meets(worker.id, message)
    try:
        return book.lease(worker.id, worker.index, message)
    except HeadwaterError as error:
        refusal = Refused(type(error).__name__, str(error))
        return [(worker.id, Unleased(message.number, True, refusal.reason, refusal))]
