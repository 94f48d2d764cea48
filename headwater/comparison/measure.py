"""`compare`: run every mode under every straggler with every seed, and predict the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from headwater.cluster import ClusterKeywords, NodeConfig, NodeOptions
from headwater.comparison.comparison import Comparison, figures_of
from headwater.comparison.experiment import Experiment, check_folder
from headwater.comparison.prediction import Costs, Prediction, predict
from headwater.comparison.report import check_plots
from headwater.comparison.trials import TrialRun, Trials
from headwater.errors import ConfigurationError
from headwater.spec.cluster import ClusterConfig, ClusterOptions
from headwater.spec.keywords import chosen, takes
from headwater.spec.stragglers import Straggler
from headwater.spec.sync import Mode
from headwater.spec.words import option
from headwater.worker import Worker
from headwater.worker.plan import SplitKind

NO_OPTION = ("sync", "checkpoint", "resume", "every", "keep", "on_server_loss")
"""Fields of `ClusterConfig` that have no place in a comparison."""


@takes((ClusterConfig, ClusterOptions), (NodeConfig, NodeOptions), without=NO_OPTION)
def compare(
    train: Callable[[Worker], Any],
    *,
    until: str,
    modes: Sequence[str | Mode] = ("sync", "ssp:3", "async"),
    stragglers: Sequence[str | Straggler] = ("none",),
    seeds: int = 3,
    simulate: Sequence[int] = (),
    out: str | Path | None = None,
    smooth: int = 10,
    step_s: float | None = None,
    engine: str = "local",
    splits: SplitKind = "static",
    progress: Callable[[str], None] | None = None,
    **options: Unpack[ClusterKeywords],
) -> Comparison:
    """Train in every mode, under every straggler, with every seed; blocks until all runs are over.

    Every mode gets the same data in the same order, the same seeds and the same delays. The seed is
    `worker.settings["seed"]`; the global generators of Python, NumPy and torch are seeded with it. Delays are
    planted by the worker, between the computing of a step and its sending; a training function needs no
    change. It must log the metric: `worker.log(loss=…)`.

    Args:
        train: as for `run`.
        until: the target: a metric of `worker.log` and its value, as "loss=0.35" (at most) or
            "accuracy>=0.9". Runs go on to the end of `train`: quality at equal samples is compared too.
        modes: as for `run(sync=…)`.
        stragglers: "none", "slow:rank=0,factor=3", "lognormal:sigma=1,median=0.5", "pareto:shape=2",
            "pause:rank=0,step=20,seconds=2", "death:rank=1,step=20", "return:rank=1,step=20,after=5".
        seeds: how many runs of each.
        simulate: numbers of workers for which every mode and straggler is predicted in virtual time.
        out: a folder for report.html and results.json; None: none are written.
        smooth: how many logged values are averaged before they are compared with the target.
        step_s: how long an undisturbed step takes, in seconds: a delay of one step. None: measured before.
        engine: "local" (processes of this machine) or "inline" (threads).
        splits: "static": each worker reads a part of its own, in every mode, so the data come in the same
            order in all. "dynamic": as without a comparison, so modes without rounds lease splits, and a slow
            worker reads less.
        progress: gets a line before each run.

    Raises:
        ConfigurationError: an impossible argument, or nobody logged the metric: names those that were.
        WorkerError: `train` raised in a worker, or a process died that was not to.
        HeadwaterError: as `run`.
    """
    if not callable(train):
        raise ConfigurationError(f"train: got {train!r}, expected a function that takes a worker")
    of_cluster, of_nodes = chosen(options, ClusterConfig, NodeConfig)
    for name in NO_OPTION:
        if name in of_cluster:
            raise ConfigurationError(
                f"compare: {option(name)} has no place in a comparison: modes are what `modes` lists, and "
                "no run keeps checkpoints"
            )
    config = ClusterConfig.of(**of_cluster)
    experiment = Experiment.of(
        config,
        modes=modes,
        stragglers=stragglers,
        seeds=seeds,
        until=until,
        smooth=smooth,
        simulate=simulate,
        step_s=step_s,
        engine=engine,
        splits=splits,
    )
    if out is not None:
        check_plots()
        check_folder(out)
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    trials = Trials(
        train, experiment, {name: value for name, value in own.items() if name not in NO_OPTION} | of_nodes
    )
    compared = _measure(trials, experiment, config.workers, progress or (lambda line: None))
    if out is not None:
        compared.report(out)
    return compared


def _measure(
    trials: Trials, experiment: Experiment, workers: int, progress: Callable[[str], None]
) -> Comparison:
    costs: Costs | None = None
    if experiment.step_s is None or experiment.simulate:
        progress("measuring how long steps and exchanges take")
        costs = trials.calibrate()
    step_s = experiment.step_s or (costs.step if costs is not None else 0.0)
    runs: list[TrialRun] = []
    planned = list(experiment.runs())
    for number, (straggler, seed, mode) in enumerate(planned, 1):
        progress(f"run {number} of {len(planned)}: {mode}, {straggler}, seed {seed}")
        runs.append(trials.run(mode, straggler, seed, step_s))
        if number == 1:
            _check_logged(runs[0], experiment)
    predictions: list[Prediction] = []
    if costs is not None and experiment.simulate:
        progress("predicting in virtual time")
        predictions = _predict(experiment, costs, workers)
    return Comparison(
        experiment,
        workers,
        figures_of(runs, experiment),
        costs,
        tuple(predictions),
        {(run.mode, run.straggler, run.seed): run.values for run in runs},
    )


def _predict(experiment: Experiment, costs: Costs, workers: int) -> list[Prediction]:
    """For each mode, straggler and number of workers that has the ranks which the straggler names."""
    return [
        predict(mode, workers=count, costs=costs, straggler=straggler)
        for straggler in experiment.stragglers
        for mode in experiment.modes
        for count in sorted({*experiment.simulate, workers})
        if all(rank < count for rank in straggler.ranks())
    ]


def _check_logged(run: TrialRun, experiment: Experiment) -> None:
    """The first run says whether there is anything to compare, before all others are made."""
    metric = experiment.target.metric
    names = sorted({name for notes in run.notes for name in notes.metrics})
    if metric not in names:
        known = f"it logged {', '.join(names)}" if names else "it logged nothing"
        raise ConfigurationError(
            f"{option('until')}: the training function never logged {metric!r}: {known}; call "
            f"worker.log({metric}=…) after each step"
        )
    if not any(notes.steps for notes in run.notes):
        raise ConfigurationError("compare: the training function took no step: there is nothing to compare")
