"""The coordinator of a cluster whose servers and workers come by themselves, and its checkpoints."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Sequence

from headwater.errors import CheckpointError, ConfigurationError, HeadwaterError, RewoundError
from headwater.loggers import logger
from headwater.machines.coordinator import EndAsked
from headwater.messages import ClusterStatistics, Refused
from headwater.observe.otlp import OtlpExporter
from headwater.observe.prometheus import MetricsServer
from headwater.observe.recorder import Recorder
from headwater.observe.sinks import LogSink
from headwater.runtime.coordinator import CoordinatorNode, Serving
from headwater.spec.cluster import ClusterConfig
from headwater.spec.words import option
from headwater.storage import Storage
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logger("headwater.coordinator")

_AGAIN_S = 2.0
"""Between two attempts to write a last checkpoint that the disk refused, in seconds."""


class StandaloneCluster:
    """Takes in whoever comes, until every declared worker has finished.

    With a journal it may be killed and started again: training goes on meanwhile and afterwards. For that
    its address must be the same at every start.

    Args:
        config: what holds for the cluster, and where its checkpoints go.
        metrics: "HOST:PORT" where Prometheus scrapes them.
        otlp: URL of an OpenTelemetry collector that gets them.
        log_to: sinks that get what workers log.

    Attributes:
        address: where nodes join.

    Raises:
        ConfigurationError: the directory, the journal or the address is in use.
        JournalError: the journal is damaged.
        CheckpointError: the directory cannot be used.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        journal: str | os.PathLike[str] = "",
        reach: Endpoint = LOCAL,
        metrics: str | None = None,
        otlp: str | None = None,
        log_to: Sequence[LogSink] = (),
    ) -> None:
        if journal and not reach.is_fixed:
            raise ConfigurationError(
                "a coordinator with a journal must be found again where it was: pass "
                f"{option('bind', 'HOST:PORT')} with a port, or unix:/path"
            )
        self._journal = journal
        self._security = reach.security
        self._deadline = config.deadline
        self._give_up_at: float | None = None  # of the last checkpoint, which the disk refused
        self._events: queue.SimpleQueue[HeadwaterError | EndAsked | int | None] = queue.SimpleQueue()
        self._recorder = Recorder(log_to)
        try:
            self._storage = Storage(config)
        except BaseException:
            self._recorder.close()
            raise
        try:
            self._node = CoordinatorNode(
                config,
                on_end_asked=lambda by: self._events.put(EndAsked(by)),
                write_checkpoint=self._storage.take_now,
                on_logged=self._recorder.take,
                generation=self._storage.generation,
                journal=journal,
                reach=reach,
                serving=Serving(self._restore, self._events.put),
            )
        except BaseException:
            self._storage.close()
            self._recorder.close()
            raise
        self.address = self._node.address
        self._metrics: MetricsServer | None = None
        self._otlp: OtlpExporter | None = None
        try:
            if metrics is not None:
                self._metrics = MetricsServer(metrics, self._node.statistics, security=self._security)
            if otlp is not None:
                self._otlp = OtlpExporter(otlp, self._node.statistics)
            self._keep_checkpoints()
        except BaseException:
            self.close()
            raise

    def interrupt(self, number: int) -> None:
        """Have `run` end; from any thread, and from a signal's handler, with its number."""
        self._events.put(number)

    def run(self) -> int:
        """Block until every declared worker has finished; then takes a last checkpoint and tells all members.

        What the disk refuses then is tried again for the deadline, since nobody but the servers has it.

        After `interrupt` it takes a last checkpoint too, and ends: the cluster with it, or this coordinator
        alone where it has a journal and the number is not SIGINT's.

        Returns:
            0, also where `headwater stop` has ended it, or the number that `interrupt` was given.

        Raises:
            HeadwaterError: the cluster cannot go on, and why.
        """
        try:
            while True:
                event = self._next_event()
                if isinstance(event, int):
                    self._interrupted(event)
                    return event
                if isinstance(event, EndAsked):
                    self._end(f"it was ended by {event.by}")
                    return 0
                if event is not None:
                    raise event
                if self._node.finished() and self._finish():
                    return 0
        finally:
            self.close()

    def statistics(self) -> ClusterStatistics:
        """The cluster's; blocks for the servers' answers."""
        return self._node.statistics()

    def close(self) -> None:
        """End the cluster; idempotent. Members are told."""
        if self._metrics is not None:
            self._metrics.close()
        if self._otlp is not None:
            self._otlp.close()
        self._node.close()
        self._storage.close()
        self._recorder.close()

    def _next_event(self) -> HeadwaterError | EndAsked | int | None:
        """What has happened; None: every declared worker has finished, or the disk may have room by now."""
        try:
            return self._events.get(timeout=None if self._give_up_at is None else _AGAIN_S)
        except queue.Empty:
            return None

    def _finish(self) -> bool:
        """Everybody has done his work; False where that was lost at the last moment, or the disk is full."""
        try:
            self._storage.take_last()
        except RewoundError as error:
            _log.warning("no last checkpoint: %s", error)
            self._keep_checkpoints()
            return False
        except CheckpointError as error:
            if not self._is_given_up():
                _log.error(
                    "no last checkpoint: %s; it is tried again every %g s, for %g s in all, and the servers "
                    "keep what was trained so long: make room",
                    *(error, _AGAIN_S, self._deadline),
                )
                return False
            self._node.end("CheckpointError", f"no last checkpoint could be written: {error}")
            raise
        except HeadwaterError as error:
            self._node.end(type(error).__name__, f"no last checkpoint could be written: {error}")
            raise
        self._node.finish()
        return True

    def _is_given_up(self) -> bool:
        """Whether the last checkpoint has been tried for as long as it is."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._deadline
        return now >= self._give_up_at

    def _interrupted(self, number: int) -> None:
        if self._journal and number != signal.SIGINT:
            self._take_last()
            _log.warning("the coordinator ends alone: start it again on its journal, %s", self._journal)
            self._node.halt()
        else:
            self._end("the cluster is closed")

    def _end(self, why: str) -> None:
        """End the cluster before its workers have finished."""
        self._take_last()
        self._node.finish(Refused("ClusterEndedError", why))

    def _take_last(self) -> None:
        if self._node.complete():
            try:
                self._storage.take_last()
            except HeadwaterError as error:
                _log.warning("no last checkpoint: %s", error)

    def _keep_checkpoints(self) -> None:
        self._storage.sign(self._node.cluster)
        self._storage.begin(self._node.addresses[0], self._node.checkpointed, security=self._security)

    def _restore(self, begun: bool, first: int) -> str:
        """The checkpoint that a generation begins with."""
        if begun:
            self._storage.rewind(first)
        else:
            self._storage.resume()
        return self._storage.restore
