"""The verdict: what the runs show of which mode is sooner at the target, and what they do not show.

Two modes are compared by the ratio of their times to the target, seed by seed, since both met the same data
and delays. The interval of the mean of its logarithm is Student's. With k modes there are k(k-1)/2 pairs, and
each interval is so wide that all of them hold together with 95 % (Bonferroni). A difference is shown where
the interval excludes 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater.comparison.intervals import mean_interval

if TYPE_CHECKING:
    from headwater.comparison.comparison import Comparison

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairRatio:
    """Time to the target of `mode` over that of `other`, under one straggler; over `count` seeds.

    `low`, `high`: its interval, wide enough for all pairs at once.
    """

    straggler: str
    mode: str
    other: str
    ratio: float
    low: float
    high: float
    count: int

    @property
    def is_shown(self) -> bool:
        """Whether the runs show a difference."""
        return self.high < 1 or self.low > 1


def pairs(comparison: Comparison) -> Iterator[PairRatio]:
    """Every pair of modes that have seeds in common which reached the target; the sooner mode first."""
    modes = comparison.experiment.modes
    together = max(1, math.comb(len(modes), 2))
    for straggler in map(str, comparison.experiment.stragglers):
        for one, other in itertools.combinations(modes, 2):
            ratios = _log_ratios(comparison, straggler, one, other)
            if not ratios:
                continue
            found = mean_interval(ratios, 1 - (1 - CONFIDENCE) / together)
            swap = found.mean > 0
            low, mean, high = (
                (-found.high, -found.mean, -found.low)
                if swap
                else (
                    found.low,
                    found.mean,
                    found.high,
                )
            )
            first, second = (other, one) if swap else (one, other)
            yield PairRatio(straggler, first, second, math.exp(mean), _exp(low), _exp(high), len(ratios))


def _log_ratios(comparison: Comparison, straggler: str, one: str, other: str) -> list[float]:
    """ln(time of `one` / time of `other`), for each seed that both reached the target with."""
    reached = [
        {figures.seed: figures.reached for figures in comparison.of(mode, straggler)} for mode in (one, other)
    ]
    return [
        math.log(max(first, 1e-9) / max(second, 1e-9))
        for seed, first in reached[0].items()
        if first is not None and (second := reached[1].get(seed)) is not None
    ]


def verdict(comparison: Comparison) -> str:
    """One sentence a straggler, and which runs never reached the target."""
    target = comparison.experiment.target
    if not any(one.reached is not None for one in comparison.figures):
        return f"no mode reached {target}: train longer, or compare with an easier target"
    found = list(pairs(comparison))
    said = [
        f"{under(straggler)}: {_sentence([one for one in found if one.straggler == straggler], comparison)}"
        for straggler in map(str, comparison.experiment.stragglers)
    ]
    return "; ".join([*said, *_misses(comparison)])


def _sentence(found: list[PairRatio], comparison: Comparison) -> str:
    if comparison.experiment.seeds == 1:
        return "one seed has no interval, so no difference shown"
    shown = [one for one in found if one.is_shown]
    if not shown:
        return "no difference shown"
    target = comparison.experiment.target
    rest = ["no difference shown between the others"] if len(shown) < len(found) else []
    return ", ".join(
        [
            f"{one.mode} reaches {target} in {one.ratio:.2f} of the time of {one.other} "
            f"({one.low:.2f} to {one.high:.2f})"
            for one in shown
        ]
        + rest
    )


def under(straggler: str) -> str:
    """`without stragglers`, or `under slow:…`."""
    return "without stragglers" if straggler == "none" else f"under {straggler}"


def _misses(comparison: Comparison) -> Iterator[str]:
    """Modes of which some runs did not reach the target: their times are those of the others."""
    for straggler in map(str, comparison.experiment.stragglers):
        for mode in comparison.experiment.modes:
            runs = comparison.of(mode, straggler)
            missed = sum(one.reached is None for one in runs)
            if missed:
                yield f"{mode} {under(straggler)} did not reach it in {missed} of {len(runs)} runs"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
