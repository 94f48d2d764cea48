"""What safety costs: rounds with replicas, rounds with checkpoints, and how long a failover takes."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from headwater.bench.figures import Effort, Figure, complain, rounds_per_second
from headwater.cluster import Cluster
from headwater.errors import EngineError
from headwater.spec.rules import SGD, Adam, Rule
from headwater.worker import Worker

_WORKERS = _SERVERS = 2
_WAIT_S = 60.0
_TURNS = 3
_LARGER = 4
"""Checkpoints are measured with a model so many times as large: 400 MB."""


def measure_safety(effort: Effort) -> list[Figure]:
    """Replicas, failover and checkpoints; takes about two minutes at full effort, and 6 GB of memory."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        plain: list[float] = []
        replicated: list[float] = []
        for turn in range(_TURNS):  # a cluster each, since memory is found anew by each
            for replicas, times in ((0, plain), (1, replicated)):
                times += _rounds(effort, place / f"{turn}-{replicas}", replicas=replicas)
        case = "dense, sync, replicas=1"
        figures = [rounds_per_second(case, replicated, "without replicas", plain, 2.0)]
        figures.append(_failover(effort, place / "failover"))
        for rule, most in ((SGD(lr=0.01), 1.05), (Adam(lr=0.01), 1.12)):
            figures.append(_checkpoints(effort, place, rule, most))
    return figures


def _checkpoints(effort: Effort, place: Path, rule: Rule, most: float) -> Figure:
    """Rounds of a model of 400 MB with a checkpoint every 100, against rounds without."""
    count = max(100 * effort.rounds // 4, 10)
    every = max(count // 3, 5)
    measure = functools.partial(_rounds, effort, rule=rule, larger=_LARGER, count=count)
    without = measure(place / rule.name / "without")
    taken = measure(place / rule.name / "with", checkpoint=place / rule.name / "files", every=every)
    case = f"dense, sync, {rule.name}, a checkpoint every {every} commits"
    mean, limit = sum(taken) / len(taken), sum(without) / len(without)
    return Figure(case, 1 / mean, "rounds/s", "without", 1 / limit, mean / limit, most)


def _rounds(
    effort: Effort,
    folder: Path,
    *,
    rule: Rule | None = None,
    larger: int = 1,
    count: int = 0,
    replicas: int = 0,
    **options: object,
) -> Sequence[float]:
    """Seconds of each round of the first worker, once everything is in place."""
    folder.mkdir(parents=True)
    count = count or effort.rounds * effort.repeats
    work = functools.partial(_train, effort, folder, rule or SGD(lr=0.01), larger, count)
    with Cluster(**_options(replicas), **options) as cluster:  # type: ignore[arg-type]
        _start(cluster, work, folder)
        values = _values(cluster)
    times = values[0]
    return [after - before for before, after in itertools.pairwise(times)]


def _failover(effort: Effort, folder: Path) -> Figure:
    """Seconds from the kill of a server to the next step that anybody finished; the limit is 2."""
    folder.mkdir(parents=True)
    work = functools.partial(_train, effort, folder, SGD(lr=0.01), 1, 0)
    waits = []
    with Cluster(**_options(1)) as cluster:  # type: ignore[arg-type]
        _start(cluster, work, folder)
        kills = []
        for number in range(min(effort.repeats, 5)):
            _until_replicated(cluster)
            index = number % _SERVERS
            nodes = cluster.statistics().nodes
            victim = next(node for node in nodes if node.role == "server" and node.index == index)
            kills.append(time.monotonic())
            os.kill(victim.pid, signal.SIGKILL)
        _until_replicated(cluster)
        (folder / "stop").touch()
        finished = sorted(at for times in _values(cluster).values() for at in times)
    for kill in kills:
        # What was answered before the kill may arrive just after it.
        waits.append(next(at for at in finished if at > kill + 0.005) - kill)
    return Figure(
        "failover, kill to next commit", median(waits), "s", "what is allowed", 2.0, max(waits) / 2.0, 1.0
    )


def _options(replicas: int) -> dict[str, object]:
    return {
        "workers": _WORKERS,
        "servers": _SERVERS,
        "engine": "local",
        "replicas": replicas,
        "output": complain,
    }


def _start(cluster: Cluster, work: functools.partial[list[float]], folder: Path) -> None:
    for rank in range(_WORKERS):
        cluster.start_worker(rank, work)
    _until_replicated(cluster)
    (folder / "go").touch()


def _until_replicated(cluster: Cluster) -> None:
    """Wait until every worker has declared the model and every server has what standby it should have."""
    until = time.monotonic() + _WAIT_S
    while True:
        statistics = cluster.statistics()
        workers = [node for node in statistics.nodes if node.role == "worker"]
        if len(workers) == _WORKERS and statistics.models and not statistics.unreplicated:
            return
        if time.monotonic() > until:
            raise EngineError(f"the cluster was not complete within {_WAIT_S:g} s: {statistics}")
        time.sleep(0.05)


def _values(cluster: Cluster) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    while len(values) < _WORKERS:
        outcome = cluster.next_outcome(1.0)
        if outcome is not None and outcome.failure is not None:
            raise outcome.as_error()
        if outcome is not None:
            values[outcome.index] = outcome.value
    return values


# ── in the workers ──────────────────────────────────────────────────────────────────────────────


def _train(effort: Effort, folder: Path, rule: Rule, larger: int, count: int, worker: Worker) -> list[float]:
    """When each step was finished (monotonic, one clock for all processes): `count` steps, or until told."""
    tensors = effort.tensors(1.0)
    shapes = {f"{part}.{name}": value for part in range(larger) for name, value in tensors.items()}
    model = worker.model("resnet50", shapes, rule)
    model.push({name: value * 1e-6 for name, value in shapes.items()})
    worker.step()
    while not (folder / "go").exists():
        time.sleep(0.01)
    worker.barrier()
    times = [time.monotonic()]
    while len(times) <= count or (not count and not (folder / "stop").exists()):
        for name in model.gradients:
            model.local.carry(name)
        worker.step()
        times.append(time.monotonic())
    return times
