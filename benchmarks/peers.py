"""Headwater's synchronous round beside other systems', measured in one run on one machine.

    python -m benchmarks.peers [--quick] [--json]

Run it from the root of a clone, where the extras `torch` and `ray` are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
from statistics import median

from benchmarks.rivals import RIVALS, measure
from headwater.bench.dense import elements_of, pushed_rounds
from headwater.bench.figures import FULL, QUICK, Effort, Figure, complain
from headwater.cli.bench import show


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


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Headwater beside other systems."
    )
    arguments.add_argument("--quick", action="store_true", help="fewer rounds: seconds, and less certain")
    arguments.add_argument("--json", action="store_true", help="for programs")
    asked = arguments.parse_args()
    show(measure_peers(QUICK if asked.quick else FULL), as_json=asked.json)
