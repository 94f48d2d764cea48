"""Meetings: when those who wait in one have all come, and when they never will.

Pure. A meeting is named by its place in the program (`Meeting`). Invariants:
- It ends when every worker present waits in it, nobody is active, and those are there whom it needs besides.
- Workers at two places never pair: once everybody waits, all of them fail with a text that names every rank
  and its place.
- A meeting that needs a rank which has finished fails at once; for one that died it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.log.pending import MEETING, PendingExchange
from headwater.log.state import LogState
from headwater.messages import Meeting
from headwater.spec.words import numbered


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of workers that all wait, at least one of them in a meeting.

    Attributes:
        number: of the meeting that all are in and that ends now; 0: none does.
        failure: why none of the meetings can ever end; "" where that is not so.
        absent: ranks that the meeting waits for, which nobody has now.
    """

    number: int = 0
    failure: str = ""
    absent: tuple[int, ...] = ()

    @property
    def ends(self) -> bool:
        """Whether all are in one meeting that ends now."""
        return self.number > 0


NOT_YET = Verdict()


def judge(workers: Sequence[PendingExchange], log: LogState) -> Verdict:
    """What becomes of these workers, who are all that are present, all wait and are in rank order."""
    places = [place for worker in workers if (place := meeting_of(worker)) is not None]
    if len(places) < len(workers):
        return NOT_YET
    first = places[0]
    if any(place != first for place in places):
        return Verdict(
            failure="everybody waits for each other, at different places of their programs: " + _told(workers)
        )
    missing = missing_from(first, workers, log)
    if finished := sorted(missing & log.finished):
        who = f"{numbered('worker', finished)}, which {'has' if len(finished) == 1 else 'have'}"
        return Verdict(failure=f"{describe(first)} needs {who} finished: {_told(workers)}")
    return Verdict(absent=tuple(sorted(missing))) if missing else Verdict(first.number)


def missing_from(meeting: Meeting, workers: Sequence[PendingExchange], log: LogState) -> set[int]:
    """Ranks that the meeting needs and that none of the workers present has."""
    needed = set(range(log.workers)) if meeting.of == "all" else set()
    if meeting.root >= 0:
        needed.add(meeting.root)
    return needed - {worker.rank for worker in workers}


def meeting_of(exchange: PendingExchange) -> Meeting | None:
    """The place of the meeting that a worker waits in; None where it waits for something else."""
    return exchange.held.meeting if exchange.stage is MEETING and exchange.held is not None else None


def describe(meeting: Meeting) -> str:
    """A meeting in words, such as "sum of loss, right (meeting 7, epoch 3)"."""
    text: str = meeting.kind
    if meeting.names:
        text += f" of {', '.join(meeting.names)}"
    if meeting.root >= 0:
        text += f" from worker {meeting.root}"
    if meeting.of == "all":
        text += " of all workers"
    where = f"meeting {meeting.number}"
    if meeting.epoch >= 0:
        where += f", epoch {meeting.epoch}"
    return f"{text} ({where})"


def _told(workers: Sequence[PendingExchange]) -> str:
    return "; ".join(f"worker {worker.rank} waits in {worker.what}" for worker in workers)
