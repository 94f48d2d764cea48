"""A running cluster: coordinator in this process, servers where the engine puts them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from headwater.engines import Engine, Launch, Outcome, RayEngine, make_engine
from headwater.errors import ClosedError, ConfigurationError, UsageError
from headwater.messages import ClusterStatistics, Role
from headwater.runtime.checkpointer import Every
from headwater.runtime.coordinator import CoordinatorNode
from headwater.runtime.server import ServerSettings
from headwater.runtime.verifier import Verification, verify
from headwater.spec.cluster import ClusterSettings
from headwater.spec.registry import load_rules
from headwater.spec.sync import Mode, parse_sync
from headwater.storage import OnServerLoss, Storage, checkpoints_of
from headwater.supervisor import Supervisor
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import TLS, Security
from headwater.worker import Worker
from headwater.worker.reader import read_parameters

TRANSPORTS = ("unix", "tcp")
_LOOPBACK = "127.0.0.1"


class ClusterOptions(TypedDict, total=False):
    """What `run` passes on to `Cluster` as it is; the defaults stand there."""

    every: str | int | Every
    keep: int
    on_server_loss: OnServerLoss | None
    lease: float
    rules: Sequence[str]
    transport: str
    bind: str | None
    advertise: str | None
    token: str | None
    tls: TLS | None
    insecure: bool
    output: Callable[[str], None]


class Cluster:
    """Servers and a coordinator that workers of this or other processes join. A context manager.

    Args:
        workers: how many workers must have joined before anything is committed.
        servers: into how many ranges every model is cut; one process (or thread) each.
        sync: "sync", "async", "ssp:N", or a `Mode`, also one of your own (docs/testing.md).
        engine: "inline" (threads of this process), "local" (processes), "ray" (actors) or a `RayEngine`.
        replicas: 0, or 1 for a standby of every server, which takes over when it is lost.
        checkpoint: directory or fsspec URL for checkpoints; of one cluster at a time.
        resume: begin with the latest good checkpoint there; training then continues from its positions.
        every: between checkpoints, commits (100 or "100steps") or seconds ("30s"); keep: how many stay.
        on_server_loss: when a shard is lost with all its copies, "rewind" to the latest checkpoint (default
            where there are checkpoints) or "stop".
        settings: the user's own, for `worker.settings`: numbers, texts, None, and lists and dicts of those.
        patience: seconds after which a wait is reported, half the deadline at most; deadline: seconds after
            which it fails. No time is longer than a year.
        min_workers: with fewer workers than that nothing is committed.
        lease: seconds after which a node that is not heard of is declared dead.
        rules: names of modules with the user's own rules and modes, loaded by every node at its start.
        transport: "unix" (shared memory) or "tcp" (loopback, as between machines).
        bind: "host[:port]" to listen on for nodes of other machines, "0.0.0.0" or "::" for every address;
            the port is the coordinator's. None: this machine alone.
        advertise: "host[:port]" that they dial, where that is another. A port is the coordinator's alone.
        token, tls: what nodes must prove over TCP, see `headwater.TLS`; one of them is needed beyond
            loopback unless `insecure`.
        output: takes each line that a node's process prints.

    Raises:
        ConfigurationError: an impossible argument; nothing was started.
        CheckpointError: no checkpoint to resume from is good.
    """

    def __init__(
        self,
        *,
        workers: int,
        servers: int = 1,
        sync: str | Mode = "sync",
        engine: str | RayEngine = "inline",
        replicas: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        every: str | int | Every = "60s",
        keep: int = 3,
        on_server_loss: OnServerLoss | None = None,
        settings: Mapping[str, Any] | None = None,
        patience: float = 10.0,
        deadline: float = 600.0,
        min_workers: int = 1,
        lease: float = 15.0,
        rules: Sequence[str] = (),
        transport: str = "unix",
        bind: str | None = None,
        advertise: str | None = None,
        token: str | None = None,
        tls: TLS | None = None,
        insecure: bool = False,
        output: Callable[[str], None] = print,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ConfigurationError(f"transport: got {transport!r}, expected one of {TRANSPORTS}")
        for module in rules:
            load_rules(module)
        mode = str(parse_sync(sync))
        security = Security(token, tls, insecure)
        reach = Endpoint(bind, advertise, security)
        checkpoints = checkpoints_of(checkpoint, every, keep, resume, on_server_loss)
        told = ClusterSettings(
            workers=workers,
            servers=servers,
            sync=mode,
            settings={} if settings is None else settings,
            patience=patience,
            deadline=deadline,
            lease=lease,
            replicas=replicas,
            rewinds=checkpoints.rewinds,
            min_workers=min_workers,
        )
        launch = Launch(workers, tuple(rules), output, servers, replicas, security)
        self._engine: Engine = make_engine(engine, launch)
        self._storage = Storage(checkpoints)
        if checkpoints.resume:
            self._storage.resume()
        self._supervisor = Supervisor(
            self._engine,
            self._start_server,
            coordinator=lambda: self._coordinator,
            servers=servers,
            replicas=replicas,
            rewind=self._storage.rewind if checkpoints.rewinds else None,
        )
        self._coordinator = CoordinatorNode(
            dataclasses.replace(told, generation=self._storage.generation),
            self._supervisor.departures.put,
            reach=reach,
        )
        self._security = security
        self._server = ServerSettings(
            0,
            servers,
            mode,
            self._near,
            _of_servers(reach, transport, self._engine.nearby),
            told.patience,
            replicas=replicas,
            min_workers=min_workers,
        )
        self._closed = False
        self._process = os.getpid()
        try:
            self._supervisor.begin()
            self._storage.sign(self._coordinator.cluster)
            self._storage.begin(self._coordinator.addresses[0], security=security)
        except BaseException:
            self.close()
            raise

    def _start_server(self, role: Role, index: int) -> None:
        self._engine.start_server(
            dataclasses.replace(self._server, role=role, index=index, restore=self._storage.restore)
        )

    @property
    def address(self) -> str:
        """Where `connect`, workers of other processes and `headwater status` reach this cluster."""
        return self._coordinator.address

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

    @property
    def writes_checkpoints(self) -> bool:
        """Whether there is a directory for checkpoints."""
        return bool(self._storage.settings.directory)

    def checkpoint(self) -> str:
        """Write a checkpoint of now while training goes on, and return its path; blocks until it is on disk.

        Raises:
            ConfigurationError: the cluster has no directory for checkpoints.
            CheckpointError: it cannot be written.
        """
        self._check_open()
        self._storage.take_now()
        return self._storage.last or ""

    def worker(self) -> Worker:
        """Join as the next worker, from any thread of this process; blocks until the servers are up."""
        self._check_open()
        return Worker(self._coordinator.addresses[0], security=self._security)

    def reserve_ranks(self) -> None:
        """Keep the declared workers' ranks for `start_worker`: whoever joins otherwise gets a later one."""
        self._coordinator.reserve(range(self._coordinator.settings.workers))

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
        self._storage.interrupt()
        self._supervisor.close()
        self._coordinator.close()  # who waits to join, the checkpointer too, is told
        self._storage.close()
        self._engine.close()

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
