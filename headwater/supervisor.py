"""Keeps a cluster's servers as many as they should be: starts standbys for those lost, or all anew."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from headwater.engines import Engine, Outcome
from headwater.errors import ConfigurationError, EngineError, HeadwaterError, UnreachableError
from headwater.machines.roster import Departure
from headwater.messages import Role

_log = logging.getLogger("headwater.coordinator")

_LOOK_S = 0.1


class Supervisor:
    """Watches what `engine` started.

    Args:
        start: starts a node of this role and index.
        replicas: standbys of every server.
        rewind: called when a shard was lost and the servers are stopped, before all are started anew; None
            where that ends the cluster.
        end: ends the cluster, with a text that says why.

    Attributes:
        departures: takes what the coordinator says of members that ended.
    """

    def __init__(
        self,
        engine: Engine,
        start: Callable[[Role, int], None],
        *,
        servers: int,
        replicas: int,
        rewind: Callable[[], None] | None,
        end: Callable[[str], None],
    ) -> None:
        self.departures: queue.SimpleQueue[Departure] = queue.SimpleQueue()
        self._engine = engine
        self._start = start
        self._servers = servers
        self._replicas = replicas
        self._rewind = rewind
        self._end = end
        self._outcomes: queue.SimpleQueue[Outcome | EngineError] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="headwater-supervisor", daemon=True)

    def begin(self) -> None:
        """Start all servers and standbys, and watch them from now on.

        Raises:
            EngineError: a node could not be started.
        """
        self._start_all()
        self._thread.start()

    def next_outcome(self, timeout: float) -> Outcome | None:
        """How the next worker ended; None after `timeout` seconds.

        Raises:
            EngineError: a server ended, and nothing takes its place.
        """
        try:
            outcome = self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Watch no more; idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    # ── in the supervisor's thread ──────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        while not self._closing.is_set():
            outcome = self._engine.next_outcome(_LOOK_S)
            if outcome is not None:
                self._ended(outcome)
            while not self._closing.is_set() and (departure := self._next_departure()) is not None:
                self._departed(departure)

    def _next_departure(self) -> Departure | None:
        try:
            return self.departures.get_nowait()
        except queue.Empty:
            return None

    def _ended(self, outcome: Outcome) -> None:
        if outcome.role == "worker":
            self._outcomes.put(outcome)
            return
        assert outcome.failure is not None
        text = (
            f"{outcome.role} {outcome.index}: {outcome.failure.summary}\n\n{outcome.failure.trace}".rstrip()
        )
        error = outcome.failure.error
        never_joined = outcome.role == "server" and isinstance(error, ConfigurationError | UnreachableError)
        if not never_joined and (self._replicas or self._rewind is not None):
            _log.warning("%s", text)  # what follows from it follows from the departure
            return
        ended = EngineError(text)
        ended.__cause__ = error
        self._outcomes.put(ended)
        if never_joined:
            self._end(f"{outcome.role} {outcome.index}: {outcome.failure.summary}")

    def _departed(self, departure: Departure) -> None:
        member = departure.member
        if member.role not in ("server", "standby"):
            return
        try:
            if not departure.loses_shard:
                self._start("standby", member.index)
            elif self._rewind is not None:
                self._engine.stop_servers()
                self._rewind()
                self._start_all()
            elif self._replicas:
                raise EngineError(f"server {member.index} is gone, and its standby had not caught up")
        except HeadwaterError as error:
            failure = error if isinstance(error, EngineError) else EngineError(str(error))
            self._outcomes.put(failure)

    def _start_all(self) -> None:
        for index in range(self._servers):
            self._start("server", index)
        for _ in range(self._replicas):
            for index in range(self._servers):
                self._start("standby", index)
