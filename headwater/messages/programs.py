"""Where a rank's program is: its meetings, its loops over epochs, and what it keeps."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from headwater.messages.reading import Position, Recut

MeetingKind: TypeAlias = Literal["barrier", "sum", "gather", "broadcast", "operate", "measure"]
Attendance: TypeAlias = Literal["present", "all"]


class Meeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The place of a meeting in a program. Workers meet only where their places are equal.

    `number` counts the meetings of a program from 1; a rank that runs its program again counts the same way.
    `kind`: of "operate" and "measure" the servers work on vectors, which only "operate" changes.
    `names`: of what is added up or gathered; what is done to vectors. `of`: who must be there before it ends:
    everybody who is present, or every declared worker besides. `root`: the rank that broadcasts, otherwise
    -1. `epoch`: of the loop over `worker.epochs` that was entered last, -1 before the first.
    """

    number: int
    kind: MeetingKind
    names: tuple[str, ...] = ()
    of: Attendance = "present"
    root: int = -1
    epoch: int = -1


class MeetingResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a meeting of `ranks` came to. `data`: of a gather each rank's bytes, of a broadcast the root's.

    `totals`: of the reductions of its work on vectors, whose note is `data` where it asked for that.
    `failure`: why the servers did not do that work; "" where they did.
    """

    meeting: Meeting
    ranks: tuple[int, ...]
    sums: dict[str, float] = {}
    data: tuple[bytes, ...] = ()
    totals: tuple[float, ...] = ()
    failure: str = ""


class KeptRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all ranks keep, by rank, and results of meetings that a rank may ask for again, by number.

    Each result is a `MeetingResult` as MessagePack.
    """

    kept: tuple[tuple[int, bytes], ...] = ()
    results: tuple[tuple[int, bytes], ...] = ()


class Recalled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the log knows of a worker's rank when it joins.

    `position`: None where the rank recorded none. `steps`: of all its incarnations. `met`: meetings that have
    ended so far. `restarted`: it is not the first incarnation of its rank. `kept`: "" for nothing. `recuts`:
    as in `DataProgress`.
    """

    position: Position | None
    steps: int
    met: int
    restarted: bool
    kept: bytes = b""
    recuts: tuple[Recut, ...] = ()
