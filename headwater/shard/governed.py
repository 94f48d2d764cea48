"""The rules of one model or table, and whose program says what their settings are.

Programs whose framework shows settings that anybody may change (torch's `param_groups`) say at each step what
theirs are, changed or not. Of these the lowest rank that trains governs: its settings count, the others' do
not. A rank whose data has ended, or that has left, trains no more; one that waits in a barrier goes on.
Settings that a program orders explicitly take effect whoever orders them.

Invariant: all of it follows from the log, so it is the same on every server and standby.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from headwater.errors import ConfigurationError
from headwater.log.state import LogState
from headwater.messages import ProgramRecord, RulesInForce, RuleSpec
from headwater.shard.runnable import is_our_own
from headwater.spec.declaration import Declaration, fingerprint
from headwater.spec.rules import Rule, from_spec
from headwater.spec.schedules import Schedule


class GovernedRules:
    """One rule for each parameter group.

    Attributes:
        rules: by group, with the settings in force.
        resumed: they are from a checkpoint, and nobody has declared them since.
        of_users: some are rules of users' own, which may fail where ours cannot.
    """

    def __init__(self, declared: Sequence[RuleSpec]) -> None:
        self.rules: list[Rule] = [from_spec(spec) for spec in declared]
        self.resumed = False
        self.of_users = not all(map(is_our_own, self.rules))
        self._declared = tuple(declared)
        self._first: tuple[RuleSpec, ...] = ()
        self._governor = -1
        self._specs: tuple[RuleSpec, ...] | None = None
        self._fingerprint: int | None = None
        self._scheduled = False

    @property
    def specs(self) -> tuple[RuleSpec, ...]:
        """The rules in force as they travel."""
        if self._specs is None:
            self._specs = tuple(rule.to_spec() for rule in self.rules)
        return self._specs

    def set(self, group: int, values: Mapping[str, object]) -> None:
        """Change settings of one group (-1: all); what they cannot be with those in force by now stays."""
        for i in range(len(self.rules)) if group < 0 else (group,):
            with contextlib.suppress(ConfigurationError):
                self.rules[i] = self.rules[i].with_settings(**values)
        self._specs = self._fingerprint = None

    def begin(self) -> None:
        """An update is about to be applied; those of the first are what a restarted program begins with."""
        if not self._first:
            self._first = self.specs

    # ── whose settings count ────────────────────────────────────────────────────────────────────

    def claim(self, member: int, standings: LogState) -> None:
        """A member's program says what its settings are; it governs if its rank is the lowest that trains."""
        governor = standings.members.get(self._governor)
        trains = governor is not None and not governor.over and governor.phase in ("active", "meeting")
        if governor is None or not trains or standings.standing(member).rank <= governor.rank:
            self._governor = member

    def obeys(self, member: int, governs: bool) -> bool:
        """Whether settings that this member sent take effect."""
        return not governs or member == self._governor

    # ── what is declared and told ───────────────────────────────────────────────────────────────

    def declare(self, what: str, declared: Sequence[RuleSpec]) -> str:
        """A member declares the owner with these rules, of the same kinds; what a person should know, or "".

        Settings in force stay, but for the first declaration after a resume: what that declares differently
        than the checkpoint's program did is in force from now on.

        Raises:
            RegistrationError: a new setting needs other states; `what` names the owner. Nothing changed.
        """
        declaration = Declaration(what, self._declared, self.rules, declared)
        if not self.resumed:
            return declaration.told()
        changes = declaration.changes()
        told = declaration.told(changes)
        self.resumed, self._declared = False, tuple(declared)
        for group, values in changes.items():
            self.set(group, values)
        return told

    def differ(self, known: int) -> bool:
        """Whether a member that knows rules of this fingerprint should be told those in force.

        It is always told of schedules, for these go on by themselves.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.specs)
            values = (value for rule in self.rules for value in rule.flat().values())
            self._scheduled = any(isinstance(value, Schedule) for value in values)
        return known != self._fingerprint or self._scheduled

    def in_force(
        self, updates: int, *, model: int = -1, table: int = -1, joins: bool = False
    ) -> RulesInForce:
        """What a member is told; `joins`: in answer to its registration."""
        return RulesInForce(model, table, self.specs, updates, self._first if joins else ())

    # ── as plain structs ────────────────────────────────────────────────────────────────────────

    def record(self) -> ProgramRecord:
        """All of it but the rules; `restore` is the inverse."""
        return ProgramRecord(self._first, self._governor, self.resumed)

    def restore(self, rules: Sequence[RuleSpec], record: ProgramRecord) -> None:
        """Go on with these rules in force."""
        self.rules = [from_spec(spec) for spec in rules]
        self._specs = self._fingerprint = None
        self._first, self._governor, self.resumed = record.first, record.governor, record.resumed
