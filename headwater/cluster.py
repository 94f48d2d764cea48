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
from headwater.errors import ClosedError, ConfigurationError
from headwater.messages import ClusterStatistics, Role, Scalar
from headwater.nodes.checkpointer import Every
from headwater.nodes.coordinator import CoordinatorNode
from headwater.nodes.coordinator.settings import ClusterSettings
from headwater.nodes.reader import read_parameters
from headwater.nodes.server import ServerSettings
from headwater.nodes.verifier import Verification, verify
from headwater.nodes.worker import Worker
from headwater.rules import load_rules
from headwater.storage import OnServerLoss, Storage, checkpoints_of
from headwater.supervisor import Supervisor
from headwater.sync import Sync, parse_sync

TRANSPORTS = ("unix", "tcp")


class ClusterOptions(TypedDict, total=False):
    """What `run` passes on to `Cluster` as it is; the defaults stand there."""

    every: str | int | Every
    keep: int
    on_server_loss: OnServerLoss | None
    lease: float
    rules: Sequence[str]
    transport: str
    output: Callable[[str], None]


class Cluster:
    """Servers and a coordinator that workers of this or other processes join. A context manager.

    Args:
        workers: how many workers must have joined before anything is committed.
        servers: into how many ranges every model is cut; one process (or thread) each.
        sync: "sync", "async", "ssp:N" or an object of `headwater.sync`.
        engine: "inline" (threads of this process), "local" (processes), "ray" (actors) or a `RayEngine`.
        replicas: 0, or 1 for a standby of every server, which takes over when it is lost.
        checkpoint: directory or fsspec URL for checkpoints; of one cluster at a time.
        resume: begin with the latest good checkpoint there; training then continues from its positions.
        every: between checkpoints, commits (100 or "100steps") or seconds ("30s"); keep: how many stay.
        on_server_loss: when a shard is lost with all its copies, "rewind" to the latest checkpoint (default
            where there are checkpoints) or "stop".
        settings: the user's own scalars, for `worker.settings`.
        patience: seconds after which a wait is reported; deadline: seconds after which it fails.
        min_workers: with fewer workers than that nothing is committed.
        lease: seconds after which a node that is not heard of is declared dead.
        rules: names of modules with the user's own rules, loaded by every node at its start.
        transport: "unix" (shared memory) or "tcp" (loopback, as between machines).
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
        sync: str | Sync = "sync",
        engine: str | RayEngine = "inline",
        replicas: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        every: str | int | Every = "60s",
        keep: int = 3,
        on_server_loss: OnServerLoss | None = None,
        settings: Mapping[str, Scalar] | None = None,
        patience: float = 10.0,
        deadline: float = 600.0,
        min_workers: int = 1,
        lease: float = 15.0,
        rules: Sequence[str] = (),
        transport: str = "unix",
        output: Callable[[str], None] = print,
    ) -> None:
        _check_counts(workers=workers, servers=servers, min_workers=min_workers, replicas=replicas)
        if not (patience > 0 and deadline > 0 and lease > 0):
            times = f"{patience}, {deadline}, {lease}"
            raise ConfigurationError(f"patience, deadline and lease must be > 0 seconds, got {times}")
        if transport not in TRANSPORTS:
            raise ConfigurationError(f"transport: got {transport!r}, expected one of {TRANSPORTS}")
        mode = str(parse_sync(sync))
        checkpoints = checkpoints_of(checkpoint, every, keep, resume, on_server_loss)
        for module in rules:
            load_rules(module)
        self._engine: Engine = make_engine(engine, Launch(workers, tuple(rules), output, servers, replicas))
        self._storage = Storage(checkpoints)
        self._supervisor = Supervisor(
            self._engine,
            self._start_server,
            servers=servers,
            replicas=replicas,
            rewind=self._storage.rewind if checkpoints.rewinds else None,
        )
        self._coordinator = CoordinatorNode(
            ClusterSettings(
                workers=workers,
                servers=servers,
                sync=mode,
                settings=dict(settings or {}),
                patience=patience,
                deadline=deadline,
                lease=lease,
                replicas=replicas,
                rewinds=checkpoints.rewinds,
                generation=self._storage.generation,
            ),
            self._supervisor.departures.put,
        )
        self._server = ServerSettings(
            0, servers, mode, self.address, transport, patience, replicas=replicas, min_workers=min_workers
        )
        self._closed = False
        try:
            self._supervisor.begin()
            self._storage.begin(self.address)
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
    def checkpoint(self) -> str | None:
        """Path of the newest checkpoint that was written, or resumed from; None without one."""
        return self._storage.last

    def worker(self) -> Worker:
        """Join as the next worker, from any thread of this process; blocks until the servers are up."""
        self._check_open()
        return Worker(self.address)

    def start_worker(self, rank: int, train: Callable[[Worker], Any]) -> None:
        """Have the engine start a worker that runs `train`; its end arrives at `next_outcome`."""
        self._check_open()
        self._engine.start_worker(self.address, rank, train)

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next worker ended; None after `timeout` seconds.

        Raises:
            EngineError: a server ended, and nothing takes its place.
        """
        return self._supervisor.next_outcome(timeout)

    def parameters(self) -> tuple[int, dict[str, dict[str, NDArray[np.float32]]]]:
        """The version, and every model's values by name at that version, as arrays of the caller's own."""
        self._check_open()
        return read_parameters(self.address)

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
        return verify(self.address)

    def close(self) -> None:
        """Stop all nodes; idempotent. Workers that are still joined get ConnectionLostError."""
        self._closed = True
        self._storage.close()
        self._supervisor.close()
        self._coordinator.close()
        self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cluster is closed: make a new Cluster")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(address: str) -> Worker:
    """Join the cluster at `address` as its next worker; blocks until its servers are up.

    Raises:
        ConnectionLostError: nobody answers there.
        RefusedError: the coordinator refuses; the text is its reason.
    """
    return Worker(address)


def _check_counts(*, workers: int, servers: int, min_workers: int, replicas: int) -> None:
    for name, value in (("workers", workers), ("servers", servers), ("min_workers", min_workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be an integer ≥ 1, got {value!r}")
    if isinstance(replicas, bool) or replicas not in (0, 1):
        raise ConfigurationError(f"replicas must be 0 or 1, got {replicas!r}")
    if min_workers > workers:
        raise ConfigurationError(f"min_workers must be at most workers={workers}, got {min_workers}")
