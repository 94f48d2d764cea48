"""A worker that joins a cluster by itself, and trains again from the start when training begins anew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from headwater.engines.engine import Failure, called
from headwater.errors import ConnectionLostError, FinishedError, RefusedError, RewoundError, WorkerError
from headwater.loggers import logger
from headwater.messages import ClusterStatistics
from headwater.observe.metrics import statistics_of_worker
from headwater.observe.prometheus import MetricsServer
from headwater.spec.seconds import seconds
from headwater.standalone.patience import patiently
from headwater.wire.security import PLAIN, Security
from headwater.worker import Worker

_log = logger("headwater.worker")


class StandaloneWorker:
    """A process that runs `train` as a worker of the cluster at `coordinator`.

    Args:
        rank: which worker it is; None: the next free one.
        security: what all nodes of the cluster were given.
        wait: seconds for which a coordinator that cannot be reached is tried again.
        metrics: "HOST:PORT" where Prometheus scrapes what this node knows of itself.
        named: told who this node is, whenever that is known anew.
    """

    def __init__(
        self,
        train: Callable[[Worker], Any],
        coordinator: str,
        *,
        rank: int | None = None,
        security: Security = PLAIN,
        wait: float = 300.0,
        metrics: str | None = None,
        named: Callable[[str, int], None] = lambda role, index: None,
    ) -> None:
        self._train = train
        self._coordinator = coordinator
        self._rank = rank
        self._security = security
        self._wait = seconds("wait", wait, zero=True)
        self._metrics = metrics
        self._named = named
        self._worker: Worker | None = None
        self._cluster = ""

    def interrupt(self, number: int) -> None:
        """Have `run` end with SystemExit, after the call that the worker is in: for the handler of signal
        `number`."""
        code = 128 + number
        if self._worker is None:
            raise SystemExit(code)
        self._worker.dismiss(code)
        _log.warning("worker %d leaves after its next call", self._worker.rank)

    def run(self) -> None:
        """Train, and wait until every declared worker has; blocks. Trains again when training begins anew.

        Raises:
            WorkerError: `train` raised; carries its traceback.
            ConnectionLostError: there is no coordinator (any more), or it closed the cluster before the end.
            RefusedError: this worker was declared dead, or its rank is taken.
            OtherClusterError: at that address there is now the coordinator of another cluster.
            SystemExit: after `interrupt`.
        """
        with ExitStack() as undo:
            if self._metrics is not None:
                exporter = MetricsServer(
                    self._metrics, self._statistics, node="worker", security=self._security
                )
                undo.enter_context(closing(exporter))
            self._run_again()

    def readiness(self) -> tuple[bool, str]:
        """Whether it is a member now, and where it is in its training. From any thread."""
        worker = self._worker
        if worker is None:
            return False, "waits for the coordinator and the servers"
        return True, f"worker {worker.rank}, at version {worker.version}"

    def _statistics(self) -> ClusterStatistics:
        """What this worker last told the coordinator. Raises ConnectionLostError before the first time."""
        worker = self._worker
        told = worker.told if worker is not None else None
        if told is None:
            raise ConnectionLostError("this worker has made no step yet")
        return statistics_of_worker(told)

    def _run_again(self) -> None:
        while True:
            try:
                worker = patiently(self._join, self._wait)
            except FinishedError as error:
                _log.warning("nothing is left to do: %s", error)
                return
            except RewoundError as error:
                _log.warning("this worker joins again: %s", error)
                continue
            try:
                with worker:
                    self._rank = worker.rank
                    self._worker = worker
                    self._train_as(worker)
                    worker.finish()
                    return
            except RewoundError as error:
                _log.warning("worker %d: %s", worker.rank, error)
            finally:
                self._worker = None

    def _join(self) -> Worker:
        worker = Worker(self._coordinator, self._rank, security=self._security, cluster=self._cluster)
        self._cluster = worker.cluster
        self._named("worker", worker.rank)
        _log.info(
            "joined cluster %s as worker %d of %d, %s",
            worker.cluster[:8],
            worker.rank,
            worker.workers,
            worker.sync,
        )
        return worker

    def _train_as(self, worker: Worker) -> None:
        try:
            called(self._train, worker)
        except (RewoundError, ConnectionLostError, RefusedError):
            raise  # of the cluster, not of `train`
        except Exception as error:
            failure = Failure.of(error)
            raise WorkerError(worker.rank, failure.summary, failure.trace) from error
