"""The rules of a model or table as a worker knows them, and what it has asked to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.errors import ConfigurationError
from headwater.messages import RuleSpec, SettingValue
from headwater.spec.declaration import Values, new_settings
from headwater.spec.rules import Rule, from_spec
from headwater.spec.settings import Settings


class RuleSettings:
    """Of the parameter groups of one model, or of one table, which is one group.

    Args:
        what: the owner, for messages.
        specs: of the rules as declared. They are looked up when they are first needed, as an observer's
            process may not have loaded them.
    """

    def __init__(self, what: str, specs: Sequence[RuleSpec]) -> None:
        self._what = what
        self._specs = specs
        self._rules: list[Rule] | None = None
        self._pending: dict[int, dict[str, SettingValue]] = {}

    @property
    def rules(self) -> list[Rule]:
        """By group, with the settings that this worker knows to be in force."""
        if self._rules is None:
            self._rules = [from_spec(spec) for spec in self._specs]
        return self._rules

    def set(self, group: int | None, values: Mapping[str, Any]) -> None:
        """Ask to change settings of one group, or of all; all or nothing.

        Raises:
            ConfigurationError: no such group or setting, an impossible value, one that needs other states.
        """
        rules = self.rules
        if group is not None and (isinstance(group, bool) or group not in range(len(rules))):
            raise ConfigurationError(f"{self._what} has groups 0 to {len(rules) - 1}, got {group!r}")
        changes = {
            one: _settled(rules[one], values) for one in (range(len(rules)) if group is None else [group])
        }
        for one, changed in changes.items():
            self._pending.setdefault(one, {}).update(changed)

    def redeclare(self, specs: Sequence[RuleSpec]) -> None:
        """Ask for the settings of these rules, of the same kinds, instead of what was asked for before.

        Raises:
            RegistrationError: one of them needs other states.
        """
        changes = new_settings(self._what, self.rules, specs)
        self._pending = {group: _travelling(values) for group, values in changes.items()}

    def take(self) -> list[tuple[int, dict[str, SettingValue]]]:
        """What was asked for, once, by group; −1 for all groups where it is the same for all."""
        pending, self._pending = list(self._pending.items()), {}
        for group, values in pending:
            self.rules[group] = self.rules[group].with_settings(**values)
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
