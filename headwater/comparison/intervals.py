"""Means with their intervals: Student's t, without a library for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GRID = 20_001


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `count` values and the interval that covers the true one; as wide as can be with one value.

    `low`, `high`: its ends; -inf and inf where there are fewer than two values.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent, about normal values, with Student's interval; NaN without values."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if len(finite) < 2:
        mean = finite[0] if finite else math.nan
        return Interval(mean, -math.inf, math.inf, len(finite))
    mean = float(np.mean(finite))
    half = t_quantile(len(finite) - 1, confidence) * float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    return Interval(mean, mean - half, mean + half, len(finite))


@functools.cache
def t_quantile(freedom: int, confidence: float) -> float:
    """t with P(|T| ≤ t) = confidence, for Student's distribution with so many degrees of freedom.

    With T = √f · tan θ the density of θ is proportional to cos^(f-1) θ on (-π/2, π/2), which is summed here.
    """
    angles = np.linspace(0.0, math.pi / 2, _GRID)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence * mass[-1], mass, angles)))
