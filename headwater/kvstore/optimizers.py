"""Optimizers that a store takes, as rules: by name, or by the settings of torch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headwater.errors import ConfigurationError
from headwater.spec.rules import SGD, Adagrad, Adam, AdamW, Ftrl, Lion, RMSprop, Rule

_BY_NAME: dict[str, type[Rule]] = {
    rule.__name__.lower(): rule for rule in (SGD, Adam, AdamW, Adagrad, RMSprop, Ftrl, Lion)
}
_OF_TORCH = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps", "amsgrad", "lr_decay"}
_OF_TORCH |= {"initial_accumulator_value", "alpha", "centered"}


def rule_of(optimizer: Any, settings: Mapping[str, Any]) -> Rule:
    """The rule that an optimizer stands for. Raises ConfigurationError."""
    if isinstance(optimizer, Rule):
        if settings:
            raise ConfigurationError(f"set_optimizer: {settings} beside a rule: give them to the rule")
        return optimizer
    if isinstance(optimizer, str):
        name, given = optimizer.lower(), dict(settings)
    else:
        name = type(optimizer).__name__.lower()
        defaults = getattr(optimizer, "defaults", None)
        if not isinstance(defaults, Mapping):
            raise ConfigurationError(
                f"set_optimizer: got {optimizer!r}, expected a rule, a name, or an optimizer of torch"
            )
        given = {key: value for key, value in defaults.items() if key in _OF_TORCH}
    if name not in _BY_NAME:
        raise ConfigurationError(
            f"optimizer {name!r} is unknown: expected one of {', '.join(sorted(_BY_NAME))}"
        )
    rule = _BY_NAME[name]
    fields = {field.name for field in dataclasses.fields(rule)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - fields)
    if isinstance(optimizer, str) and unknown:
        raise ConfigurationError(
            f"{rule.__name__} has no setting {unknown[0]!r}, only {', '.join(sorted(fields))}"
        )
    return rule(**{key: value for key, value in given.items() if key in fields})
