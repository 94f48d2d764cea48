"""Several things measured in turns, A B C A B C …, so that a machine that drifts drifts under all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

Times = dict[str, list[float]]
"""Case → seconds a round, one figure a turn."""


def take_turns(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    rounds: int,
    meet: Callable[[], object] = lambda: None,
) -> Times:
    """Call each case `rounds` times, `repeats` times over after a first turn that is thrown away.

    `meet` makes all processes begin and end a turn together, so each sees the time of the slowest.
    """
    times: Times = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            meet()
            began = time.perf_counter()
            for _ in range(rounds if turn else 1):
                case()
            meet()
            if turn:
                times[name].append((time.perf_counter() - began) / rounds)
    return times


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of the values between which the true median lies, whatever their distribution is.

    The ends are the k-th value from below and from above. They miss the median with twice the probability
    that n fair coins show heads fewer than k times; k is the largest for which that is at most
    1 - `confidence`. With fewer than six values even the outermost miss it more often than in 5 % of cases.
    """
    ordered, n = sorted(values), len(values)

    def missed(k: int) -> float:
        return float(2 * sum(math.comb(n, heads) for heads in range(k)) / 2**n)

    k = 1
    while 2 * (k + 1) <= n and missed(k + 1) <= 1 - confidence:
        k += 1
    return ordered[k - 1], ordered[n - k]
