"""torch's parameter groups ↔ a model's groups of tensors and their rules.

A group shows the settings of its rule under torch's names, so that torch's schedulers find `lr`, `betas`
and `momentum`. What somebody changed there travels with the next step, and after each step the group shows
what the servers used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from headwater.errors import ConfigurationError
from headwater.loggers import logger
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.spec.settings import field_types
from headwater.worker.model import Model
from headwater.worker.rule_settings import RuleSettings

_log = logger("headwater.torch")


class ParameterGroup:
    """Tensors, or a table's rows, with one set of settings.

    Args:
        names: of the tensors.
        rule: as the user declared it.
        index: of the group in the model; None where none of its parameters is trained.

    Attributes:
        shown: what torch's group shows, as of the last answer.
    """

    def __init__(self, names: list[str], rule: Rule, index: int | None) -> None:
        self.names = names
        self.rule = rule
        self.index = index
        self.shown = shown(rule)
        self._sent: dict[str, float] = {}
        self._told = False

    def take_changes(self, group: Mapping[str, Any], settings: RuleSettings, what: str) -> dict[str, float]:
        """The settings that somebody changed in torch's `group` since the last answer, to be sent.

        A program that joined a model after its first update, and writes what was in force in that update, has
        changed nothing: a scheduler writes its first rate while it is made, and so it did then.

        Raises:
            ConfigurationError: an impossible value, or one that cannot change while training.
        """
        index = self.index or 0
        settings.withdraw(index, self._sent)
        self._sent = {}
        now = {name: plain(group[name]) for name in self.shown}
        joined = settings.first is not None
        before = self.shown if settings.first is None else shown(settings.first[index])
        changed = {
            name: value for name, value in now.items() if value != self.shown[name] and value != before[name]
        }
        if not changed:
            return {}
        old, sent = self.rule.flat(), changed_scalars(self.rule, changed)
        for name, value in sent.items():
            if joined:
                _log.warning(
                    "%s: %s is %s in force, as training left it, and this program sets %s before its first "
                    "step: should a scheduler have begun anew, keep its state and load it",
                    *(what, name, old[name], value),
                )
        self._sent = sent
        return sent

    def joined(self, settings: RuleSettings) -> None:
        """The model was there before this program declared it: show what is in force."""
        self.rule = settings.rules[self.index or 0]
        self.shown = shown(self.rule, settings.updates)

    def arrived(self, group: dict[str, Any], settings: RuleSettings, what: str) -> None:
        """Show in torch's `group` what is in force as of an answer."""
        rule = settings.rules[self.index or 0]
        before, in_force = self.rule.flat(), rule.flat()
        for name, value in before.items():
            if isinstance(value, Schedule) and not isinstance(in_force[name], Schedule):
                _log.warning(
                    "%s: %s followed the schedule %s on the servers, which %s from param_groups has replaced",
                    *(what, name, value, in_force[name]),
                )
        for name, value in self._sent.items():
            if in_force[name] != value and not self._told:
                self._told = True
                _log.info(
                    "%s: this worker's param_groups have %s=%s, but those of the lowest rank count: "
                    "%s is in force",
                    *(what, name, value, in_force[name]),
                )
        self._sent = {}
        self.rule, self.shown = rule, shown(rule, settings.updates)
        for name, value in self.shown.items():
            group[name] = value


def shown(rule: Rule, updates: int = 0) -> dict[str, Any]:
    """A rule's settings as torch shows them; of a schedule the rate of the last of `updates`."""
    values = {name: getattr(rule, name) for name in field_types(type(rule))}
    at = max(updates - 1, 0)
    return {name: value.at(at) if isinstance(value, Schedule) else value for name, value in values.items()}


def changed_scalars(rule: Rule, changed: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that these settings, under torch's names, change.

    Raises:
        ConfigurationError: an impossible value, or one that cannot change while training.
    """
    old, scalars = rule.flat(), {}
    for name, value in _with(rule, changed).flat().items():
        if value == old[name]:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{rule.name}: {name} cannot change to {value!r} while training")
        scalars[name] = value
    rule.with_settings(**scalars)
    return scalars


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
    made = [ParameterGroup([], rule, 0)]
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ConfigurationError(f"a group must be a dict with 'params' and settings, got {group!r}")
        its_rule = _with(rule, {name: plain(value) for name, value in group.items() if name != "params"})
        its_names = names.take(group["params"])
        index = 1 + sum(bool(other.names) for other in made[1:]) if its_names else None
        made.append(ParameterGroup(its_names, its_rule, index))
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


def plain(value: Any) -> Any:
    """A setting as a rule takes it: torch allows tensors and lists."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def send_settings(model: Model, known: Sequence[ParameterGroup], groups: Sequence[Mapping[str, Any]]) -> None:
    """Have the next step carry what somebody changed in torch's groups of a model."""
    settings = model.local.settings
    for one, group in zip(known, groups, strict=False):
        if one.index is not None:
            changes = one.take_changes(group, settings, _what(model, one.index))
            if changes:
                model.set(group=one.index, **changes)


def show_settings(model: Model, known: Sequence[ParameterGroup], groups: Sequence[dict[str, Any]]) -> None:
    """Have torch's groups of a model show what the servers used."""
    settings = model.local.settings
    for one, group in zip(known, groups, strict=False):
        if one.index is not None:
            settings.first = None
            one.arrived(group, settings, _what(model, one.index))


def _what(model: Model, group: int) -> str:
    """A group, for messages."""
    of = f"group {group} of " if len(model.local.settings.rules) > 1 else ""
    return f"{of}model {model.name!r}"
