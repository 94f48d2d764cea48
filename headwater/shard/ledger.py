"""The ledger: for each member its last step and what became of it, so that a repeat is not applied."""

from __future__ import annotations

from headwater.errors import ProtocolError
from headwater.messages import StepResult


class Ledger:
    """Last step and result by member. Steps are numbered from 1 without gaps."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, StepResult]] = {}

    def is_repeat(self, member: int, step: int) -> bool:
        """Whether `step` was applied already.

        Raises:
            ProtocolError: neither the member's last step nor the one after it.
        """
        last = self._last[member][0] if member in self._last else 0
        if step == last + 1:
            return False
        if step == last and last > 0:
            return True
        raise ProtocolError(f"member {member} sent step {step} after step {last}: expected {last + 1}")

    def record(self, member: int, step: int, result: StepResult) -> None:
        """Note what became of a new step."""
        assert not self.is_repeat(member, step)
        self._last[member] = (step, result)

    def result(self, member: int) -> StepResult:
        """What became of the member's last step."""
        return self._last[member][1]

    def forget(self, member: int) -> None:
        """The member is gone for good."""
        self._last.pop(member, None)
