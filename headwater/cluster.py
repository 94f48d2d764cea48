"""A running cluster: coordinator in this process, servers where the engine puts them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from headwater.engines import Engine, Launch, Outcome, RayEngine, make_engine
from headwater.errors import ClosedError, ConfigurationError, UsageError
from headwater.messages import ClusterStatistics, ServerRole
from headwater.observe.otlp import OtlpExporter
from headwater.observe.prometheus import MetricsServer
from headwater.observe.recorder import Recorder, checked
from headwater.observe.sinks import LogSink
from headwater.observe.tracer import Tracer
from headwater.runtime.coordinator import CoordinatorNode
from headwater.runtime.verifier import Verification, verify
from headwater.spec.amounts import one_of, path
from headwater.spec.cluster import ClusterConfig, ClusterOptions, PathLike
from headwater.spec.keywords import chosen, means, takes
from headwater.spec.words import option
from headwater.storage import Storage
from headwater.supervisor import Supervisor
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import TLS, Security
from headwater.worker import Worker
from headwater.worker.reader import read_parameters

TRANSPORTS = ("unix", "tcp")
_LOOPBACK = "127.0.0.1"


class NodeOptions(TypedDict, total=False):
    """The fields of `NodeConfig` as keywords."""

    transport: str
    bind: str | None
    advertise: str | None
    token: str | None
    tls: TLS | None
    insecure: bool
    output: Callable[[str], None]
    metrics: str | None
    otlp: str | None
    log_to: Sequence[LogSink]
    trace: str | PathLike | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Where the nodes of one cluster listen, who is admitted, and where what they print goes.

    Raises:
        ConfigurationError: an impossible value.
    """

    transport: str = field(
        default="unix", metadata=means('"unix" (shared memory) or "tcp" (loopback, as between machines).')
    )
    bind: str | None = field(
        default=None,
        metadata=means(
            '"host[:port]" to listen on for nodes of other machines, "0.0.0.0" or "::" for every address; '
            "the port is the coordinator's. None: this machine alone."
        ),
    )
    advertise: str | None = field(
        default=None,
        metadata=means(
            '"host[:port]" that others dial, where that is another. A port is the coordinator\'s alone.'
        ),
    )
    token: str | None = field(
        default=None, metadata=means("A secret that all nodes share and prove to know over TCP.")
    )
    tls: TLS | None = field(
        default=None, metadata=means("Certificates that all nodes show over TCP: see `headwater.TLS`.")
    )
    insecure: bool = field(
        default=False, metadata=means("Listen beyond loopback with neither a token nor TLS.")
    )
    output: Callable[[str], None] = field(
        default=print,
        metadata=means("Takes each line that a node's process prints, one at a time; its errors are logged."),
    )
    metrics: str | None = field(
        default=None,
        metadata=means(
            '"HOST:PORT" where Prometheus scrapes metrics while the cluster runs; beyond loopback a token '
            "or TLS is demanded. Port 0: a free one (`Cluster.metrics_url`)."
        ),
    )
    otlp: str | None = field(
        default=None,
        metadata=means(
            'URL of an OpenTelemetry collector that gets the metrics every 10 s, "http://127.0.0.1:4318".'
        ),
    )

    log_to: Sequence[LogSink] = field(
        default=(),
        metadata=means(
            "Sinks (`hw.sinks`) that get what workers log while the cluster runs, which closes them: "
            "TensorBoard, Jsonl, Csv, Wandb, Mlflow, or objects with `write(points)` and `close()`."
        ),
    )

    trace: str | PathLike | None = field(
        default=None,
        metadata=means(
            "A file for what all nodes do, from beginning to end, which Perfetto opens; it grows with each "
            "step."
        ),
    )

    def __post_init__(self) -> None:
        checked(self.log_to)
        one_of(option("transport"), self.transport, TRANSPORTS)
        if self.trace is not None:
            path(option("trace"), self.trace)
        if not callable(self.output):
            raise ConfigurationError(f"output: got {self.output!r}, expected a function that takes a line")

    @property
    def security(self) -> Security:
        """What nodes must prove."""
        return Security(self.token, self.tls, self.insecure)

    @property
    def reach(self) -> Endpoint:
        """Where the coordinator listens."""
        return Endpoint(self.bind, self.advertise, self.security)


class ClusterKeywords(ClusterOptions, NodeOptions, total=False):
    """The keywords of `Cluster`."""


class Cluster:
    """Servers and a coordinator that workers of this or other processes join. A context manager.

    Attributes:
        config: what was said of it.
        history: what workers logged: see `RunResult.history`.
    """

    @takes((ClusterConfig, ClusterOptions), (NodeConfig, NodeOptions))
    def __init__(self, *, engine: str | RayEngine = "inline", **options: Unpack[ClusterKeywords]) -> None:
        """Start the servers; does not block until they have joined.

        Args:
            engine: "inline" (threads of this process), "local" (processes), "ray" (actors) or a `RayEngine`.

        Raises:
            ConfigurationError: an impossible argument; nothing was started.
            EngineError: a node could not be started.
            CheckpointError: there are checkpoints to resume from, and none is good.
        """
        of_cluster, of_nodes = chosen(options, ClusterConfig, NodeConfig)
        self.config = config = ClusterConfig.of(**of_cluster)
        nodes = NodeConfig(**of_nodes)
        security, reach = nodes.security, nodes.reach
        launch = Launch(config.workers, config.rules, nodes.output, config.servers, config.replicas, security)
        self._engine: Engine = make_engine(engine, launch)
        self._storage = Storage(config)
        self._storage.resume()
        self._supervisor = Supervisor(
            self._engine,
            self._start_server,
            coordinator=lambda: self._coordinator,
            servers=config.servers,
            replicas=config.replicas,
            rewind=self._storage.rewind if config.rewinds else None,
        )
        self._recorder = Recorder(nodes.log_to)
        self.history = self._recorder.history
        self._coordinator = CoordinatorNode(
            config,
            self._supervisor.departures.put,
            self._supervisor.end_asked,
            on_logged=self._recorder.take,
            write_checkpoint=self._storage.take_now,
            generation=self._storage.generation,
            reach=reach,
        )
        self._security = security
        self._config = config
        self._reach = _of_servers(reach, nodes.transport, self._engine.nearby)
        self._closed = self._traced = False
        self._process = os.getpid()
        self._metrics: MetricsServer | None = None
        self._otlp: OtlpExporter | None = None
        self._tracer: Tracer | None = None
        try:
            if nodes.metrics is not None:
                self._metrics = MetricsServer(nodes.metrics, self._coordinator.statistics, security=security)
            if nodes.otlp is not None:
                self._otlp = OtlpExporter(nodes.otlp, self._coordinator.statistics)
            if nodes.trace is not None:
                to = path(option("trace"), nodes.trace)
                self._tracer = Tracer(self._coordinator.addresses[0], to, security=security)
            self._supervisor.begin()
            self._storage.sign(self._coordinator.cluster)
            self._storage.begin(
                self._coordinator.addresses[0], self._coordinator.checkpointed, security=security
            )
        except BaseException:
            self.close()
            raise

    def _start_server(self, role: ServerRole, index: int) -> None:
        assignment = self._config.assignment(role, index, self._storage.restore)
        self._engine.start_server(self._near, assignment, self._reach)

    @property
    def address(self) -> str:
        """Where `connect`, workers of other processes and `headwater status` reach this cluster."""
        return self._coordinator.address

    @property
    def metrics_url(self) -> str | None:
        """Where metrics are scraped; None without `metrics`."""
        return None if self._metrics is None else self._metrics.url

    @property
    def _near(self) -> str:
        """Where nodes of the engine do."""
        return self._coordinator.addresses[0] if self._engine.nearby else self.address

    @property
    def generation(self) -> int:
        """Of the log: grows when training begins anew from a checkpoint."""
        return self._coordinator.generation

    @property
    def last_checkpoint(self) -> str | None:
        """Path of the newest checkpoint that was written, or resumed from; None without one."""
        return self._storage.last

    def complete(self) -> bool:
        """Whether there is a server of every index now."""
        return self._coordinator.complete()

    def checkpoint(self) -> str:
        """Write a checkpoint of now while training goes on, and return its path; blocks until it is on disk.

        Raises:
            ConfigurationError: the cluster has no directory for checkpoints.
            CheckpointError: it cannot be written.
        """
        self._check_open()
        return self._storage.take_now()

    def worker(self) -> Worker:
        """Join as the next worker, from any thread of this process; blocks until the servers are up."""
        self._check_open()
        return Worker(self._coordinator.addresses[0], security=self._security)

    def reserve_ranks(self) -> None:
        """Keep the declared workers' ranks for `start_worker`: whoever joins otherwise gets a later one."""
        self._coordinator.reserve(range(self.config.workers))

    def start_worker(self, rank: int, train: Callable[[Worker], Any]) -> None:
        """Have the engine start a worker that runs `train`; its end arrives at `next_outcome`."""
        self._check_open()
        self._engine.start_worker(self._near, rank, train)

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next worker ended; None after `timeout` seconds.

        Raises:
            EngineError: a server ended, and nothing takes its place.
        """
        return self._supervisor.next_outcome(timeout)

    def parameters(self) -> tuple[int, dict[str, dict[str, NDArray[np.float32]]]]:
        """The version, and every model's values by name at that version, as arrays of the caller's own."""
        self._check_open()
        return read_parameters(self._coordinator.addresses[0], security=self._security)

    def take_last_checkpoint(self) -> None:
        """Write a checkpoint of now, where there is a directory for it; none are taken afterwards. Blocks.

        Raises:
            HeadwaterError: it could not be written.
        """
        self._check_open()
        self._storage.take_last()

    def statistics(self) -> ClusterStatistics:
        """A snapshot of all nodes; blocks for the servers' answers."""
        self._check_open()
        return self._coordinator.statistics()

    def verify(self) -> Verification:
        """Compare every server with its standby at one entry of the log, while training goes on.

        Blocks until all have summed up what they are; each pauses for a copy of its shard in memory.

        Raises:
            HeadwaterError: a node could not be asked.
        """
        self._check_open()
        return verify(self._coordinator.addresses[0], security=self._security)

    def close(self) -> None:
        """Stop all nodes; idempotent. Workers that are still joined get ConnectionLostError.

        In a process forked from the cluster's it does nothing: the nodes are not that one's.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        if self._tracer is not None and not self._traced:
            self._traced = True
            self._tracer.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._otlp is not None:
            self._otlp.close()
        self._storage.interrupt()
        self._supervisor.close()
        self._coordinator.close()  # who waits to join, the checkpointer too, is told
        self._storage.close()
        self._engine.close()
        self._recorder.close()

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"the cluster belongs to process {self._process}, and this is process {os.getpid()}, forked "
                "from it: only that process can use it. Join from here with hw.connect(address)"
            )
        if self._closed:
            raise ClosedError("the cluster is closed: make a new Cluster")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(address: str, *, token: str | None = None, tls: TLS | None = None) -> Worker:
    """Join the cluster at `address` as its next worker; blocks until its servers are up.

    `token`, `tls`: as the cluster was given.

    Raises:
        ConfigurationError: not an address, too short a token, or files that cannot be used.
        ConnectionLostError: nobody answers there.
        RefusedError: one side does not admit the other, or the coordinator refuses; the text is the reason.
        ProtocolError: what answers there is no Headwater node, or one of another version.
    """
    return Worker(address, security=Security(token, tls))


def _of_servers(reach: Endpoint, transport: str, nearby: bool) -> Endpoint:
    """Where servers listen whose coordinator listens there."""
    near = reach.on_any_port()
    if not nearby:  # what this machine is called leads to none of theirs
        near = dataclasses.replace(near, advertise=None)
    if transport == "tcp":
        near = dataclasses.replace(near, bind=near.bind or _LOOPBACK, local=False)
    return near
