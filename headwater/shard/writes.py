"""What programs wrote to a model by themselves: what all ranks write alike counts once.

Each rank runs the same program, so each of them loads the same file, or clips the same weights. The first
write of a kind at one place of the program is taken. Another rank's at that place must be the same values,
and is then taken already; otherwise it is refused. A place is a gap between two updates of the model, or a
number of steps that the ranks had made.

Invariant: all of it follows from the log, so it is the same on every server and standby.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from headwater.errors import UsageError
from headwater.messages import ProgramWrite, WriteRecord

_KEPT = 16
"""Writes of each kind that are remembered, for ranks that come to the same place later."""


class Writes:
    """To one model; `what` names it in messages."""

    def __init__(self, what: str, records: Iterable[WriteRecord] = ()) -> None:
        self._what = what
        self._records = list(records)

    def admit(self, kind: str, written: ProgramWrite, member: int, updates: int) -> bool:
        """Whether to take what a member wrote when the model had had `updates`; False where it is there.

        Raises:
            UsageError: another rank wrote other values at the same place.
        """
        before = [one for one in self._records if one.kind == kind]
        if not before or before[-1].member != member:
            for one in reversed(before):
                same_place = updates == one.updates or written.step == one.step
                if one.member == member or not same_place:
                    continue
                if one.digest == written.digest:
                    return False
                raise UsageError(
                    f"the ranks disagree about the {kind} of {self._what}: another rank wrote others at this "
                    f"place of the program, and this rank's were not taken: have all ranks write the "
                    f"same, or one of them alone"
                )
        kept = [one for one in self._records if one.kind != kind]
        newest = WriteRecord(kind, written.digest, written.step, member, updates)
        self._records = [*kept, *before[1 - _KEPT :], newest]
        return True

    def counted_anew(self, before: int, updates: int) -> None:
        """The model's count of updates was set: what was written at `before` was written at `updates`."""
        self._records = [
            msgspec.structs.replace(one, updates=updates) if one.updates == before else one
            for one in self._records
        ]

    def records(self) -> tuple[WriteRecord, ...]:
        """All of it."""
        return tuple(self._records)
