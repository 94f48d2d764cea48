"""Headwater's synchronous round beside other systems', measured in one run on one machine."""

from __future__ import annotations

import importlib.util
from statistics import median

from headwater.bench.dense import elements_of, pushed_rounds
from headwater.bench.figures import Effort, Figure, complain
from headwater.bench.rivals import RIVALS, measure


def measure_peers(effort: Effort) -> list[Figure]:
    """Rounds of a model of ResNet-50's size; takes about three minutes at full effort, and 3 GB of memory.

    The ratio is of rates, Headwater's to the other's. What is not installed is left out, and said.
    """
    rounds, elements = effort.rounds * 2, elements_of(effort)
    ours = pushed_rounds(effort)
    theirs = {}
    for name, (package, _) in RIVALS.items():
        if importlib.util.find_spec(package) is None:
            complain(f"{name} is left out: {package} is not installed")
        else:
            theirs[name] = measure(name, elements, rounds)
    ours += pushed_rounds(effort)  # before and after the others: machines drift
    return [
        Figure(
            "dense, sync, arrays pushed",
            1 / median(ours),
            "rounds/s",
            name,
            1 / median(times),
            median(times) / median(ours),
            1.0,
            at_most=False,
        )
        for name, times in theirs.items()
    ]
