"""What a program declares under a name that exists: is it the same, and which settings are new?

Pure. The servers ask it for what workers declare, a worker for what its own program declares again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from headwater.errors import ConfigurationError, RegistrationError
from headwater.messages import ModelSpec, RuleSpec, Scalar, TableSpec, TensorSpec
from headwater.spec.layout import describe
from headwater.spec.rules import Rule, from_spec
from headwater.spec.settings import Settings

Values: TypeAlias = Mapping[str, Scalar | Settings]
"""Settings of a rule by the name they travel under."""


def model_difference(old: ModelSpec, new: ModelSpec, resumed: bool = False) -> str:
    """What keeps `new` from being the model `old`; "" when nothing does.

    A model that was `resumed` from a checkpoint may be clipped, merged or represented otherwise. Settings are
    no difference.
    """
    here, there = set(old.tensors), set(new.tensors)
    if here != there:
        return (
            f"model {old.name!r} exists with other tensors ({_only(old, there)}), got ({_only(new, here)}): "
            f"declare the same ones, or pass name=… for another model"
        )
    kinds = [rule.name for rule in old.rules], [rule.name for rule in new.rules]
    if kinds[0] != kinds[1]:
        return (
            f"model {old.name!r} exists with rule {kinds[0]}, got {kinds[1]}: "
            f"pass the same, or name=… for another model"
        )
    for field in ("clip_norm", "merge", "codec", "values_codec", "outer"):
        before, after = getattr(old, field), getattr(new, field)
        if before != after and not resumed:
            return (
                f"model {old.name!r} exists with {field}={before!r}, got {field}={after!r}: "
                f"pass the same, or name=… for another model"
            )
    return ""


def table_difference(old: TableSpec, new: TableSpec) -> str:
    """What keeps `new` from being the table `old`; "" when nothing does. Settings are no difference."""
    for field in ("dim", "initializer", "seed", "admission", "expiry", "codec"):
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            return (
                f"table {old.name!r} exists with {field} {_shown(before)}, got {field} {_shown(after)}: "
                f"pass the same, or another name for another table"
            )
    if old.rule.name != new.rule.name:
        return (
            f"table {old.name!r} exists with rule {old.rule.name}, got {new.rule.name}: "
            f"pass the same, or another name for another table"
        )
    return ""


class Declaration:
    """Rules that a program declares for a model or table that exists, of the same kinds.

    Args:
        what: the owner, for messages.
        before: the rules as they were declared before, by group.
        rules: those in force.
        declared: those that are declared now.
    """

    def __init__(
        self, what: str, before: Sequence[RuleSpec], rules: Sequence[Rule], declared: Sequence[RuleSpec]
    ) -> None:
        self._what = what
        self._before = [from_spec(spec).flat() for spec in before]
        self._rules = rules
        self._declared = [from_spec(spec) for spec in declared]

    def settings(self) -> dict[int, Values]:
        """By group, the settings in which what is declared differs from what is in force.

        Raises:
            RegistrationError: one that cannot change without other states.
        """
        return self._possible({group: self._differing(group) for group in range(len(self._rules))})

    def changes(self) -> dict[int, Values]:
        """By group, those of `settings` that were declared otherwise before.

        Raises:
            RegistrationError: one that cannot change without other states.
        """
        return self._possible(
            {
                group: {
                    name: value
                    for name, value in self._differing(group).items()
                    if value != self._before[group][name]
                }
                for group in range(len(self._rules))
            }
        )

    def told(self, changes: Mapping[int, Values] = MappingProxyType({})) -> str:
        """What a person should know of it, where `changes` take effect and nothing else; or ""."""
        lines = []
        for group, rule in enumerate(self._rules):
            of = f" of group {group}" if len(self._rules) > 1 else ""
            for name, value in self._differing(group).items():
                now = rule.flat()[name]
                if name in changes.get(group, {}):
                    lines.append(
                        f"{name}{of} was {now} and is {value} from now on, as the program declares it"
                    )
                else:
                    lines.append(f"{name}{of} is {now} and stays so, this program declares {value}")
        return "; ".join(lines)

    def _differing(self, group: int) -> Values:
        now = self._rules[group].flat()
        return {name: value for name, value in self._declared[group].flat().items() if value != now[name]}

    def _possible(self, changes: dict[int, Values]) -> dict[int, Values]:
        for group, values in changes.items():
            rule = self._rules[group]
            try:
                rule.with_settings(**values)
            except ConfigurationError as error:
                raise RegistrationError(
                    f"{self._what} exists with {rule}, got {self._declared[group]}: {error}, or pass another "
                    f"name"
                ) from error
        return {group: values for group, values in changes.items() if values}


def fingerprint(rules: Sequence[RuleSpec]) -> int:
    """A short sum of rules with their settings; equal rules have equal ones."""
    return zlib.crc32(msgspec.msgpack.encode(rules))


def _only(spec: ModelSpec, known: set[TensorSpec]) -> str:
    """What of `spec` is not in `known`."""
    return describe([tensor for tensor in spec.tensors if tensor not in known]) or "nothing more"


def _shown(value: object) -> str:
    settings = getattr(value, "settings", None)
    if settings is None:
        return str(value)
    inside = ", ".join(f"{name}={setting}" for name, setting in settings.items())
    return f"{getattr(value, 'name', '')}({inside})"
