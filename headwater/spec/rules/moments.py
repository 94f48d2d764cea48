"""Rules that keep an average of the gradient: Adam and those that came of it.

Formulas, arguments and defaults are those of torch.optim, or of the paper that is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from headwater.spec import formulas
from headwater.spec.registry import register
from headwater.spec.rules.rule import Rate, RatedRule, check_betas, check_lr, check_not_negative, rate_at


@register
@dataclass(frozen=True, slots=True)
class Adam(RatedRule):
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
        """Refuse what torch refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "eps", "weight_decay")
        check_betas(self, self.betas)

    def states(self) -> dict[str, float]:
        """The averages of gradients and squares; with amsgrad the largest of the latter."""
        largest = {"max_exp_avg_sq": 0.0} if self.amsgrad else {}
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0, **largest}

    def function(self) -> Callable[..., Any]:
        """`adam` or `adam_amsgrad`."""
        return formulas.adam_amsgrad if self.amsgrad else formulas.adam

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `adam` takes, in its order."""
        lr = rate_at(self.lr, updates)
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
class Yogi(RatedRule):
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
        """Refuse what Adam refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "eps", "weight_decay", "initial_accumulator")
        check_betas(self, self.betas)

    def states(self) -> dict[str, float]:
        """The averages of gradients and squares."""
        return {"exp_avg": 0.0, "exp_avg_sq": self.initial_accumulator}

    def function(self) -> Callable[..., Any]:
        """`yogi`."""
        return formulas.yogi

    @property
    def counted(self) -> bool:
        """Never: its scalars are the same for every count."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `yogi` takes, in its order."""
        beta1, beta2 = self.betas
        return rate_at(self.lr, updates), self.eps, beta1, 1 - beta1, 1 - beta2, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class Lamb(RatedRule):
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
        """Refuse what Adam refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "eps", "weight_decay")
        check_betas(self, self.betas)

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
        return rate_at(self.lr, updates), 1.0, *corrections, self.eps, *decays, self.weight_decay


@register
@dataclass(frozen=True, slots=True)
class Lion(RatedRule):
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
        """Refuse what Adam refuses."""
        check_lr(self, self.lr)
        check_not_negative(self, "weight_decay")
        check_betas(self, self.betas)

    def states(self) -> dict[str, float]:
        """The average of gradients."""
        return {"exp_avg": 0.0}

    def function(self) -> Callable[..., Any]:
        """`lion`."""
        return formulas.lion

    @property
    def counted(self) -> bool:
        """Never: its scalars are the same for every count."""
        return False

    def scalars(self, updates: int, count: int) -> tuple[float, ...]:
        """What `lion` takes, in its order."""
        lr = rate_at(self.lr, updates)
        beta1, beta2 = self.betas
        return lr, 1 - lr * self.weight_decay, beta1, 1 - beta1, beta2, 1 - beta2
