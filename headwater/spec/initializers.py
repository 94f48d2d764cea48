"""Row initialisers: what a row of a table is before its first update, as a function of (seed, id, column).

Invariants:
- The value depends on nothing else, so neither the order in which rows appear nor the number of servers
  matters, and what was pulled of an unknown id is what its first push starts from.
- + − × ÷ √ in float64, rounded to float32 once: the same bits on every machine. Here stands the plain
  reference; `headwater.kernels.row_loops` computes the same bits.

Each column draws u in (0, 1), a multiple of 2⁻³² with 31 random bits, from splitmix64 (Steele et al. 2014)
started at a hash of seed and id. Normal quantiles are those of Wichura 1988 (AS 241, PPND7): within 1.5·10⁻⁷
of the exact ones, relatively, and never beyond ±6.24 standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.messages import RuleSpec
from headwater.spec.placement import mix
from headwater.spec.settings import Settings, refuse_unknown, require

Doubles = NDArray[np.float64]

CONSTANT, UNIFORM, NORMAL, TRUNCATED = range(4)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BELOW_2, _WITHIN_2 = 0.022750131948179212, 0.9544997361036416
_ROOT_2, _LN_2 = 1.4142135623730951, 0.6931471805599453
_LARGEST = float(np.finfo(np.float32).max)


class Distribution(NamedTuple):
    """What kernels take: one of the four kinds, and value = location + scale · draw."""

    kind: int
    location: float
    scale: float


class Initializer(Settings):
    """Base of the initialisers."""

    __slots__ = ()

    def distribution(self) -> Distribution:
        """The kind of draw, where it lies and how wide it is."""
        raise NotImplementedError

    def rows(self, seed: int, ids: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
        """float32[n, dim]: the initial rows of int64[n] ids; the plain reference."""
        kind, location, scale = self.distribution()
        draws = _DRAWS[kind](_uniforms(seed, ids, dim))
        rows: NDArray[np.float32] = (location + scale * draws).astype(np.float32)
        return rows


@dataclass(frozen=True, slots=True)
class Zeros(Initializer):
    """0 everywhere."""

    def distribution(self) -> Distribution:
        """Constant 0."""
        return Distribution(CONSTANT, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Constant(Initializer):
    """`value` everywhere.

    Args:
        value: of every element, a float32.

    Raises:
        ConfigurationError: not a float32.
    """

    value: float

    def check(self) -> None:
        """It is a float32."""
        _check_float32(self, "value")

    def distribution(self) -> Distribution:
        """Constant `value`."""
        return Distribution(CONSTANT, self.value, 0.0)


@dataclass(frozen=True, slots=True)
class Uniform(Initializer):
    """Evenly between `low` and `high`, either of which rounding to float32 may produce.

    Args:
        low: the smallest value.
        high: the largest.

    Raises:
        ConfigurationError: `low` above `high`, or not float32s.
    """

    low: float
    high: float

    def check(self) -> None:
        """They are in order."""
        _check_float32(self, "low", "high")
        require(self.low <= self.high, self, "low", f"at most high, {self.high}")

    def distribution(self) -> Distribution:
        """From low, as wide as high − low."""
        return Distribution(UNIFORM, self.low, self.high - self.low)


@dataclass(frozen=True, slots=True)
class Normal(Initializer):
    """Normally distributed.

    Args:
        mean: of the values.
        std: their standard deviation, at least 0.

    Raises:
        ConfigurationError: a negative `std`, or not float32s.
    """

    mean: float = 0.0
    std: float = 1.0

    def check(self) -> None:
        """A spread is not negative."""
        _check_float32(self, "mean", "std")
        require(self.std >= 0, self, "std", "at least 0")

    def distribution(self) -> Distribution:
        """Around mean, as wide as std."""
        return Distribution(NORMAL, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class TruncatedNormal(Normal):
    """Normally distributed, given that it lies within two `std` of `mean`.

    Args:
        mean: of the values before they are cut.
        std: their standard deviation before, at least 0.

    Raises:
        ConfigurationError: a negative `std`, or not float32s.
    """

    def distribution(self) -> Distribution:
        """Around mean, as wide as std."""
        return Distribution(TRUNCATED, self.mean, self.std)


INITIALIZERS: dict[str, type[Initializer]] = {
    kind.__name__: kind for kind in (Zeros, Constant, Uniform, Normal, TruncatedNormal)
}
"""By the name they travel under."""


def from_spec(spec: RuleSpec) -> Initializer:
    """The initialiser that a spec describes.

    Raises:
        ConfigurationError: an unknown name, or an unknown, missing, ill-typed or impossible setting.
    """
    refuse_unknown("no initializer", [spec.name], INITIALIZERS)
    return INITIALIZERS[spec.name].from_flat(spec.settings)


def _check_float32(initializer: Initializer, *settings: str) -> None:
    for setting in settings:
        fits = abs(getattr(initializer, setting)) <= _LARGEST / 8
        require(fits, initializer, setting, f"between ±{_LARGEST / 8:.3g}: rows are float32")


# ── the plain reference ─────────────────────────────────────────────────────────────────────────


def _uniforms(seed: int, ids: NDArray[np.int64], dim: int) -> Doubles:
    """float64[n, dim] in (0, 1)."""
    seeded = mix(np.array([seed], dtype=np.int64).view(np.uint64))
    keys = mix(np.asarray(ids, dtype=np.int64).view(np.uint64) ^ seeded)
    columns = np.arange(1, dim + 1, dtype=np.uint64) * _GOLDEN
    bits = mix(keys[:, np.newaxis] + columns)
    return ((bits >> np.uint64(33)).astype(np.float64) + 0.5) * 4.656612873077393e-10


def _negative_log(p: Doubles) -> Doubles:
    """−ln p for 0 < p < 1: ln √2 + 2 artanh((m − √2) / (m + √2)) of the mantissa m in [1, 2), seven terms."""
    mantissa, exponent = np.frexp(p)
    mantissa, power = mantissa * 2.0, exponent - 1.0
    s = (mantissa - _ROOT_2) / (mantissa + _ROOT_2)
    t = s * s
    series = np.full_like(t, 1.0 / 13.0)
    for odd in (11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = 1.0 / odd + t * series
    result: Doubles = -((power + 0.5) * _LN_2 + 2.0 * s * series)
    return result


def _quantile(p: Doubles) -> Doubles:
    """Inverse of the normal distribution function (AS 241, PPND7)."""
    q = p - 0.5
    r = 0.180625 - q * q
    central = (
        q
        * (3.3871327179 + r * (50.434271938 + r * (159.29113202 + r * 59.109374720)))
        / (1.0 + r * (17.895169469 + r * (78.757757664 + r * 67.187563600)))
    )
    r = np.sqrt(_negative_log(0.5 - np.abs(q))) - 1.6
    tail = (1.4234372777 + r * (2.7568153900 + r * (1.3067284816 + r * 0.17023821103))) / (
        1.0 + r * (0.73700164250 + r * 0.12021132975)
    )
    return np.where(np.abs(q) <= 0.425, central, np.where(q < 0.0, -tail, tail))


def _truncated(p: Doubles) -> Doubles:
    return np.clip(_quantile(_BELOW_2 + p * _WITHIN_2), -2.0, 2.0)


_DRAWS: dict[int, Callable[[Doubles], Any]] = {
    CONSTANT: np.zeros_like,
    UNIFORM: lambda p: p,
    NORMAL: _quantile,
    TRUNCATED: _truncated,
}
