"""State dicts: a `DistributedOptimizer`'s own, and those of torch's optimizer of the same rule.

Its own have the rule's state by tensor name; torch's have it by the position of a parameter among those that
the optimizer was made with. Everything is checked here, before anything changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headwater.errors import ConfigurationError
from headwater.spec.rules import SGD, Adam, AdamW, Rule
from headwater.spec.schedules import Schedule
from headwater.torch.groups import ParameterGroup, changed_scalars, plain
from headwater.worker.model_spec import named
from headwater.worker.rule_state import STEP

Tensors = dict[str, dict[str, Any]]
"""By tensor name: its count of updates and the rule's states."""

UPDATES, RULE = "updates", "rule"
"""What an own state dict has besides torch's keys."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a state dict says of this optimizer's parameters.

    Attributes:
        tensors: the rule's state, of every tensor that is trained; empty where there is none.
        updates: of the model.
        settings: by group of the optimizer, what its `param_groups` are to have.
    """

    tensors: Tensors
    updates: int
    settings: list[dict[str, Any]]


def to_tensors(state: Mapping[str, Mapping[str, Any]]) -> Tensors:
    """What `Model.state` gives, with tensors for arrays."""
    return {
        name: {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in one.items()
        }
        for name, one in state.items()
    }


def read(
    saved: Any, groups: Sequence[ParameterGroup], tables: Sequence[ParameterGroup], every: Sequence[str]
) -> SavedState:
    """What `saved` says of these groups; `every`: the names of all the module's parameters, in its order.

    Raises:
        ConfigurationError: it does not fit; names what.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = named(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ConfigurationError(f"a state dict has 'state' and 'param_groups', got {got}")
    own = [group for group in saved["param_groups"] if "table" not in group]
    of_tables = [group for group in saved["param_groups"] if "table" in group]
    if of_tables and len(of_tables) != len(tables):
        raise ConfigurationError(f"the state dict has {len(of_tables)} tables, the module has {len(tables)}")
    names = _names(own, groups, every)
    settings = [_settings(*pair) for pair in zip(own, groups, strict=True)]
    settings += [_settings(*pair) for pair in zip(of_tables, tables, strict=False)]
    settings += [{} for _ in tables[len(of_tables) :]]
    if not groups:
        return SavedState({}, 0, settings)
    _check_rule(saved, own, groups[0].rule)
    tensors = _tensors(saved["state"], names, groups)
    most = max((int(one.get(STEP, 0)) for one in tensors.values()), default=0)
    return SavedState(tensors, int(saved.get(UPDATES, most)), settings)


def _names(
    own: Sequence[Mapping[str, Any]], groups: Sequence[ParameterGroup], every: Sequence[str]
) -> dict[Any, str]:
    """Saved position → name of the parameter; only of those that are trained."""
    if len(own) != len(groups):
        raise ConfigurationError(
            f"the state dict has {len(own)} parameter groups, this optimizer has {len(groups)}: make it with "
            f"the same groups"
        )
    trained = [name for group in groups for name in group.names]
    positions = [position for group in own for position in group["params"]]
    names: Sequence[str]
    if all("param_names" in group for group in own):
        names = [name for group in own for name in group["param_names"]]
    elif [len(group["params"]) for group in own] == [len(group.names) for group in groups]:
        names = trained
    elif len(positions) == len(every) and len(own) == 1:
        names = every
    else:
        sizes = [len(group["params"]) for group in own], [len(group.names) for group in groups]
        raise ConfigurationError(
            f"the state dict has groups of {sizes[0]} parameters, this optimizer trains {sizes[1]}: make it "
            f"with the same groups"
        )
    if unknown := [name for name in names if name not in every]:
        raise ConfigurationError(f"the state dict has {named(unknown)}, the module has {named(every)}")
    return {position: name for position, name in zip(positions, names, strict=True) if name in trained}


def _settings(saved: Mapping[str, Any], group: ParameterGroup) -> dict[str, Any]:
    """What the optimizer's group is to have: the rule's settings, and what schedulers keep there.

    A rate that follows a schedule on the servers follows it on: it comes from the count of updates.
    """
    kind = group.rule.name
    if saved.get("maximize"):
        raise ConfigurationError(f"the state dict has maximize=True, which {kind} cannot: negate the loss")
    if missing := [name for name in group.shown if name not in saved]:
        raise ConfigurationError(
            f"the state dict's groups lack {named(missing)}: it is of another optimizer than {kind}"
        )
    scheduled = [name for name, value in group.rule.flat().items() if isinstance(value, Schedule)]
    kept = {name: plain(value) for name, value in saved.items() if name not in (*_TORCHS_OWN, *scheduled)}
    changed = {name: kept[name] for name in group.shown if name in kept and kept[name] != group.shown[name]}
    changed_scalars(group.rule, changed)
    return kept


_TORCHS_OWN = (
    "params",
    "param_names",
    "table",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)
"""What does not concern the rule, or says how torch computes, which is not how a server does."""


def _check_rule(saved: Mapping[str, Any], own: Sequence[Mapping[str, Any]], rule: Rule) -> None:
    if saved.get(RULE, rule.name) != rule.name:
        raise ConfigurationError(f"the state dict is of rule {saved[RULE]}, this optimizer has {rule.name}")
    if isinstance(rule, Adam):
        here = isinstance(rule, AdamW)
        if any(group.get("decoupled_weight_decay", here) != here for group in own):
            got = "Adam" if here else "AdamW"
            raise ConfigurationError(f"the state dict is of {got}, this optimizer has {rule.name}")


def _tensors(state: Mapping[Any, Any], names: Mapping[Any, str], groups: Sequence[ParameterGroup]) -> Tensors:
    """Of every trained tensor its state; those that have none are as before their first update."""
    rules = {name: group.rule for group in groups for name in group.names}
    found: Tensors = {}
    for key, value in state.items():
        name = key if isinstance(key, str) else names.get(key)
        if name is None:
            continue  # of a parameter that is not trained here
        if name not in rules:
            raise ConfigurationError(
                f"the state dict has a state of parameter {name!r}, this optimizer trains {named(rules)}"
            )
        found[name] = _counted(value, rules[name])
    return {name: found.get(name, {STEP: 0}) for name in rules}


def _counted(state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """A tensor's state with its count as a number."""
    counted = {key: value for key, value in state.items() if value is not None}
    step = counted.get(STEP)
    if isinstance(step, torch.Tensor):
        counted[STEP] = step.item()
    elif step is None and isinstance(rule, SGD):
        counted[STEP] = 1 if counted else 0  # torch's SGD does not count: there is a buffer after the first
    return counted
