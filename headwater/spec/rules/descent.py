"""Rules that follow the gradient as it is, or take what was pushed as it is. SGD is that of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from headwater.errors import ConfigurationError
from headwater.spec import formulas
from headwater.spec.registry import register
from headwater.spec.rules.rule import Rate, RatedRule, Rule, check_lr, check_not_negative, rate_at


@register
@dataclass(frozen=True, slots=True)
class SGD(RatedRule):
    """Stochastic gradient descent, as torch.optim.SGD; without momentum it has no state.

    Args:
        lr: learning rate, a number or a `Schedule`.
        momentum: of the running sum of gradients that the value moves along; 0: none, and no state.
        dampening: share of each gradient that the running sum leaves out.
        weight_decay: times the value, added to the gradient.
        nesterov: look one step ahead along the momentum.

    Raises:
        ConfigurationError: a negative setting, or `nesterov` without momentum or with dampening.
    """

    lr: Rate
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def check(self) -> None:
        """Refuse what torch refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "momentum", "weight_decay")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigurationError(
                "SGD: nesterov needs momentum above 0 and dampening 0: set both or drop nesterov"
            )

    def states(self) -> dict[str, float]:
        """The momentum buffer, where there is momentum."""
        return {"momentum_buffer": 0.0} if self.momentum else {}

    def function(self) -> Callable[..., Any]:
        """`sgd` or `sgd_momentum`."""
        return formulas.sgd_momentum if self.momentum else formulas.sgd

    @property
    def counted(self) -> bool:
        """The first update starts the momentum buffer."""
        return bool(self.momentum)

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """lr, weight_decay and, with momentum, the four weights of `sgd_momentum`."""
        if not self.momentum:
            return rate_at(self.lr, updates), self.weight_decay
        keep, take = (0.0, 1.0) if count == 1 else (self.momentum, 1.0 - self.dampening)
        direct, through = (1.0, self.momentum) if self.nesterov else (0.0, 1.0)
        return rate_at(self.lr, updates), self.weight_decay, keep, take, direct, through


@register
@dataclass(frozen=True, slots=True)
class Accumulate(Rule):
    """Adds what all workers push, in every sync mode: for counts and exact sums."""

    always_sum: ClassVar[bool] = True

    def function(self) -> Callable[..., Any]:
        """`accumulate`."""
        return formulas.accumulate


@register
@dataclass(frozen=True, slots=True)
class Assign(Rule):
    """Sets each value to the mean of what the workers pushed."""

    def function(self) -> Callable[..., Any]:
        """`assign`."""
        return formulas.assign
