"""Train: start a cluster, run a function in every worker, collect what they return."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.cluster import Cluster
from headwater.messages import ClusterStatistics, Scalar
from headwater.nodes.worker import Worker
from headwater.sync import Sync

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
    """

    values: list[Any]
    parameters: dict[str, dict[str, NDArray[np.float32]]]
    version: int
    statistics: ClusterStatistics
    seconds: float


def run(
    train: Callable[[Worker], Any],
    *,
    workers: int = 2,
    servers: int = 1,
    sync: str | Sync = "sync",
    engine: str = "local",
    settings: Mapping[str, Scalar] | None = None,
    patience: float = 10.0,
    deadline: float = 600.0,
    rules: Sequence[str] = (),
    transport: str = "unix",
    output: Callable[[str], None] = print,
    started: Callable[[str], None] | None = None,
    watch: Callable[[ClusterStatistics], None] | None = None,
) -> RunResult:
    """Run `train(worker)` in `workers` workers against `servers` servers; blocks until all have returned.

    The arguments are those of `Cluster`, with processes as the default engine. `train` may be any
    function: of a module, a script without a guard, a notebook, a closure. `started` gets the
    cluster's address once, `watch` its statistics twice a second.

    Raises:
        WorkerError: `train` raised in a worker, or its process died; carries rank and traceback.
        EngineError: a node could not be started, or a server died.
        ConfigurationError: an impossible argument; nothing was started.
    """
    cluster = Cluster(
        workers=workers,
        servers=servers,
        sync=sync,
        engine=engine,
        settings=settings,
        patience=patience,
        deadline=deadline,
        rules=rules,
        transport=transport,
        output=output,
    )
    with cluster:
        if started is not None:
            started(cluster.address)
        began = time.monotonic()
        for rank in range(workers):
            cluster.start_worker(rank, train)
        values = _collect(cluster, workers, watch)
        seconds = time.monotonic() - began
        version, parameters = cluster.parameters()
        return RunResult(
            [values[rank] for rank in range(workers)], parameters, version, cluster.statistics(), seconds
        )


def _collect(
    cluster: Cluster, workers: int, watch: Callable[[ClusterStatistics], None] | None
) -> dict[int, Any]:
    """What each worker returned, by rank; raises the first failure."""
    values: dict[int, Any] = {}
    while len(values) < workers:
        outcome = cluster.next_outcome(_WATCH_S)
        if outcome is not None and outcome.failure is not None:
            raise outcome.as_error()
        if outcome is not None:
            values[outcome.index] = outcome.value
        elif watch is not None:
            watch(cluster.statistics())
    return values
