"""Runs: a cluster of its own for each mode, straggler and seed, and what its workers noted.

A worker that is killed as planned is not an error. What it noted is in a file by then.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.cluster import Cluster
from headwater.comparison.experiment import Experiment
from headwater.comparison.prediction import Costs
from headwater.engines import Outcome
from headwater.spec.stragglers import Straggler, Undisturbed
from headwater.worker import Worker
from headwater.worker.trial import IncarnationNotes, TrialPlan, in_trial, notes_in

_LOOK_S = 0.1
_RESTARTS = 3
_FIRST = 3
"""Steps of a calibration that are not counted: kernels are compiled and memory is touched in them."""


@dataclass(frozen=True, slots=True)
class TrialRun:
    """One cluster from its start to its end.

    Attributes:
        mode, straggler: as texts; seed: of delays and of the script.
        workers: how many were declared.
        notes: of every incarnation, by rank.
        version: number of commits; values: what the training function returned, by rank.
    """

    mode: str
    straggler: str
    seed: int
    workers: int
    notes: tuple[IncarnationNotes, ...]
    version: int
    values: dict[int, Any]


class TrialFunction:
    """A user's training function, in a trial. Travels to the worker's process."""

    def __init__(self, train: Callable[[Worker], Any], plan: TrialPlan) -> None:
        self._train, self._plan = train, plan

    def __call__(self, worker: Worker) -> Any:
        with in_trial(worker, self._plan):
            return self._train(worker)


class Trials:
    """Runs of one training function under one configuration.

    Args:
        options: keywords of `Cluster`, without `sync`.
    """

    def __init__(
        self, train: Callable[[Worker], Any], experiment: Experiment, options: dict[str, Any]
    ) -> None:
        self._train, self._experiment = train, experiment
        self._options = options

    def calibrate(self) -> Costs:
        """Measure how long things take: one worker alone, then all, synchronously and undisturbed.

        The last worker of a round waits for nobody, so the shortest wait of each round is that of the
        exchange and of the servers' work for one update a worker.
        """
        alone = self._measure(1)
        workers = self._options.get("workers", 2)
        together = self._measure(workers) if workers > 1 else alone
        step_s = self._experiment.step_s
        steps = (step_s,) if step_s is not None else tuple(together[0])
        update = max(0.0, (together[1] - alone[1]) / (workers - 1)) if workers > 1 else 0.0
        return Costs(steps, max(0.0, alone[1] - update), update)

    def _measure(self, workers: int) -> tuple[list[float], float]:
        """Seconds that steps compute, and the median over the rounds of the shortest wait."""
        run = self.run("sync", Undisturbed(), 0, 1.0, limit=self._experiment.calibration, workers=workers)
        steps = [note.steps for note in run.notes]
        skipped = _FIRST if min(map(len, steps)) > 2 * _FIRST else 0
        computing = [one.computing for own in steps for one in own[skipped:]]
        waits = [min(one.waiting for one in turn) for turn in zip(*steps, strict=False)][skipped:]
        return computing or [1e-6], float(np.median(waits)) if waits else 0.0

    def run(
        self,
        mode: str,
        straggler: Straggler,
        seed: int,
        step_s: float,
        *,
        limit: int | None = None,
        workers: int | None = None,
    ) -> TrialRun:
        """One cluster from its start to its end; blocks until all workers have returned or died as planned.

        Raises:
            WorkerError: the training function raised, or a process died that was not to.
            HeadwaterError: as `headwater.run`.
        """
        options = {**self._options, "sync": mode}
        options["settings"] = {**(options.get("settings") or {}), "seed": seed}
        if workers is not None:
            options["workers"] = workers
            options["min_workers"] = min(options.get("min_workers", 1), workers)
        with tempfile.TemporaryDirectory(prefix="headwater-trial-") as folder:
            metric, splits = self._experiment.target.metric, self._experiment.splits
            plan = TrialPlan(straggler, seed, step_s, metric, folder, limit, splits)
            with Cluster(engine=self._experiment.engine, **options) as cluster:
                values = _train(cluster, TrialFunction(self._train, plan), straggler)
                version = cluster.statistics().version
            notes = notes_in(Path(folder))
        return TrialRun(mode, str(straggler), seed, cluster.config.workers, tuple(notes), version, values)


def _train(cluster: Cluster, train: TrialFunction, straggler: Straggler) -> dict[int, Any]:
    """What each worker returned, by rank; None of one that died for good."""
    workers = cluster.config.workers
    planned = {rank: outage for rank in range(workers) if (outage := straggler.outage(rank)) is not None}
    left = dict.fromkeys(range(workers), _RESTARTS)
    due: list[tuple[float, int]] = []
    values: dict[int, Any] = {}
    cluster.reserve_ranks()
    for rank in range(workers):
        cluster.start_worker(rank, train)
    while len(values) < workers:
        outcome = cluster.next_outcome(_LOOK_S)
        if outcome is not None and outcome.failure is None:
            values[outcome.index] = outcome.value
        elif outcome is not None and (outage := _planned(outcome, planned)) is not None:
            del planned[outcome.index]
            if outage.after is None:
                values[outcome.index] = None
            else:
                due.append((time.monotonic() + outage.after, outcome.index))
        elif outcome is not None:
            assert outcome.failure is not None
            if not outcome.failure.died or not left[outcome.index]:
                raise outcome.as_error()
            left[outcome.index] -= 1
            cluster.start_worker(outcome.index, train)
        for when, rank in [one for one in due if one[0] <= time.monotonic()]:
            due.remove((when, rank))
            cluster.start_worker(rank, train)
    return values


def _planned(outcome: Outcome, planned: dict[int, Any]) -> Any:
    """The outage that this end of a process is; None for any other end."""
    assert outcome.failure is not None
    return planned.get(outcome.index) if outcome.failure.died else None
