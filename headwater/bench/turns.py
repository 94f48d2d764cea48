"""Several things measured in turns, A B C A B C …, so that a machine that drifts drifts under all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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
