"""Stragglers: which worker is how much slower, at which step; planted in real and in simulated clusters.

A straggler is its text, `kind:setting=value,…`. How long a step of a rank is delayed follows from the text, a
seed, the rank and the number of the step, and from nothing else: the same delays meet every mode.

Delays are told in steps: a factor of 3 means that a step takes as long as three steps of an undisturbed
worker. Pauses and absences are told in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ConfigurationError
from headwater.spec.setting_text import settings_of, text_name, text_of
from headwater.spec.settings import Settings, field_types, require
from headwater.spec.words import option

_BLOCK = 256
"""Steps whose delays are drawn together."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A rank's process is killed when it is about to take step `step`.

    `after`: seconds until another process takes its rank; None: nobody does.
    """

    step: int
    after: float | None


class Straggler(Settings):
    """Base of all kinds. `kind` is its name in texts. By itself: nobody is slow."""

    __slots__ = ()
    kind: ClassVar[str] = "none"

    def factors(self, seed: int, rank: int, first: int, count: int) -> NDArray[np.float64]:
        """How many steps long each of the rank's steps `first` … `first + count - 1` is: float64[count], ≥ 1.

        Steps are counted from 0.
        """
        parts = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            drawn = self._drawn(np.random.default_rng([seed, rank, block]), rank)
            begin = block * _BLOCK
            parts.append(drawn[max(first - begin, 0) : first + count - begin])
        return np.concatenate(parts) if parts else np.ones(0)

    def _drawn(self, random: np.random.Generator, rank: int) -> NDArray[np.float64]:
        """Of one block of steps of a rank."""
        return np.ones(_BLOCK)

    def pause(self, rank: int, step: int) -> float:
        """Seconds for which the rank stands still before this step."""
        return 0.0

    def outage(self, rank: int) -> Outage | None:
        """When the rank's process is killed; None: it is not."""
        return None

    def ranks(self) -> tuple[int, ...]:
        """The ranks that it names."""
        named = getattr(self, "rank", None)
        return () if named is None else (named,)

    def check(self) -> None:
        for rank in self.ranks():
            require(rank >= 0, self, "rank", "≥ 0")

    @classmethod
    def registered_name(cls) -> str:
        return cls.kind

    def __str__(self) -> str:
        said = [f"{text_name(name)}={text_of(getattr(self, name))}" for name in field_types(type(self))]
        return f"{self.kind}:{','.join(one for one in said if not one.endswith('=None'))}".rstrip(":")


@dataclass(frozen=True, slots=True)
class Undisturbed(Straggler):
    """`none`: nobody is slow."""


@dataclass(frozen=True, slots=True)
class Slow(Straggler):
    """`slow:rank=0,factor=3`: every step of one rank takes `factor` times as long."""

    kind = "slow"
    rank: int
    factor: float

    def check(self) -> None:
        Straggler.check(self)
        require(self.factor >= 1, self, "factor", "≥ 1")

    def _drawn(self, random: np.random.Generator, rank: int) -> NDArray[np.float64]:
        return np.full(_BLOCK, self.factor if rank == self.rank else 1.0)


@dataclass(frozen=True, slots=True)
class LogNormal(Straggler):
    """`lognormal:sigma=1,median=0.5`: each step is delayed by `median` · exp(`sigma` · z) steps, z normal.

    `rank` None: of every rank, independently.
    """

    kind = "lognormal"
    sigma: float
    median: float = 0.5
    rank: int | None = None

    def check(self) -> None:
        Straggler.check(self)
        require(self.sigma >= 0, self, "sigma", "≥ 0")
        require(self.median >= 0, self, "median", "≥ 0 steps")

    def _drawn(self, random: np.random.Generator, rank: int) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = 1 + self.median * np.exp(self.sigma * random.standard_normal(_BLOCK))
        return drawn if self.rank in (None, rank) else np.ones(_BLOCK)


@dataclass(frozen=True, slots=True)
class Pareto(Straggler):
    """`pareto:shape=2`: each step takes f times as long, P(f > x) = x^(-shape) for x ≥ 1; shape > 1.

    The mean of f is shape / (shape - 1). `rank` None: of every rank, independently.
    """

    kind = "pareto"
    shape: float
    rank: int | None = None

    def check(self) -> None:
        Straggler.check(self)
        require(self.shape > 1, self, "shape", "> 1, for f to have a mean")

    def _drawn(self, random: np.random.Generator, rank: int) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = 1 + random.pareto(self.shape, _BLOCK)
        return drawn if self.rank in (None, rank) else np.ones(_BLOCK)


@dataclass(frozen=True, slots=True)
class LongPause(Straggler):
    """`pause:rank=0,step=20,seconds=2`: one rank stands still once, before step `step` (from 0)."""

    kind = "pause"
    rank: int
    step: int
    seconds: float

    def check(self) -> None:
        Straggler.check(self)
        require(self.step >= 0, self, "step", "≥ 0")
        require(self.seconds >= 0, self, "seconds", "≥ 0")

    def pause(self, rank: int, step: int) -> float:
        return self.seconds if (rank, step) == (self.rank, self.step) else 0.0


@dataclass(frozen=True, slots=True)
class Death(Straggler):
    """`death:rank=1,step=20`: the process of one rank is killed before step `step`, and nobody takes over."""

    kind = "death"
    rank: int
    step: int

    def check(self) -> None:
        Straggler.check(self)
        require(self.step >= 0, self, "step", "≥ 0")

    def outage(self, rank: int) -> Outage | None:
        return Outage(self.step, None) if rank == self.rank else None


@dataclass(frozen=True, slots=True)
class Return(Straggler):
    """`return:rank=1,step=20,after=5`: as `death`, and another process takes the rank `after` s later."""

    kind = "return"
    rank: int
    step: int
    after_s: float = 5.0

    def check(self) -> None:
        Straggler.check(self)
        require(self.step >= 0, self, "step", "≥ 0")
        require(self.after_s >= 0, self, "after_s", "≥ 0 seconds")

    def outage(self, rank: int) -> Outage | None:
        return Outage(self.step, self.after_s) if rank == self.rank else None


_KINDS: dict[str, tuple[type[Straggler], str]] = {
    "none": (Undisturbed, "none"),
    "slow": (Slow, "slow:rank=0,factor=3"),
    "lognormal": (LogNormal, "lognormal:sigma=1,median=0.5"),
    "pareto": (Pareto, "pareto:shape=2"),
    "pause": (LongPause, "pause:rank=0,step=20,seconds=2"),
    "death": (Death, "death:rank=1,step=20"),
    "return": (Return, "return:rank=1,step=20,after=5"),
}
"""Kind → its class, and a text that shows its form."""


def parse_straggler(value: str | Straggler) -> Straggler:
    """What a user wrote as an object; `str(straggler)` is the inverse.

    Raises:
        ConfigurationError: no kind of straggler, or impossible settings; lists the kinds.
    """
    if isinstance(value, Straggler):
        return value
    expected = ", ".join(form for _, form in _KINDS.values())
    if not isinstance(value, str):
        raise ConfigurationError(f"{option('stragglers')}: got {value!r}, expected {expected}")
    kind, _, argument = value.strip().partition(":")
    if kind not in _KINDS:
        raise ConfigurationError(
            f"{option('stragglers')}: got {value!r}, which is no kind of straggler: the kinds are {expected}"
        )
    cls, form = _KINDS[kind]
    try:
        return settings_of(cls, argument)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{option('stragglers')}: got {value!r}: {error}; expected such as {form}"
        ) from error
