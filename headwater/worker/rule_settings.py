"""The rules of a model or table as a worker knows them, and what it has asked to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headwater.messages import RulesInForce, RuleSpec, SettingValue
from headwater.spec.amounts import whole
from headwater.spec.declaration import Declaration, Values, fingerprint
from headwater.spec.rules import Rule, from_spec
from headwater.spec.settings import Settings


class RuleSettings:
    """Of the parameter groups of one model, or of one table, which is one group.

    Args:
        what: the owner, for messages.
        specs: of the rules as declared. They are looked up when they are first needed, as an observer's
            process may not have loaded them.

    Attributes:
        updates: how many the owner has had, as the last answer said that had to say it.
        first: the rules at its first update, where this program joined it after that; None otherwise.
        governs: this program says at each step what its settings are, changed or not.
    """

    def __init__(self, what: str, specs: Sequence[RuleSpec]) -> None:
        self.updates = 0
        self.first: list[Rule] | None = None
        self.governs = False
        self._what = what
        self._specs = tuple(specs)
        self._rules: list[Rule] | None = None
        self._fingerprint: int | None = None
        self._pending: dict[int, dict[str, SettingValue]] = {}

    @property
    def rules(self) -> list[Rule]:
        """The rule of each group, with the settings that were in force at the last answer."""
        if self._rules is None:
            self._rules = [from_spec(spec) for spec in self._specs]
        return self._rules

    @property
    def known(self) -> int:
        """The fingerprint of those rules."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._specs)
        return self._fingerprint

    def arrived(self, told: RulesInForce, joined: bool = False) -> None:
        """Take over what an answer says; `joined`: that to the registration."""
        if told.rules != self._specs:
            self._specs, self._rules, self._fingerprint = told.rules, None, None
        self.updates = told.updates
        if joined and told.first:
            self.first = [from_spec(spec) for spec in told.first]

    def set(self, group: int | None, values: Mapping[str, Any]) -> None:
        """Ask to change settings of one group, or of all; all or nothing.

        Raises:
            ConfigurationError: no such group or setting, an impossible value, one that needs other states.
        """
        rules = self.rules
        group = None if group is None else whole(f"{self._what}: group", group, 0, len(rules) - 1)
        changes = {
            one: _settled(rules[one], values) for one in (range(len(rules)) if group is None else [group])
        }
        for one, changed in changes.items():
            self._pending.setdefault(one, {}).update(changed)

    def withdraw(self, group: int, names: Iterable[str]) -> None:
        """Ask for these settings of a group no more."""
        for name in names:
            self._pending.get(group, {}).pop(name, None)

    def redeclare(self, specs: Sequence[RuleSpec]) -> None:
        """Ask for the settings of these rules, of the same kinds, instead of what was asked for before.

        Raises:
            RegistrationError: one of them needs other states.
        """
        changes = Declaration(self._what, specs, self.rules, specs).settings()
        self._pending = {group: _travelling(values) for group, values in changes.items()}

    def take(self) -> list[tuple[int, dict[str, SettingValue]]]:
        """What was asked for, once, by group; −1 for all groups where it is the same for all, or nothing."""
        pending = [(group, values) for group, values in self._pending.items() if values]
        self._pending = {}
        if not pending:
            return [(-1, {})] if self.governs else []
        same = all(values == pending[0][1] for _, values in pending)
        return [(-1, pending[0][1])] if same and len(pending) == len(self.rules) > 1 else pending


def _settled(rule: Rule, values: Mapping[str, Any]) -> dict[str, SettingValue]:
    """Settings that a user passed for a rule, as they travel.

    Raises:
        ConfigurationError: an unknown setting, an impossible value, or one that needs other states.
    """
    changed = rule.with_settings(**values).flat()
    return _travelling({name: changed[name] for name in values})


def _travelling(values: Values) -> dict[str, SettingValue]:
    return {name: value.to_spec() if isinstance(value, Settings) else value for name, value in values.items()}
