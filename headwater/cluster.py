"""A running cluster: coordinator in this process, servers where the engine puts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.engines import Engine, Launch, Outcome, make_engine
from headwater.errors import ClosedError, ConfigurationError, EngineError
from headwater.messages import ClusterStatistics, Scalar
from headwater.nodes.coordinator import ClusterSettings, CoordinatorNode
from headwater.nodes.reader import read_parameters
from headwater.nodes.server import ServerSettings
from headwater.nodes.worker import Worker
from headwater.rules import load_rules
from headwater.sync import Sync, parse_sync

TRANSPORTS = ("unix", "tcp")


class Cluster:
    """Servers and a coordinator that workers of this or other processes join. A context manager.

    Args:
        workers: how many workers must have joined before anything is committed.
        servers: into how many ranges every model is cut; one process (or thread) each.
        sync: "sync", "async", "ssp:N" or an object of `headwater.sync`.
        engine: "inline" (threads of this process) or "local" (processes).
        settings: the user's own scalars, for `worker.settings`.
        patience: seconds after which a wait is reported; deadline: seconds after which it fails.
        rules: names of modules with the user's own rules, loaded by every node at its start.
        transport: "unix" (shared memory) or "tcp" (loopback, as between machines).
        output: takes each line that a node's process prints.

    Raises:
        ConfigurationError: an impossible argument; nothing was started.
    """

    def __init__(
        self,
        *,
        workers: int,
        servers: int = 1,
        sync: str | Sync = "sync",
        engine: str = "inline",
        settings: Mapping[str, Scalar] | None = None,
        patience: float = 10.0,
        deadline: float = 600.0,
        rules: Sequence[str] = (),
        transport: str = "unix",
        output: Callable[[str], None] = print,
    ) -> None:
        _check_count("workers", workers)
        _check_count("servers", servers)
        if not (patience > 0 and deadline > 0):
            raise ConfigurationError(f"patience and deadline must be > 0 seconds, got {patience}, {deadline}")
        if transport not in TRANSPORTS:
            raise ConfigurationError(f"transport: got {transport!r}, expected one of {TRANSPORTS}")
        mode = str(parse_sync(sync))
        for module in rules:
            load_rules(module)
        self._engine: Engine = make_engine(engine, Launch(workers, tuple(rules), output))
        self._coordinator = CoordinatorNode(
            ClusterSettings(workers, servers, mode, dict(settings or {}), patience, deadline)
        )
        self._closed = False
        try:
            for index in range(servers):
                self._engine.start_server(
                    ServerSettings(index, servers, mode, self.address, transport, patience)
                )
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Where `connect`, workers of other processes and `headwater status` reach this cluster."""
        return self._coordinator.address

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
            EngineError: a server ended, which it never does by itself.
        """
        outcome = self._engine.next_outcome(timeout)
        if outcome is not None and outcome.role == "server":
            assert outcome.failure is not None
            raise EngineError(
                f"server {outcome.index}: {outcome.failure.summary}\n\n{outcome.failure.trace}".rstrip()
            ) from outcome.failure.error
        return outcome

    def parameters(self) -> tuple[int, dict[str, dict[str, NDArray[np.float32]]]]:
        """The version, and every model's values by name at that version, as arrays of the caller's own."""
        self._check_open()
        return read_parameters(self.address)

    def statistics(self) -> ClusterStatistics:
        """A snapshot of all nodes; blocks for the servers' answers."""
        self._check_open()
        return self._coordinator.statistics()

    def close(self) -> None:
        """Stop all nodes; idempotent. Workers that are still joined get ConnectionLostError."""
        self._closed = True
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


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an integer ≥ 1, got {value!r}")
