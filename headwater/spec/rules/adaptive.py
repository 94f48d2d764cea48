"""Rules that divide each element's rate by the root of its gradient's squares so far.

Formulas, arguments and defaults are those of torch.optim (FTRL: TensorFlow).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from headwater.spec import formulas
from headwater.spec.registry import register
from headwater.spec.rules.rule import Rate, RatedRule, check_lr, check_not_negative, rate_at
from headwater.spec.schedules import Schedule
from headwater.spec.settings import require


@register
@dataclass(frozen=True, slots=True)
class Adagrad(RatedRule):
    """Adagrad, as torch.optim.Adagrad.

    Args:
        lr: learning rate, a number or a `Schedule`.
        lr_decay: lr is divided by 1 + lr_decay · (updates before this one).
        weight_decay: times the value, added to the gradient.
        initial_accumulator_value: what the sums of squares begin with.
        eps: added to the root in the denominator.

    Raises:
        ConfigurationError: a negative setting.
    """

    lr: Rate = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def check(self) -> None:
        """Refuse what torch refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def states(self) -> dict[str, float]:
        """The sum of squared gradients."""
        return {"sum": self.initial_accumulator_value}

    def function(self) -> Callable[..., Any]:
        """`adagrad`."""
        return formulas.adagrad

    @property
    def counted(self) -> bool:
        """True where lr decays with the count."""
        return bool(self.lr_decay)

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """The decayed lr, eps, weight_decay."""
        return rate_at(self.lr, updates) / (1.0 + (count - 1) * self.lr_decay), self.eps, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class RowwiseAdagrad(RatedRule):
    """Adagrad with one sum a row instead of one an element; for tables only.

    Args:
        lr: learning rate, a number or a `Schedule`.
        initial_accumulator_value: what a row's sum of mean squares begins with.
        eps: added to the root in the denominator.

    Raises:
        ConfigurationError: a negative setting.
    """

    rows_only: ClassVar[bool] = True

    lr: Rate = 1e-2
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def check(self) -> None:
        """Refuse what Adagrad refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "initial_accumulator_value", "eps")

    def states(self) -> dict[str, float]:
        """The sum of the means of a row's squared gradients: one float a row."""
        return {"sum": self.initial_accumulator_value}

    def function(self) -> Callable[..., Any]:
        """`rowwise_adagrad`."""
        return formulas.rowwise_adagrad

    @property
    def counted(self) -> bool:
        """Never: its scalars are the same for every count."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """lr, eps."""
        return rate_at(self.lr, updates), self.eps


@register
@dataclass(frozen=True, slots=True)
class RMSprop(RatedRule):
    """RMSprop, as torch.optim.RMSprop.

    Args:
        lr: learning rate, a number or a `Schedule`.
        alpha: decay of the average of squares, from 0 to 1.
        eps: added to the root in the denominator.
        weight_decay: times the value, added to the gradient.
        momentum: of the running sum of scaled gradients; 0: none.
        centered: subtract the square of the average gradient, so that the variance scales.

    Raises:
        ConfigurationError: a negative setting, or `alpha` above 1.
    """

    lr: Rate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def check(self) -> None:
        """Refuse what torch refuses, and an average that is none."""
        check_lr(self, self.lr)
        check_not_negative(self, "eps", "weight_decay", "momentum")
        require(0 <= self.alpha <= 1, self, "alpha", "from 0 to 1")

    def states(self) -> dict[str, float]:
        """The average of squares; with momentum its buffer, centered the average gradient."""
        buffer = {"momentum_buffer": 0.0} if self.momentum else {}
        average = {"grad_avg": 0.0} if self.centered else {}
        return {"square_avg": 0.0, **buffer, **average}

    def function(self) -> Callable[..., Any]:
        """`rmsprop`, `…_momentum`, `…_centered` or `…_centered_momentum`."""
        if self.centered:
            return formulas.rmsprop_centered_momentum if self.momentum else formulas.rmsprop_centered
        return formulas.rmsprop_momentum if self.momentum else formulas.rmsprop

    @property
    def counted(self) -> bool:
        """Never: its scalars are the same for every count."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """lr, eps, weight_decay, alpha, 1 − alpha and, where there is any, momentum."""
        momentum = (self.momentum,) if self.momentum else ()
        return rate_at(self.lr, updates), self.eps, self.weight_decay, self.alpha, 1.0 - self.alpha, *momentum


@register
@dataclass(frozen=True, slots=True)
class Ftrl(RatedRule):
    """Follow the regularised leader, per coordinate, as TensorFlow has it (power −½); `l1` makes zeros.

    Its first update forgets most of a tensor's initial value: start from zeros.

    Args:
        lr: learning rate, a number above 0 or a `Schedule` that stays above 0.
        l1: strength of the penalty on absolute values, which sets small ones to zero.
        l2: strength of the penalty on squares.
        initial_accumulator: what the sums of squares begin with.
        beta: added to the root in the denominator of the rate.

    Raises:
        ConfigurationError: a negative setting, or a learning rate that is or comes to 0.
    """

    lr: Rate = 1e-3
    l1: float = 0.0
    l2: float = 0.0
    initial_accumulator: float = 0.1
    beta: float = 0.0

    def check(self) -> None:
        """Refuse a rate that is not above 0, for it divides."""
        lowest = self.lr.lowest if isinstance(self.lr, Schedule) else self.lr
        require(lowest > 0, self, "lr", "above 0, or a schedule that ends above 0")
        check_not_negative(self, "l1", "l2", "initial_accumulator", "beta")

    def states(self) -> dict[str, float]:
        """The sum of squared gradients, and the linear term."""
        return {"accum": self.initial_accumulator, "linear": 0.0}

    def function(self) -> Callable[..., Any]:
        """`ftrl`."""
        return formulas.ftrl

    @property
    def counted(self) -> bool:
        """Never: its scalars are the same for every count."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """1 / lr, l1, ridge."""
        inverse_lr = 1.0 / rate_at(self.lr, updates)
        return inverse_lr, self.l1, self.beta * inverse_lr + 2.0 * self.l2
