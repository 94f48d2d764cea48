"""What a program declares under a name that exists: is it the same, and which settings are new?

Pure. The servers ask it for what workers declare, a worker for what its own program declares again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from headwater.errors import ConfigurationError, RegistrationError
from headwater.messages import ModelSpec, RuleSpec, Scalar, TableSpec, TensorSpec
from headwater.spec.layout import describe
from headwater.spec.rules import Rule, from_spec
from headwater.spec.settings import Settings

Values: TypeAlias = Mapping[str, Scalar | Settings]
"""Settings of a rule by the name they travel under."""


def model_difference(old: ModelSpec, new: ModelSpec, resumed: bool = False) -> str:
    """What keeps `new` from being the model `old`; "" when nothing does.

    A model that was `resumed` from a checkpoint may be clipped otherwise. Settings are no difference.
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
    if old.clip_norm != new.clip_norm and not resumed:
        return (
            f"model {old.name!r} exists with clip_norm={old.clip_norm}, got clip_norm={new.clip_norm}: "
            f"pass the same, or name=… for another model"
        )
    return ""


def table_difference(old: TableSpec, new: TableSpec) -> str:
    """What keeps `new` from being the table `old`; "" when nothing does. Settings are no difference."""
    for field in ("dim", "initializer", "seed", "admission", "expiry"):
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


def new_settings(what: str, rules: Sequence[Rule], declared: Sequence[RuleSpec]) -> dict[int, Values]:
    """By group, the settings in which the `declared` rules differ from those in force, of the same kinds.

    Raises:
        RegistrationError: a setting that cannot change without other states; `what` names the owner.
    """
    changes: dict[int, Values] = {}
    for group, (rule, spec) in enumerate(zip(rules, declared, strict=True)):
        before, after = rule.flat(), from_spec(spec).flat()
        changed = {name: value for name, value in after.items() if value != before[name]}
        if not changed:
            continue
        try:
            rule.with_settings(**changed)
        except ConfigurationError as error:
            raise RegistrationError(
                f"{what} exists with {rule}, got {from_spec(spec)}: {error}, under another name"
            ) from error
        changes[group] = changed
    return changes


def _only(spec: ModelSpec, known: set[TensorSpec]) -> str:
    """What of `spec` is not in `known`."""
    return describe([tensor for tensor in spec.tensors if tensor not in known]) or "nothing more"


def _shown(value: object) -> str:
    settings = getattr(value, "settings", None)
    if settings is None:
        return str(value)
    inside = ", ".join(f"{name}={setting}" for name, setting in settings.items())
    return f"{getattr(value, 'name', '')}({inside})"
