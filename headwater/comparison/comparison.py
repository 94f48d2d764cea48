"""What a comparison found: its runs, in numbers and in a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwater.comparison.curve import Curve, began, ended
from headwater.comparison.experiment import Experiment
from headwater.comparison.intervals import Interval, mean_interval
from headwater.comparison.prediction import Costs, Prediction
from headwater.comparison.trials import TrialRun


@dataclass(frozen=True, slots=True)
class RankTime:
    """Where a rank's time went in one run, in seconds.

    Attributes:
        computing: between exchanges. planted: delays of the comparison. waiting: in exchanges with servers.
    """

    rank: int
    computing: float
    planted: float
    waiting: float


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run in numbers.

    Attributes:
        mode, straggler, seed: which one.
        seconds: from the first step's answer to the last one's.
        reached: seconds until the target; None: it was not reached.
        samples, steps, version: of all workers together, at the end.
        samples_per_s, steps_per_s: applied and late steps alike.
        waiting: share of the workers' time in exchanges with the servers.
        staleness: commits → steps; late: share of steps that were not applied.
        last: the metric's last value. at_equal_samples: its value once as many samples were read as the
            run with the fewest of this straggler read.
        ranks: where each rank's time went.
    """

    mode: str
    straggler: str
    seed: int
    seconds: float
    reached: float | None
    samples: int
    steps: int
    version: int
    samples_per_s: float
    steps_per_s: float
    waiting: float
    staleness: dict[int, int]
    late: float
    last: float
    at_equal_samples: float
    ranks: tuple[RankTime, ...]
    curve: Curve = field(repr=False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Modes under stragglers, measured and predicted.

    Attributes:
        experiment: what was asked.
        workers: of the measured runs.
        figures: one a run.
        costs: how long things took without stragglers; None where they were not measured.
        predictions: for the numbers of workers that were asked for, and the measured one.
        values: what the training function returned, by (mode, straggler, seed) and rank.
    """

    experiment: Experiment
    workers: int
    figures: tuple[RunFigures, ...]
    costs: Costs | None
    predictions: tuple[Prediction, ...]
    values: dict[tuple[str, str, int], dict[int, Any]] = field(repr=False)

    def of(self, mode: str, straggler: str) -> list[RunFigures]:
        """The runs of one mode under one straggler, by seed."""
        found = [one for one in self.figures if (one.mode, one.straggler) == (mode, straggler)]
        return sorted(found, key=lambda one: one.seed)

    def time_to_target(self, mode: str, straggler: str) -> Interval:
        """Seconds, over the seeds that reached it."""
        return mean_interval([one.reached for one in self.of(mode, straggler) if one.reached is not None])

    def rows(self) -> list[dict[str, Any]]:
        """A row a run, for a data frame: `pandas.DataFrame(comparison.rows())`."""
        names = [name for name in RunFigures.__slots__ if name not in ("ranks", "curve", "staleness")]
        return [
            {name: getattr(one, name) for name in names} | {"staleness": mean_staleness(one)}
            for one in self.figures
        ]

    @property
    def verdict(self) -> str:
        """Which mode reached the target sooner, in words; "no difference shown" where none was."""
        from headwater.comparison.verdict import verdict

        return verdict(self)

    def report(self, folder: str | Path = "compare") -> Path:
        """Write report.html, which needs no other file and no network, and results.json; path of the first.

        Raises:
            ConfigurationError: the folder cannot be made, or plotly is not installed.
        """
        from headwater.comparison.report import write_report

        return write_report(self, Path(folder))

    def __repr__(self) -> str:
        return f"Comparison({len(self.figures)} runs: {self.verdict})"


def figures_of(runs: Sequence[TrialRun], experiment: Experiment) -> tuple[RunFigures, ...]:
    """Each run in numbers."""
    curves = [Curve.of(run, experiment.smooth) for run in runs]
    fewest: dict[str, float] = {}
    for run, curve in zip(runs, curves, strict=True):
        last = float(curve.samples[-1]) if len(curve.samples) else 0.0
        fewest[run.straggler] = min(last, fewest.get(run.straggler, math.inf))
    return tuple(
        _figures(run, curve, experiment, fewest[run.straggler])
        for run, curve in zip(runs, curves, strict=True)
    )


def _figures(run: TrialRun, curve: Curve, experiment: Experiment, equal: float) -> RunFigures:
    steps = [step for notes in run.notes for step in notes.steps]
    seconds = max(ended(run) - began(run), 1e-9)
    ranks = tuple(_rank_time(run, rank) for rank in sorted({notes.rank for notes in run.notes}))
    in_all = sum(one.computing + one.planted + one.waiting for one in ranks)
    index = curve.reaches(experiment.target, experiment.smooth)
    samples = sum(max((step.samples for step in notes.steps), default=0) for notes in run.notes)
    return RunFigures(
        run.mode,
        run.straggler,
        run.seed,
        seconds,
        None if index is None else max(0.0, float(curve.time[index])),
        samples,
        len(steps),
        run.version,
        samples / seconds,
        len(steps) / seconds,
        sum(one.waiting for one in ranks) / in_all if in_all else 0.0,
        dict(Counter(step.staleness for step in steps if step.applied)),
        sum(not step.applied for step in steps) / max(1, len(steps)),
        float(curve.value[-1]) if len(curve.value) else math.nan,
        curve.at_samples(equal),
        ranks,
        curve,
    )


def _rank_time(run: TrialRun, rank: int) -> RankTime:
    """Without the first step of each incarnation, before which kernels are loaded and data made."""
    own = [step for notes in run.notes if notes.rank == rank for step in notes.steps[1:]]
    return RankTime(
        rank,
        sum(step.computing for step in own),
        sum(step.planted for step in own),
        sum(step.waiting for step in own),
    )


def mean_staleness(figures: RunFigures) -> float:
    """In commits; 0 without steps."""
    total = sum(figures.staleness.values())
    return sum(commits * steps for commits, steps in figures.staleness.items()) / total if total else 0.0


def mean_of(values: Sequence[float]) -> float:
    """NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
