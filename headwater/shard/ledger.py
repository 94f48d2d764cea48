"""The ledger: each member's last step and last answer, so that a repeat is answered and not applied."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from headwater.errors import ProtocolError
from headwater.messages import AccountRecord, Answer, StepResult


@dataclass(slots=True, eq=False)
class _Account:
    step: int = 0
    result: StepResult | None = None
    answer: Answer | None = None
    count: int | None = None


class Ledger:
    """By member. Steps are numbered from 1 without gaps, exchanges from 1 upwards."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}

    def is_repeat(self, member: int, step: int) -> bool:
        """Whether `step` was decided already.

        Raises:
            ProtocolError: neither the member's last step nor the one after it.
        """
        account = self._accounts.get(member)
        last = account.step if account is not None else 0
        if step == last + 1:
            return False
        if step == last and last > 0:
            return True
        raise ProtocolError(f"member {member} sent step {step} after step {last}: expected {last + 1}")

    def record(self, member: int, step: int, result: StepResult) -> None:
        """Note what became of a new step."""
        account = self._account(member)
        assert step == account.step + 1, f"member {member}: step {step} after {account.step}"
        account.step, account.result = step, result

    def result(self, member: int) -> StepResult:
        """What became of the member's last step."""
        result = self._accounts[member].result
        assert result is not None
        return result

    def answered(self, member: int, answer: Answer, count: int | None = None) -> None:
        """Note the answer of the member's last exchange; `count` went with it as this server's own."""
        account = self._account(member)
        account.answer, account.count = answer, count

    def last_number(self, member: int) -> int:
        """Of the last exchange that was answered; 0 before the first."""
        account = self._accounts.get(member)
        return account.answer.number if account is not None and account.answer is not None else 0

    def answer(self, member: int) -> Answer:
        """That exchange's answer, without values."""
        answer = self._accounts[member].answer
        assert answer is not None
        return _without_values(answer)

    def count(self, member: int) -> int | None:
        """What went with that answer as this server's own number."""
        return self._accounts[member].count

    def forget(self, member: int) -> None:
        """The member is gone for good."""
        self._accounts.pop(member, None)

    def _account(self, member: int) -> _Account:
        account = self._accounts.get(member)
        if account is None:
            account = self._accounts[member] = _Account()
        return account

    def records(self) -> tuple[AccountRecord, ...]:
        """All of it, by member; `of` is the inverse."""
        return tuple(
            AccountRecord(
                member,
                account.step,
                account.result,
                account.answer and _without_values(account.answer),
                account.count,
            )
            for member, account in sorted(self._accounts.items())
        )

    @classmethod
    def of(cls, records: tuple[AccountRecord, ...]) -> Ledger:
        """The ledger that `records` were made of."""
        ledger = cls()
        for record in records:
            ledger._accounts[record.member] = _Account(
                record.step, record.result, record.answer, record.count
            )
        return ledger


def _without_values(answer: Answer) -> Answer:
    """Nor what programs keep and gather, which is kept elsewhere."""
    large = answer.values or answer.states or answer.counts or answer.rules or answer.data or answer.recalled
    if not large:
        return answer
    return msgspec.structs.replace(answer, values=(), states=(), counts=(), rules=(), data=(), recalled=None)
