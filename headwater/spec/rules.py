"""Rules: what a server does with a gradient, each a small value object and one scalar function.

Invariants:
- A scalar function is plain Python on float32: + − × ÷, `math.sqrt`, `abs`, comparisons and other such
  functions of its module, nothing else. Loops are generated from it (`headwater.kernels`); it is never
  written twice.
- Powers, logarithms and schedules are scalars, computed in float64 once a step and rounded once.
- A message chooses among registered names; nothing that arrives here causes an import.
- Formulas, arguments and defaults are those of torch.optim (FTRL: TensorFlow).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from headwater.errors import ConfigurationError
from headwater.messages import RuleSpec
from headwater.spec import formulas
from headwater.spec.registry import Registry, register
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


def _at(lr: Rate, updates: int) -> float:
    return lr.at(updates) if isinstance(lr, Schedule) else lr


class _Rated(Rule):
    """A rule whose `scalars` differ with `updates` only where its learning rate is a schedule."""

    __slots__ = ()

    lr: Rate

    @property
    def scheduled(self) -> bool:
        return isinstance(self.lr, Schedule)


def _check_lr(rule: Rule, lr: Rate) -> None:
    require(isinstance(lr, Schedule) or lr >= 0, rule, "lr", "at least 0, or a schedule")


def _check_not_negative(rule: Rule, *settings: str) -> None:
    for setting in settings:
        require(getattr(rule, setting) >= 0, rule, setting, "at least 0")


# ── stochastic gradient descent ─────────────────────────────────────────────────────────────────


@register
@dataclass(frozen=True, slots=True)
class SGD(_Rated):
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
        """As torch refuses."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "momentum", "weight_decay")
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
            return _at(self.lr, updates), self.weight_decay
        keep, take = (0.0, 1.0) if count == 1 else (self.momentum, 1.0 - self.dampening)
        direct, through = (1.0, self.momentum) if self.nesterov else (0.0, 1.0)
        return _at(self.lr, updates), self.weight_decay, keep, take, direct, through


# ── adaptive rates ──────────────────────────────────────────────────────────────────────────────


@register
@dataclass(frozen=True, slots=True)
class Adagrad(_Rated):
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
        """As torch refuses."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def states(self) -> dict[str, float]:
        """The sum of squared gradients."""
        return {"sum": self.initial_accumulator_value}

    def function(self) -> Callable[..., Any]:
        """`adagrad`."""
        return formulas.adagrad

    @property
    def counted(self) -> bool:
        """Where lr decays with the count."""
        return bool(self.lr_decay)

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """The decayed lr, eps, weight_decay."""
        return _at(self.lr, updates) / (1.0 + (count - 1) * self.lr_decay), self.eps, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class RowwiseAdagrad(_Rated):
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
        """As Adagrad."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "initial_accumulator_value", "eps")

    def states(self) -> dict[str, float]:
        """The sum of the means of a row's squared gradients: one float a row."""
        return {"sum": self.initial_accumulator_value}

    def function(self) -> Callable[..., Any]:
        """`rowwise_adagrad`."""
        return formulas.rowwise_adagrad

    @property
    def counted(self) -> bool:
        """Never."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """lr, eps."""
        return _at(self.lr, updates), self.eps


@register
@dataclass(frozen=True, slots=True)
class RMSprop(_Rated):
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
        """As torch refuses, and an average stays an average."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "eps", "weight_decay", "momentum")
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
        """Never."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """lr, eps, weight_decay, alpha, 1 − alpha and, where there is any, momentum."""
        momentum = (self.momentum,) if self.momentum else ()
        return _at(self.lr, updates), self.eps, self.weight_decay, self.alpha, 1.0 - self.alpha, *momentum


@register
@dataclass(frozen=True, slots=True)
class Adam(_Rated):
    """Adam, as torch.optim.Adam; weight decay is added to the gradient.

    Args:
        lr: learning rate, a number or a `Schedule`.
        betas: decay of the averages of gradients and of squares, each of at least 0 and below 1.
        eps: added to the root in the denominator.
        weight_decay: times the value, added to the gradient.
        amsgrad: divide by the largest average of squares so far.

    Raises:
        ConfigurationError: a negative setting, or a beta that is not below 1.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def check(self) -> None:
        """As torch refuses."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "eps", "weight_decay")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "of at least 0 and below 1")

    def states(self) -> dict[str, float]:
        """The averages of gradients and squares; with amsgrad the largest of the latter."""
        largest = {"max_exp_avg_sq": 0.0} if self.amsgrad else {}
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0, **largest}

    def function(self) -> Callable[..., Any]:
        """`adam` or `adam_amsgrad`."""
        return formulas.adam_amsgrad if self.amsgrad else formulas.adam

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `adam` takes, in its order."""
        lr = _at(self.lr, updates)
        beta1, beta2 = self.betas
        step, correction = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        l2, shrink = self._decay(lr)
        return step, correction, self.eps, beta1, 1 - beta1, beta2, 1 - beta2, l2, shrink

    def _decay(self, lr: float) -> tuple[float, float]:
        """(l2, shrink) of `adam`."""
        return self.weight_decay, 1.0


@register
@dataclass(frozen=True, slots=True)
class AdamW(Adam):
    """AdamW, as torch.optim.AdamW; weight decay shrinks the value, apart from the gradient.

    Args:
        lr: learning rate, a number or a `Schedule`.
        betas: decay of the averages of gradients and of squares, each of at least 0 and below 1.
        eps: added to the root in the denominator.
        weight_decay: lr times this much of the value is taken away.
        amsgrad: divide by the largest average of squares so far.

    Raises:
        ConfigurationError: a negative setting, or a beta that is not below 1.
    """

    weight_decay: float = 1e-2

    def _decay(self, lr: float) -> tuple[float, float]:
        return 0.0, 1.0 - lr * self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class Yogi(_Rated):
    """Yogi: Adam whose average of squares moves by a bounded amount (Zaheer et al. 2018); no bias correction.

    Args:
        lr: learning rate, a number or a schedule.
        betas: decay of the averages of gradients and of squares, each of at least 0 and below 1.
        eps: added to the root in the denominator.
        weight_decay: times the value, added to the gradient.
        initial_accumulator: what the average of squares begins with.

    Raises:
        ConfigurationError: a negative setting, or a beta that is not below 1.
    """

    lr: Rate = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-3
    weight_decay: float = 0.0
    initial_accumulator: float = 1e-6

    def check(self) -> None:
        """As Adam."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "eps", "weight_decay", "initial_accumulator")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "of at least 0 and below 1")

    def states(self) -> dict[str, float]:
        """The averages of gradients and squares."""
        return {"exp_avg": 0.0, "exp_avg_sq": self.initial_accumulator}

    def function(self) -> Callable[..., Any]:
        """`yogi`."""
        return formulas.yogi

    @property
    def counted(self) -> bool:
        """Never."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `yogi` takes, in its order."""
        beta1, beta2 = self.betas
        return _at(self.lr, updates), self.eps, beta1, 1 - beta1, 1 - beta2, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class Lamb(_Rated):
    """LAMB: Adam whose step of each tensor is as long as lr times the tensor (You et al. 2020); for models.

    The step is lr · ‖value‖ / ‖direction‖ · direction, with direction = exp_avg / (√exp_avg_sq + eps) +
    weight_decay · value, both averages bias-corrected; norms are over the whole tensor, on all servers, and
    where one is 0 the ratio is 1. It costs some passes over a commit's tensors and one exchange more between
    servers. A setting that changes counts in the direction that is measured from the next commit on.

    Args:
        lr: learning rate, a number or a schedule.
        betas: decay of the averages of gradients and of squares, each of at least 0 and below 1.
        eps: added to the root in the denominator.
        weight_decay: this much of the value is added to the direction.

    Raises:
        ConfigurationError: a negative setting, or a beta that is not below 1.
    """

    layerwise: ClassVar[bool] = True

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0

    def check(self) -> None:
        """As Adam."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "eps", "weight_decay")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "of at least 0 and below 1")

    def states(self) -> dict[str, float]:
        """The averages of gradients and squares."""
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def function(self) -> Callable[..., Any]:
        """`lamb`."""
        return formulas.lamb

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `lamb` takes, in its order."""
        beta1, beta2 = self.betas
        corrections = 1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        decays = beta1, 1 - beta1, beta2, 1 - beta2
        return _at(self.lr, updates), 1.0, *corrections, self.eps, *decays, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class Lion(_Rated):
    """Lion: the sign of an average of gradients (Chen et al. 2023); weight decay shrinks the value.

    Args:
        lr: learning rate, a number or a schedule; each element moves by exactly this much.
        betas: decay within the update and of the average that is kept, each of at least 0 and below 1.
        weight_decay: lr times this much of the value is taken away.

    Raises:
        ConfigurationError: a negative setting, or a beta that is not below 1.
    """

    lr: Rate = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def check(self) -> None:
        """As Adam."""
        _check_lr(self, self.lr)
        _check_not_negative(self, "weight_decay")
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "of at least 0 and below 1")

    def states(self) -> dict[str, float]:
        """The average of gradients."""
        return {"exp_avg": 0.0}

    def function(self) -> Callable[..., Any]:
        """`lion`."""
        return formulas.lion

    @property
    def counted(self) -> bool:
        """Never."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `lion` takes, in its order."""
        lr = _at(self.lr, updates)
        beta1, beta2 = self.betas
        return lr, 1 - lr * self.weight_decay, beta1, 1 - beta1, beta2, 1 - beta2


@register
@dataclass(frozen=True, slots=True)
class Ftrl(_Rated):
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
        """The rate divides, so it stays above 0."""
        lowest = self.lr.lowest if isinstance(self.lr, Schedule) else self.lr
        require(lowest > 0, self, "lr", "above 0, or a schedule that ends above 0")
        _check_not_negative(self, "l1", "l2", "initial_accumulator", "beta")

    def states(self) -> dict[str, float]:
        """The sum of squared gradients, and the linear term."""
        return {"accum": self.initial_accumulator, "linear": 0.0}

    def function(self) -> Callable[..., Any]:
        """`ftrl`."""
        return formulas.ftrl

    @property
    def counted(self) -> bool:
        """Never."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """1 / lr, l1, ridge."""
        inverse_lr = 1.0 / _at(self.lr, updates)
        return inverse_lr, self.l1, self.beta * inverse_lr + 2.0 * self.l2


# ── without a rate ──────────────────────────────────────────────────────────────────────────────


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
