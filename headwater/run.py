"""Train: start a cluster, run a function in every worker, collect what they return."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from headwater.cluster import Cluster, ClusterOptions
from headwater.engines import Outcome, RayEngine
from headwater.errors import ConfigurationError
from headwater.messages import ClusterStatistics
from headwater.spec.sync import Mode
from headwater.worker import Worker

_log = logging.getLogger("headwater")

_WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left.

    Attributes:
        values: what `train` returned, by rank.
        parameters: model → tensor → float32 array, as of `version`, read before the servers stopped.
        version: the number of commits.
        statistics: the cluster's, at the end.
        seconds: from the first worker's start to the last one's end.
        checkpoint: path of the newest checkpoint; None without a directory for them.
    """

    values: list[Any]
    parameters: dict[str, dict[str, NDArray[np.float32]]]
    version: int
    statistics: ClusterStatistics
    seconds: float
    checkpoint: str | None = None


def run(
    train: Callable[[Worker], Any],
    *,
    workers: int = 2,
    servers: int = 1,
    sync: str | Mode = "sync",
    engine: str | RayEngine = "local",
    replicas: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    patience: float = 10.0,
    deadline: float = 600.0,
    min_workers: int = 1,
    restarts: int = 3,
    started: Callable[[str], None] | None = None,
    watch: Callable[[ClusterStatistics], None] | None = None,
    **options: Unpack[ClusterOptions],
) -> RunResult:
    """Run `train(worker)` in `workers` workers against `servers` servers; blocks until all have returned.

    The arguments are those of `Cluster`, with processes as the default engine. `train` may be any
    function: of a module, a script without a guard, a notebook, a closure.

    A worker whose process dies is started again, as a new incarnation of its rank, `restarts` times; the
    others go on meanwhile. When training begins anew from a checkpoint, `train` is called again in every
    worker. With a checkpoint directory a last checkpoint is written at the end.

    Args:
        restarts: how often the process of one rank may die; an exception in `train` ends the run at once.
        started: gets the cluster's address once. watch: gets its statistics twice a second.

    Raises:
        WorkerError: `train` raised in a worker, or its process died too often; carries rank and traceback.
        EngineError: a node could not be started, or a server died and nothing takes its place.
        ConfigurationError: an impossible argument; nothing was started.
        CheckpointError: no checkpoint to resume from is good.
    """
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise ConfigurationError(f"restarts must be an integer ≥ 0, got {restarts!r}")
    cluster = Cluster(
        workers=workers,
        servers=servers,
        sync=sync,
        engine=engine,
        replicas=replicas,
        checkpoint=checkpoint,
        resume=resume,
        settings=settings,
        patience=patience,
        deadline=deadline,
        min_workers=min_workers,
        **options,
    )
    with cluster:
        cluster.reserve_ranks()
        if started is not None:
            started(cluster.address)
        began = time.monotonic()
        for rank in range(workers):
            cluster.start_worker(rank, train)
        values = _collect(cluster, train, workers, restarts, watch)
        seconds = time.monotonic() - began
        cluster.take_last_checkpoint()
        version, parameters = cluster.parameters()
        return RunResult(
            [values[rank] for rank in range(workers)],
            parameters,
            version,
            cluster.statistics(),
            seconds,
            cluster.checkpoint,
        )


def _collect(
    cluster: Cluster,
    train: Callable[[Worker], Any],
    workers: int,
    restarts: int,
    watch: Callable[[ClusterStatistics], None] | None,
) -> dict[int, Any]:
    """What each worker returned, by rank; starts those that died again, and raises any other failure.

    One that had finished when training began anew is started again, too: all are needed for what follows.
    """
    ended: dict[int, Outcome] = {}
    left = dict.fromkeys(range(workers), restarts)
    while len(ended) < workers:
        outcome = cluster.next_outcome(_WATCH_S)
        generation = cluster.generation
        if outcome is not None and outcome.failure is not None:
            if not outcome.failure.died or not left[outcome.index]:
                raise outcome.as_error()
            left[outcome.index] -= 1
            _log.warning("worker %d: %s; it is started again", outcome.index, outcome.failure.summary)
            cluster.start_worker(outcome.index, train)
        elif outcome is not None:
            ended[outcome.index] = outcome
        elif watch is not None:
            watch(cluster.statistics())
        for rank in [rank for rank, one in ended.items() if one.generation < generation]:
            del ended[rank]
            cluster.start_worker(rank, train)
    return {rank: outcome.value for rank, outcome in ended.items()}
