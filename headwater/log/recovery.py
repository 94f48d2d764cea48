"""Recovery: what a new sequencer makes of the servers' answers to its question where they are.

Pure. Invariants:
- A position that any server applied was prepared everywhere, so every server has it; it stands.
- An entry prepared everywhere may have been committed and answered by a server that is lost; it stands. Two
  servers have the same entry at a position if one sequencer wrote it: a server that was not reached by the
  sequencer before this one may still have an entry that the others have discarded for another.
- Any other was applied and answered nowhere: it is discarded everywhere, and closed anew from what all hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.errors import ProtocolError
from headwater.log.state import LogState
from headwater.messages import Recovery


@dataclass(frozen=True, slots=True)
class Found:
    """What the servers have in common.

    Attributes:
        committed: position up to which some server applied entries, so that all may.
        standings: as of the last position that stands, `standings.position`.
    """

    committed: int
    standings: LogState


def find(answers: Sequence[Recovery], term: int) -> Found:
    """Where the log goes on, from one answer of every server.

    Raises:
        ProtocolError: an answer is of another term, a server answered twice or not at all, or one lacks an
            entry that another has applied.
    """
    strange = [answer for answer in answers if answer.term != term]
    if strange or sorted(answer.server for answer in answers) != list(range(len(answers))):
        got = [(answer.server, answer.term) for answer in answers]
        raise ProtocolError(f"recovery in term {term} needs one answer of each server, got {got}")
    ends = {answer.server: answer.standings.position + len(answer.written) for answer in answers}
    most = max(answers, key=lambda answer: answer.standings.position)
    committed = most.standings.position
    behind = [server for server, end in ends.items() if end < committed]
    if behind:
        raise ProtocolError(f"server {most.server} applied entry {committed}, which servers {behind} lack")
    standings = LogState.of(most.standings)
    for entry in most.closed:
        writers = {_writer(answer, entry.position) for answer in answers}
        if len(writers) > 1:
            break
        standings.apply(entry)
    return Found(committed, standings)


def _writer(answer: Recovery, position: int) -> int | None:
    """The term of the sequencer that wrote the entry which a server has at a position; None without one."""
    place = position - answer.standings.position - 1
    return answer.written[place] if place < len(answer.written) else None
