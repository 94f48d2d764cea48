"""torch's parameter groups ↔ a model's groups of tensors and their rules.

A group shows the settings of its rule under torch's names, so that torch's schedulers find `lr`, `betas`
and `momentum`; what somebody changed there is what travels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from headwater.errors import ConfigurationError
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.spec.settings import field_types


@dataclass(slots=True, eq=False)
class ParameterGroup:
    """Tensors with one set of settings.

    `index`: of the group in the model, None where none of its parameters is trained.
    `shown`: what `settings` gave when the servers last heard of it.
    """

    names: list[str]
    rule: Rule
    index: int | None
    shown: dict[str, Any]

    def take_changes(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The scalars that differ in torch's `group` since the last call, to be sent to the servers.

        Raises:
            ConfigurationError: an impossible value, or one that cannot change while training.
        """
        now = {name: _plain(group[name]) for name in self.shown}
        changed = {name: value for name, value in now.items() if value != self.shown[name]}
        if not changed:
            return {}
        old, rule = self.rule.flat(), _with(self.rule, changed)
        scalars: dict[str, float] = {}
        for name, value in rule.flat().items():
            if value != old[name]:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ConfigurationError(f"{rule.name}: {name} cannot change to {value!r} while training")
                scalars[name] = value
        self.rule.with_settings(**scalars)
        self.rule, self.shown = rule, now
        return scalars


def settings(rule: Rule) -> dict[str, Any]:
    """A rule's settings as torch shows them; of a schedule its first rate."""
    values = {name: getattr(rule, name) for name in field_types(type(rule))}
    return {name: value.at(0) if isinstance(value, Schedule) else value for name, value in values.items()}


def make_groups(
    module: torch.nn.Module,
    trained: Mapping[str, torch.nn.Parameter],
    rule: Rule | None,
    groups: Sequence[Mapping[str, Any]],
) -> list[ParameterGroup]:
    """What the user wrote as groups, after one with the rest of the parameters, if there is a rest.

    `groups`: dicts as torch's, with parameters or their names under "params" and settings of `rule`.

    Raises:
        ConfigurationError: not such a dict, an unknown parameter or setting, a parameter in two groups.
    """
    if not isinstance(rule, Rule):
        raise ConfigurationError(f"rule must be a Rule such as hw.SGD(lr=0.1), got {rule!r}")
    names = _Names(module, trained)
    made = [ParameterGroup([], rule, 0, settings(rule))]
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ConfigurationError(f"a group must be a dict with 'params' and settings, got {group!r}")
        its_rule = _with(rule, {name: _plain(value) for name, value in group.items() if name != "params"})
        its_names = names.take(group["params"])
        index = 1 + sum(bool(other.names) for other in made[1:]) if its_names else None
        made.append(ParameterGroup(its_names, its_rule, index, settings(its_rule)))
    made[0].names.extend(names.rest())
    return made if made[0].names else made[1:]


class _Names:
    """Gives out each trained parameter's name once."""

    def __init__(self, module: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter]) -> None:
        self._by_name = dict(module.named_parameters(remove_duplicate=False))
        self._name_of = {parameter: name for name, parameter in trained.items()}
        self._taken: set[str] = set()

    def take(self, params: Any) -> list[str]:
        """The names of parameters given as such or by name; without frozen ones."""
        single = isinstance(params, str | torch.Tensor)
        chosen: Iterable[Any] = [params] if single else params
        taken: list[str] = []
        for one in chosen:
            if isinstance(one, str) and one not in self._by_name:
                raise ConfigurationError(f"a group names {one!r}, the parameters are {list(self._by_name)}")
            parameter = self._by_name[one] if isinstance(one, str) else one
            if not any(parameter is own for own in self._by_name.values()):
                raise ConfigurationError(f"a group has {_described(one)} that is no parameter of the module")
            name = self._name_of.get(parameter)
            if name is None:
                continue
            if name in self._taken:
                raise ConfigurationError(f"parameter {name!r} is in two groups: leave it in one")
            self._taken.add(name)
            taken.append(name)
        return taken

    def rest(self) -> list[str]:
        """Those that were not taken."""
        return [name for name in self._name_of.values() if name not in self._taken]


def _with(rule: Rule, changes: Mapping[str, Any]) -> Rule:
    """The rule with some settings, under torch's names, changed."""
    known = field_types(type(rule))
    if unknown := sorted(changes.keys() - known.keys()):
        raise ConfigurationError(
            f"{rule.name} has no setting {', '.join(map(repr, unknown))}: choose from {', '.join(known)}"
        )
    changed: Rule = dataclasses.replace(cast(Any, rule), **changes)
    return changed


def _plain(value: Any) -> Any:
    """A setting as a rule takes it: torch allows tensors and lists."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
