"""Portions of an evaluation: who computes which, and which results count.

A state machine without I/O; follows from the log's entries alone. Invariants:
- The first result of a portion counts, and no other; one of an evaluation that is over counts for nothing.
- What a member that is gone was computing goes back, and is handed out before anything else.
- Whoever asks computes nothing any more: what it did not finish goes back too.
"""

from __future__ import annotations

from headwater.messages import Portion, PortionPlan, PortionResult, PortionsRecord

NONE = PortionsRecord()


class Portions:
    """Of the evaluation that was opened last.

    Attributes:
        over: whoever asks for evaluations is gone: there is none to come.
    """

    def __init__(self, record: PortionsRecord = NONE) -> None:
        self.round, self.count, self.model = record.round, record.count, record.model
        self.source = (record.source, record.number)
        self.over = record.over
        self._backup = record.backup
        self._losses = dict(record.finished)
        self._held = {index: list(members) for index, members in record.held}

    def open(self, source: tuple[int, int], plan: PortionPlan, model: int) -> None:
        """Exchange `source`, member and number, asks for an evaluation."""
        self.source, self.model = source, model
        self.round += 1
        self.count, self._backup = plan.count, plan.backup
        self._losses, self._held = {}, {}
        self.over = False

    @property
    def complete(self) -> bool:
        """Whether all portions are counted."""
        return len(self._losses) == self.count

    @property
    def total(self) -> float:
        """The sum of all losses, in the order of portions."""
        return sum(self._losses[index] for index in range(self.count))

    def counts(self, done: PortionResult) -> bool:
        """Whether this result is the first of its portion."""
        portion = done.portion
        return (
            portion.round == self.round
            and 0 <= portion.index < self.count
            and portion.index not in self._losses
        )

    def add(self, done: PortionResult) -> None:
        """It counts."""
        self._losses[done.portion.index] = done.loss
        self._held.pop(done.portion.index, None)

    def next_for(self, member: int) -> Portion | None:
        """What a member that computes nothing should compute; None where there is nothing for it now.

        What nobody computes comes first, then a copy of what the fewest others do.
        """
        open_ones = [index for index in range(self.count) if index not in self._losses]
        free = [index for index in open_ones if not self._others(index, member)]
        if not free and self._backup:
            free = sorted(open_ones, key=lambda index: len(self._others(index, member)))
        return Portion(self.round, free[0], self.count, self.model) if free else None

    def hand(self, member: int, portion: Portion) -> None:
        """The member computes it from now on."""
        self.release(member)
        self._held.setdefault(portion.index, []).append(member)

    def release(self, member: int) -> None:
        """It computes nothing any more."""
        for members in self._held.values():
            if member in members:
                members.remove(member)

    def holders(self) -> dict[int, list[int]]:
        """Portions that are not counted, with the members who compute them."""
        return {index: members for index, members in self._held.items() if members}

    def gone(self, member: int) -> None:
        """The member is gone for good."""
        self.release(member)
        if member == self.source[0]:
            self.over, self.count, self._losses, self._held = True, 0, {}, {}

    def _others(self, index: int, member: int) -> list[int]:
        return [other for other in self._held.get(index, ()) if other != member]

    def record(self) -> PortionsRecord:
        """All of it; `Portions(record)` is equal to this."""
        return PortionsRecord(
            self.round,
            self.count,
            self.model,
            self._backup,
            *self.source,
            tuple(sorted(self._losses.items())),
            tuple((index, tuple(self._held[index])) for index in sorted(self._held)),
            self.over,
        )
