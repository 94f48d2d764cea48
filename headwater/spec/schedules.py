"""Learning rates that change with the model's own count of updates.

Pure value objects. Each is evaluated on the server, in float64, before a rule is applied; `at(0)` is
the rate of a model's first update. Warm-up rises linearly to the full rate over the first `warmup`
updates, and the rest of the schedule starts after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headwater.spec.settings import Settings, require


class Schedule(Settings):
    """Base of the schedules; each has fields `lr` (the full rate) and `warmup` (updates)."""

    __slots__ = ()

    lr: float
    warmup: int

    def at(self, updates: int) -> float:
        """The rate of the update that `updates` others of the model came before."""
        if updates < self.warmup:
            return self.lr * (updates + 1) / self.warmup
        return self.after_warmup(updates - self.warmup)

    def after_warmup(self, updates: int) -> float:
        """The rate when `updates` updates have passed since the warm-up."""
        raise NotImplementedError

    @property
    def lowest(self) -> float:
        """The smallest rate after the warm-up, however many updates follow."""
        return min(self.lr, getattr(self, "end", self.lr))

    def check(self) -> None:
        """Rates are at least 0, counts of updates as large as their use needs."""
        require(self.lr >= 0, self, "lr", "at least 0")
        require(self.warmup >= 0, self, "warmup", "at least 0")


@dataclass(frozen=True, slots=True)
class Constant(Schedule):
    """`lr`, always (after `warmup` updates of rising to it).

    Args:
        lr: the rate.
        warmup: updates in which the rate rises to `lr` in a straight line.

    Raises:
        ConfigurationError: a negative setting.
    """

    lr: float
    warmup: int = 0

    def after_warmup(self, updates: int) -> float:
        """lr"""
        return self.lr


@dataclass(frozen=True, slots=True)
class Linear(Schedule):
    """From `lr` to `end` in a straight line over `over` updates, then `end`.

    Args:
        lr: the rate at first.
        over: updates until `end`.
        end: the rate from then on.
        warmup: updates in which the rate rises to `lr` in a straight line; `over` and `every` count after it.

    Raises:
        ConfigurationError: a negative setting, or `over` is 0.
    """

    lr: float
    over: int
    end: float = 0.0
    warmup: int = 0

    def after_warmup(self, updates: int) -> float:
        """lr + (end − lr) · min(updates / over, 1)"""
        return self.end if updates >= self.over else self.lr + (self.end - self.lr) * (updates / self.over)

    def check(self) -> None:
        """As every schedule, and there is an end to go to."""
        Schedule.check(self)
        require(self.over >= 1, self, "over", "at least 1")
        require(self.end >= 0, self, "end", "at least 0")


@dataclass(frozen=True, slots=True)
class Cosine(Schedule):
    """From `lr` to `end` along half a cosine over `over` updates, then `end` (Loshchilov & Hutter 2017).

    Args:
        lr: the rate at first.
        over: updates until `end`.
        end: the rate from then on.
        warmup: updates in which the rate rises to `lr` in a straight line; `over` and `every` count after it.

    Raises:
        ConfigurationError: a negative setting, or `over` is 0.
    """

    lr: float
    over: int
    end: float = 0.0
    warmup: int = 0

    def after_warmup(self, updates: int) -> float:
        """end + (lr − end) · (1 + cos(π · min(updates / over, 1))) / 2"""
        if updates >= self.over:
            return self.end
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * updates / self.over)) / 2

    def check(self) -> None:
        """As every schedule, and there is an end to go to."""
        Schedule.check(self)
        require(self.over >= 1, self, "over", "at least 1")
        require(self.end >= 0, self, "end", "at least 0")


@dataclass(frozen=True, slots=True)
class StepDecay(Schedule):
    """`lr`, multiplied by `factor` after every `every` updates, and never below `end`.

    Args:
        lr: the rate at first.
        every: updates between two steps.
        factor: what each step multiplies the rate by, from 0 to 1.
        end: the lowest rate.
        warmup: updates in which the rate rises to `lr` in a straight line; `over` and `every` count after it.

    Raises:
        ConfigurationError: a negative setting, `every` is 0, or `factor` above 1.
    """

    lr: float
    every: int
    factor: float = 0.1
    end: float = 0.0
    warmup: int = 0

    def after_warmup(self, updates: int) -> float:
        """max(lr · factor ^ ⌊updates / every⌋, end)"""
        return max(self.lr * self.factor ** (updates // self.every), self.end)

    def check(self) -> None:
        """As every schedule, and the steps have a length."""
        Schedule.check(self)
        require(self.every >= 1, self, "every", "at least 1")
        require(0 <= self.factor <= 1, self, "factor", "from 0 to 1")
        require(0 <= self.end <= self.lr, self, "end", "from 0 to lr")


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.__name__: schedule for schedule in (Constant, Linear, Cosine, StepDecay)
}
"""By the name they travel under."""
