"""Keeps a cluster's servers as many as they should be: starts others for those lost, or all anew.

The engine tells that a process has ended, the coordinator that a member has departed. What follows, follows
from the departure. A process that ended before it was a member departs nowhere: then it follows from its end.

Invariants:
- Every end of a server has a consequence: another one is started, or the cluster ends with the reason. A
  standby is started again for as long as it takes, after ever longer pauses: training goes on without it.
- Nothing is started again for ever that everybody waits for: neither a server that does not come to join, nor
  a generation that reaches no new checkpoint.
- A process that is no member any more is killed: it may be stopped, and come back later.
- The thread ends with the cluster, or ends the cluster with the reason.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from headwater.engines import Engine, Outcome
from headwater.engines.engine import Process
from headwater.errors import (
    ClusterEndedError,
    ConfigurationError,
    EngineError,
    HeadwaterError,
    RefusedError,
    UnreachableError,
)
from headwater.loggers import logger
from headwater.machines.roster import Departure
from headwater.messages import ServerRole

_log = logger("headwater.coordinator")

_LOOK_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 60.0
"""Between two starts of a node that does not come to join, in seconds; twice as long each time."""

_SILENT = (
    "it was declared dead, and its process was killed. A process is not heard of when it is stopped, or when "
    "a call into C holds the interpreter for longer than the lease"
)

STARTS = 4
"""How often a server may be started that does not come to join."""
REWINDS = 4
"""How often training may begin anew in a row without having reached another checkpoint."""


class Roster(Protocol):
    """What is asked of the coordinator."""

    def has_met(self, process: Process) -> bool:
        """Whether that process was ever a member."""

    def end(self, error: str, reason: str) -> None:
        """Refuse everybody from now on, with an error of this name."""


class Supervisor:
    """Watches what `engine` started.

    Args:
        start: starts a node of this role and index.
        coordinator: returns the cluster's coordinator, which is made after this object.
        replicas: standbys of every server.
        rewind: called when a shard was lost and the servers are stopped, before all are started anew; returns
            the checkpoint they begin with; None where a loss ends the cluster.

    Attributes:
        departures: takes what the coordinator says of members that ended.
    """

    def __init__(
        self,
        engine: Engine,
        start: Callable[[ServerRole, int], None],
        *,
        coordinator: Callable[[], Roster],
        servers: int,
        replicas: int,
        rewind: Callable[[], str] | None,
    ) -> None:
        self.departures: queue.SimpleQueue[Departure] = queue.SimpleQueue()
        self._engine = engine
        self._start = start
        self._coordinator = coordinator
        self._servers = servers
        self._replicas = replicas
        self._rewind = rewind
        self._outcomes: queue.SimpleQueue[Outcome | HeadwaterError] = queue.SimpleQueue()
        self._ends: list[Outcome] = []
        self._departed: set[Process] = set()
        self._failed: dict[tuple[ServerRole, int], int] = {}
        self._due: list[tuple[float, ServerRole, int]] = []
        self._last_end = ""
        self._rewound: tuple[str, int] = ("", 0)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headwater-supervisor", daemon=True)

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
            ClusterEndedError: somebody asked for the end of the cluster.
        """
        try:
            outcome = self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(outcome, HeadwaterError):
            raise outcome
        return outcome

    def end_asked(self, by: str) -> None:
        """Somebody wants the cluster to end: `next_outcome` raises that. From any thread."""
        self._outcomes.put(ClusterEndedError(f"the cluster was ended by {by}"))

    def close(self) -> None:
        """Watch no more; idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    # ── in the supervisor's thread ──────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._look()
        except HeadwaterError as error:
            self._fail(str(error), error)
        except BaseException as error:
            self._fail(f"the supervisor failed: {type(error).__name__}: {error}", error)
            raise

    def _look(self) -> None:
        outcome = self._engine.next_outcome(_LOOK_S)
        if outcome is not None and outcome.role == "worker":
            self._outcomes.put(outcome)
        elif outcome is not None:
            self._ends.append(outcome)
        while not self._closing.is_set() and (departure := self._next_departure()) is not None:
            self._take(departure)
        for end in self._ends[:]:
            self._settle(end)
        self._start_those_due()

    def _next_departure(self) -> Departure | None:
        try:
            return self.departures.get_nowait()
        except queue.Empty:
            return None

    # what ended

    def _settle(self, end: Outcome) -> None:
        """Do what follows from the end of a server's or standby's process, once it is known what it was."""
        departed = end.process in self._departed
        if not departed and (end.process is None or not self._coordinator().has_met(end.process)):
            consequence = self._never_joined
        elif not self._replaces():
            consequence = self._ended
        elif departed:
            consequence = self._note
        else:
            return  # its departure will come
        self._ends.remove(end)
        if end.process is not None:
            self._departed.discard(end.process)
        consequence(end)

    def _replaces(self) -> bool:
        """Whether training survives the loss of a server."""
        return bool(self._replicas) or self._rewind is not None

    def _note(self, end: Outcome) -> None:
        self._last_end = _words(end)
        _log.warning("%s", self._last_end)

    def _ended(self, end: Outcome) -> None:
        assert end.failure is not None
        self._fail(_words(end), end.failure.error, told="ClusterEndedError")

    def _never_joined(self, end: Outcome) -> None:
        """It held nothing yet, so that another one can begin in its place."""
        assert end.failure is not None
        role: ServerRole = "standby" if end.role == "standby" else "server"
        error, times = end.failure.error, self._failed.get((role, end.index), 0) + 1
        self._failed[role, end.index] = times
        useless = isinstance(error, ConfigurationError | UnreachableError)  # it would be the same again
        if role == "standby" and type(error) is RefusedError:
            return  # another one has its place
        if role == "server" and (useless or not self._replaces() or times >= STARTS):
            starts = f" ({times} of {STARTS} starts)" if times > 1 else ""
            self._fail(_words(end, f", before it had joined{starts}"), error)
            return
        pause = min(_FIRST_PAUSE_S * 2 ** (times - 1), _LONGEST_PAUSE_S)
        _log.warning("%s", _words(end, f", before it had joined; it is started again in {pause:g} s"))
        self._due.append((time.monotonic() + pause, role, end.index))

    def _take(self, departure: Departure) -> None:
        """Do what follows from a departure."""
        member = departure.member
        self._engine.end_process((member.pid, member.host), _SILENT)
        if member.role not in ("server", "standby"):
            return
        self._departed.add((member.pid, member.host))
        if not departure.loses_shard:
            self._failed.pop(("standby", member.index), None)
            self._start("standby", member.index)
        elif self._rewind is not None:
            self._begin_anew(self._rewind)
        elif self._replicas:
            self._fail(f"server {member.index} is gone, and its standby had not caught up")

    def _begin_anew(self, rewind: Callable[[], str]) -> None:
        for end in self._ends:
            self._note(end)
        self._engine.stop_servers()
        self._ends, self._due, self._failed = [], [], {}
        restored = rewind()
        times = self._rewound[1] + 1 if self._rewound[0] == restored else 1
        self._rewound = restored, times
        if times > REWINDS:
            raise EngineError(
                f"servers were lost {times} times in a row since {restored or 'the start'}, and no other "
                f"checkpoint was reached. The last one to end: {self._last_end or 'unknown'}"
            )
        self._start_all()

    # what is started

    def _start_all(self) -> None:
        for index in range(self._servers):
            self._start("server", index)
        for _ in range(self._replicas):
            for index in range(self._servers):
                self._start("standby", index)

    def _start_those_due(self) -> None:
        now = time.monotonic()
        ready = [one for one in self._due if one[0] <= now]
        self._due = [one for one in self._due if one[0] > now]
        for _, role, index in ready:
            self._start(role, index)

    def _fail(self, text: str, cause: BaseException | None = None, told: str = "EngineError") -> None:
        """The cluster cannot go on: `next_outcome` raises that, and members and those who wait to join are
        refused with an error named `told`."""
        failure = EngineError(text)
        failure.__cause__ = cause
        self._outcomes.put(failure)
        self._coordinator().end(told, text.partition("\n")[0])


def _words(end: Outcome, when: str = "") -> str:
    assert end.failure is not None
    return f"{end.role} {end.index}: {end.failure.summary}{when}\n\n{end.failure.trace}".rstrip()
