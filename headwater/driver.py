"""Train: start a cluster, run a function in every worker, collect what they return."""

from __future__ import annotations

import reprlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from headwater.cluster import Cluster, ClusterKeywords, NodeConfig, NodeOptions
from headwater.engines import Outcome, RayEngine
from headwater.errors import (
    CheckpointError,
    ClusterEndedError,
    ConfigurationError,
    HeadwaterError,
)
from headwater.loggers import logger
from headwater.messages import ClusterStatistics
from headwater.observe.display import both, display_for, is_watched
from headwater.observe.history import History
from headwater.spec.amounts import whole
from headwater.spec.cluster import ClusterConfig, ClusterOptions
from headwater.spec.keywords import chosen, takes
from headwater.spec.words import option
from headwater.worker import Worker

_log = logger("headwater")

_WATCH_S = 0.5
_LAST_S = 60
"""How long an interrupted run may take for its last checkpoint, in seconds."""
_LOOK_S = 0.1
"""How often it looks whether it was interrupted again, in seconds."""


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """What a run left.

    Attributes:
        values: what `train` returned, by rank.
        parameters: model → tensor → float32 array, as of `version`, read before the servers stopped.
        version: the number of commits.
        statistics: the cluster's, at the end.
        seconds: from the first worker's start to the last one's end.
        checkpoint: path of the newest checkpoint; None without a directory for them.
        checkpoint_error: why the last checkpoint could not be written, such as a full disk; else None.
        history: what workers logged with `Worker.log`, a row for each value: `pandas.DataFrame(history)`;
            `history.curve(name)` for a plot.
    """

    values: list[Any]
    parameters: dict[str, dict[str, NDArray[np.float32]]]
    version: int
    statistics: ClusterStatistics
    seconds: float
    checkpoint: str | None = None
    checkpoint_error: CheckpointError | None = None
    history: History = field(default_factory=History)

    def __repr__(self) -> str:
        """A line: arrays are counted, not printed."""
        models = {
            name: f"{len(tensors)} tensors, {sum(array.size for array in tensors.values()):,} elements"
            for name, tensors in self.parameters.items()
        }
        return (
            f"RunResult(version={self.version}, seconds={self.seconds:.1f}, "
            f"values={reprlib.repr(self.values)}, parameters={models}, checkpoint={self.checkpoint!r}, "
            f"history={self.history!r})"
        )


@takes((ClusterConfig, ClusterOptions), (NodeConfig, NodeOptions))
def run(
    train: Callable[[Worker], Any],
    *,
    engine: str | RayEngine = "local",
    restarts: int = 3,
    started: Callable[[str], None] | None = None,
    watch: Callable[[ClusterStatistics], None] | None = None,
    progress: bool | None = None,
    **options: Unpack[ClusterKeywords],
) -> RunResult:
    """Run `train(worker)` in every worker of a new cluster; blocks until all have returned.

    `train` may be any function: of a module, a script without a guard, a notebook, a closure.

    A worker whose process dies, or is not heard of for its lease, is started again, as a new incarnation of
    its rank; the others go on meanwhile. When training begins anew from a checkpoint, `train` is called again
    in every worker. With a checkpoint directory a last checkpoint is written at the end.

    Args:
        train: called with a `Worker` in every worker; what it returns comes back.
        engine: "local" (processes of this machine), "ray" (actors) or a `RayEngine`, "inline" (threads).
        restarts: how often the worker of one rank may die; an exception in `train` ends the run at once.
        started: gets the cluster's address, once; what it raises ends the run.
        watch: gets the cluster's statistics twice a second; what it raises ends the run and is raised.
        progress: show how it goes on standard error, a line for each worker from the beginning, and what
            workers print above it. None: on a terminal and in a notebook.

    Raises:
        WorkerError: `train` raised in a worker, or its process died too often; carries rank and traceback.
        EngineError: a node could not be started, or a server died and nothing takes its place.
        ConfigurationError: an impossible argument; nothing was started.
        CheckpointError: there are checkpoints to resume from, and none is good. That the last one cannot be
            written is told by `RunResult.checkpoint_error`.
        ClusterEndedError: `headwater stop` has ended it, after a last checkpoint.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM; where there is a directory, a last checkpoint
            was written, for at most a minute. A second signal ends the run at once.
    """
    restarts = whole(option("restarts"), restarts, 0)
    for name, callback in {"train": train, "started": started, "watch": watch}.items():
        if not callable(callback) and (name == "train" or callback is not None):
            raise ConfigurationError(f"{name}: got {callback!r}, expected a function")
    if progress is not None and not isinstance(progress, bool):
        raise ConfigurationError(f"progress: got {progress!r}, expected True, False or None")
    if not (progress or (progress is None and is_watched())):
        return _run(train, engine, restarts, started, watch, options)
    (of_cluster, _) = chosen(options, ClusterConfig, NodeConfig)
    with display_for(ClusterConfig.of(**of_cluster).workers, train) as display:
        options.setdefault("output", display.print)
        started, watch = both(display.started, started), both(display.show, watch)
        result = _run(train, engine, restarts, started, watch, options)
        display.show(result.statistics)
    return result


def _run(
    train: Callable[[Worker], Any],
    engine: str | RayEngine,
    restarts: int,
    started: Callable[[str], None] | None,
    watch: Callable[[ClusterStatistics], None] | None,
    options: ClusterKeywords,
) -> RunResult:
    with Cluster(engine=engine, **options) as cluster:
        cluster.reserve_ranks()
        if started is not None:
            started(cluster.address)
        began = time.monotonic()
        for rank in range(cluster.config.workers):
            cluster.start_worker(rank, train)
        with _last_checkpoint_of(cluster):
            values = _collect(cluster, train, restarts, watch)
        seconds = time.monotonic() - began
        failure = _take_last_checkpoint(cluster)
        version, parameters = cluster.parameters()
        return RunResult(
            [values[rank] for rank in range(cluster.config.workers)],
            parameters,
            version,
            cluster.statistics(),
            seconds,
            cluster.last_checkpoint,
            failure,
            cluster.history,
        )


def _take_last_checkpoint(cluster: Cluster) -> CheckpointError | None:
    """Write it; where the disk refuses, why. What training came to is still in the servers' memory then."""
    try:
        cluster.take_last_checkpoint()
    except CheckpointError as error:
        _log.warning("no last checkpoint: %s; the result has the parameters", error)
        return error
    return None


@contextmanager
def _last_checkpoint_of(cluster: Cluster) -> Iterator[None]:
    """Where Ctrl-C, SIGTERM or `headwater stop` ends the block, write a last checkpoint first.

    For at most `_LAST_S` seconds; a second signal ends this at once. SIGTERM counts where run is called in
    the main thread of a program that does not handle it.
    """
    with _terminated_by_exit():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, ClusterEndedError) as error:
            if cluster.config.checkpoint and cluster.complete():
                _log.warning(
                    "%s: writing a last checkpoint, for at most %d s; Ctrl-C to end at once",
                    "interrupted" if isinstance(error, KeyboardInterrupt) else "told to end",
                    _LAST_S,
                )
                with _interrupts() as interrupted:
                    writing = threading.Thread(target=_write_last, args=(cluster,), daemon=True)
                    writing.start()
                    until = time.monotonic() + _LAST_S
                    while writing.is_alive() and not interrupted.is_set() and time.monotonic() < until:
                        writing.join(_LOOK_S)
            raise


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set with a Ctrl-C in the block: the KeyboardInterrupt itself is lost where it comes in a callback of
    the interpreter, such as that of a weak reference."""
    interrupted = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def noted(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, noted)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _write_last(cluster: Cluster) -> None:
    try:
        cluster.take_last_checkpoint()
        _log.warning("last checkpoint: %s", cluster.last_checkpoint)
    except HeadwaterError as error:
        _log.warning("no last checkpoint: %s", error)


@contextmanager
def _terminated_by_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block; a second one ends this process at once."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collect(
    cluster: Cluster,
    train: Callable[[Worker], Any],
    restarts: int,
    watch: Callable[[ClusterStatistics], None] | None,
) -> dict[int, Any]:
    """What each worker returned, by rank; starts those that died again, and raises any other failure.

    One that had finished when training began anew is started again, too: all are needed for what follows.
    """
    workers = cluster.config.workers
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
