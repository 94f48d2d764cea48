"""What `compare --simulate` predicts for 2 and for 4 workers, beside what as many real workers do.

Steps take time and no processor, so that a machine of two cores has room for four workers: what is held
against each other is who waits for whom, and how long an exchange takes.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure
from headwater.comparison import compare
from headwater.comparison.comparison import RunFigures
from headwater.spec.rules import SGD
from headwater.worker import Worker

_STEP_S = 0.02
_STEPS = 120
_SEEDS = 3
_MODES = ("sync", "async", "ssp:3", "sync:quorum=1")
_STRAGGLERS = ("none", "slow:rank=0,factor=3")


def measure_predictions(effort: Effort) -> list[Figure]:
    """Applied steps a second of all workers; the ratio is that of the larger to the smaller figure."""
    return [figure for workers in (2, 4) for figure in _measure(workers, effort.repeats > 1)]


def _measure(workers: int, whole: bool) -> list[Figure]:
    found = compare(
        _train if whole else _train_shortly,
        until="loss=0.01",
        modes=_MODES,
        stragglers=_STRAGGLERS,
        seeds=_SEEDS if whole else 1,
        workers=workers,
        simulate=[workers],
    )
    figures = []
    for one in found.predictions:
        pace = median(pace_while_all_train(run) for run in found.of(one.mode, one.straggler))
        ratio = max(one.steps_per_s / pace, pace / one.steps_per_s)
        case = f"{workers} workers, {one.mode}, {one.straggler}"
        figures.append(Figure(case, pace, "steps/s", "predicted", one.steps_per_s, ratio, 1.1))
    return figures


def pace_while_all_train(run: RunFigures) -> float:
    """Applied steps a second of all workers, until one of them ends: what is predicted has no end."""
    per_rank = [rank.computing + rank.planted + rank.waiting for rank in run.ranks]
    steps, share = run.steps // len(per_rank) - 1, min(per_rank)
    return (1 - run.late) * sum(steps * share / own for own in per_rank) / share


def _train(worker: Worker) -> None:
    _sleepy(worker, _STEPS)


def _train_shortly(worker: Worker) -> None:
    _sleepy(worker, _STEPS // 6)


def _sleepy(worker: Worker, steps: int) -> None:
    model = worker.model("m", {"w": np.zeros(8, np.float32)}, SGD(lr=0.1))
    for step in range(steps):
        time.sleep(_STEP_S)
        model.push({"w": np.ones(8, np.float32)})
        worker.step()
        worker.log(loss=1 / (1 + step))
