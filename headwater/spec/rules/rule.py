"""What a rule is: a small value object that names its states and its scalar function, and gives the scalars.

A rule says what a server does with a gradient.

Invariants:
- A scalar function is plain Python on float32: + − × ÷, `math.sqrt`, `abs`, comparisons and other such
  functions of its module, nothing else. Loops are generated from it (`headwater.kernels`); it is never
  written twice.
- Powers, logarithms and schedules are scalars, computed in float64 once a step and rounded once.
- A message chooses among registered names; nothing that arrives here causes an import.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

from headwater.errors import ConfigurationError
from headwater.messages import RuleSpec
from headwater.spec.registry import Registry
from headwater.spec.schedules import SCHEDULES, Schedule
from headwater.spec.settings import Settings, refuse_unknown, require

Rate = float | Schedule
"""A learning rate: a number, or one that changes with the model's count of updates."""


class Rule(Settings):
    """Base of all rules: a frozen dataclass whose fields are its settings.

    Attributes:
        always_sum: gradients of several workers are added up, never averaged.
        rows_only: for tables only: its one state is one float a row, to which each update adds the mean of
            the row's squared gradients, and its function takes the sum as `(value, gradient, state,
            *scalars) -> value`.
        layerwise: for models only: a tensor's step is multiplied by ‖values‖ / ‖direction‖, over all servers.
            The first of its scalars is the factor of the direction, which is taken away, and the second that
            of the value.
    """

    __slots__ = ()

    registry: ClassVar[Registry[Rule]] = Registry("rule")
    always_sum: ClassVar[bool] = False
    rows_only: ClassVar[bool] = False
    layerwise: ClassVar[bool] = False

    def states(self) -> dict[str, float]:
        """State name → initial value of each element, in the order the function takes them."""
        return {}

    def function(self) -> Callable[..., Any]:
        """The scalar function `(value, gradient, *states, *scalars) -> value` or `(value, *states)`."""
        raise NotImplementedError(f"{self.name}.function: return the rule's scalar function")

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What the function takes after the states, for one update.

        `updates`: updates the model had before this one (from 0; for schedules). `count`: updates the
        tensor or row has had, this one included (from 1; for bias correction).
        """
        return ()

    @property
    def counted(self) -> bool:
        """Whether `scalars` may differ with `count`; a table asks once for all rows where it does not."""
        return True

    @property
    def scheduled(self) -> bool:
        """Whether `scalars` may differ with `updates`; a table keeps them by count where it does not."""
        return True

    def with_settings(self, **values: object) -> Self:
        """A copy with other settings (`lr=…`, `beta1=…`), schedules as such or as specs.

        Raises:
            ConfigurationError: an unknown name, an impossible value, or one that would need other
                states or another function than this rule has.
        """
        revived = {name: _revived(value) for name, value in values.items()}
        changed = self.from_flat({**self.flat(), **revived})
        if changed.states().keys() != self.states().keys() or changed.function() != self.function():
            raise ConfigurationError(
                f"{self.name}: {values} would change which states it has: register the model with such a rule"
            )
        return changed


def from_spec(spec: RuleSpec) -> Rule:
    """The rule that a spec describes, from the rules loaded in this process.

    Raises:
        ConfigurationError: an unknown name, or an unknown, missing, ill-typed or impossible setting.
    """
    rule = Rule.registry.find(spec.name)
    return rule.from_flat({name: _revived(value) for name, value in spec.settings.items()})


def evaluated(rule: Rule, updates: int, count: int) -> tuple[float, ...]:
    """What `rule.scalars` gives, as finite numbers.

    Raises:
        ConfigurationError: it raises, or gives anything else; says for which update.
    """
    try:
        numbers = tuple(float(number) for number in rule.scalars(updates, count))
    except Exception as error:  # a user's method
        raise ConfigurationError(
            f"rule {rule.name}: scalars(updates={updates}, count={count}) raised "
            f"{type(error).__name__}: {error}: it must give numbers for any updates ≥ 0 and count ≥ 1"
        ) from error
    if not all(map(math.isfinite, numbers)):
        raise ConfigurationError(
            f"rule {rule.name}: scalars(updates={updates}, count={count}) gave {numbers}: expected finite "
            f"numbers"
        )
    return numbers


def _revived(value: object) -> object:
    if not isinstance(value, RuleSpec):
        return value
    refuse_unknown("no schedule", [value.name], SCHEDULES)
    return SCHEDULES[value.name].from_flat(value.settings)


def rate_at(lr: Rate, updates: int) -> float:
    """The learning rate of the update after so many."""
    return lr.at(updates) if isinstance(lr, Schedule) else lr


class RatedRule(Rule):
    """A rule whose `scalars` differ with `updates` only where its learning rate is a schedule."""

    __slots__ = ()

    lr: Rate

    @property
    def scheduled(self) -> bool:
        return isinstance(self.lr, Schedule)


def check_lr(rule: Rule, lr: Rate) -> None:
    """Raises ConfigurationError for a negative number."""
    require(isinstance(lr, Schedule) or lr >= 0, rule, "lr", "at least 0, or a schedule")


def check_not_negative(rule: Rule, *settings: str) -> None:
    """Raises ConfigurationError where one of these settings is."""
    for setting in settings:
        require(getattr(rule, setting) >= 0, rule, setting, "at least 0")


def check_betas(rule: Rule, betas: tuple[float, ...]) -> None:
    """Raises ConfigurationError where a decay of an average is not one."""
    require(all(0 <= beta < 1 for beta in betas), rule, "betas", "of at least 0 and below 1")
