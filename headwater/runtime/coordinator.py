"""The coordinator node: threads, listeners and the journal around `headwater.machines.coordinator`.

With a journal a file the node may die: the next one on it goes on with what the machine persisted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from headwater import messages as m
from headwater.errors import (
    ConfigurationError,
    ConnectionLostError,
    HeadwaterError,
    JournalError,
    RefusedError,
    named,
)
from headwater.loggers import logger
from headwater.machines.coordinator import (
    AllFinished,
    CheckAddresses,
    ChooseCheckpoint,
    CoordinatorMachine,
    EndAsked,
    Ended,
    Identity,
    Logged,
    WriteCheckpoint,
)
from headwater.machines.roster import Departure
from headwater.runtime.dialling import check_reachable, dial_member, machine
from headwater.runtime.journal import Journal
from headwater.runtime.pump import Pump
from headwater.runtime.threads import ConnectionThreads
from headwater.spec.cluster import ClusterConfig
from headwater.wire.channel import Channel
from headwater.wire.endpoint import LOCAL, Endpoint
from headwater.wire.listener import dial

_log = logger("headwater.coordinator")

_DIAL_S = 2.0
"""How long a server may take to be connected to, in seconds."""

_ANSWER_S = 10.0
"""How long the machine may take to answer its own node, in seconds: longer than it waits for servers."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What a coordinator needs whose servers come by themselves, and ask it what they are to be.

    `restore`: returns the path of the checkpoint with which a generation begins; called once in each, in a
    thread of its own, with whether training may have begun before, and the first generation. `over`: told of
    the end, with the error that everybody is refused with; None where every declared worker has finished.
    """

    restore: Callable[[bool, int], str]
    over: Callable[[HeadwaterError | None], None]


class CoordinatorNode:
    """The master node of one cluster.

    Args:
        on_departure: told of every server, standby and worker that ended without leaving; called from a
            thread of the coordinator, which it may not block for long.
        on_end_asked: told by whom, when somebody asks for the end of the cluster; as `on_departure`.
        write_checkpoint: writes one of now, and returns its path; called in a thread of its own when somebody
            asks for it. Blocks. Raises HeadwaterError.
        on_logged: told what workers log; as `on_departure`.
        generation: of the log, to begin with.
        journal: a file in which the roster survives this process; "" keeps it in memory, and members take
            the end of this process for the end of the cluster.
        reach: where nodes join. With a journal it must lead to the same address at every start: a fixed
            port, or the path of a Unix socket.
        serving: for servers that enlist; without, they were started for it and know what they are.

    Attributes:
        cluster: its identity.
        addresses: where nodes join and `headwater status` asks, the nearest first; address: the last of
            them, which leads here from the farthest.

    Raises:
        ConfigurationError: the journal is in use or of another cluster, or the address cannot be had.
        JournalError: the journal is damaged, or cannot be read or written.
    """

    def __init__(
        self,
        settings: ClusterConfig,
        on_departure: Callable[[Departure], None] = lambda departure: None,
        on_end_asked: Callable[[str], None] = lambda by: None,
        on_logged: Callable[[Logged], None] = lambda logged: None,
        write_checkpoint: Callable[[], str] | None = None,
        *,
        generation: int = 0,
        journal: str | os.PathLike[str] = "",
        reach: Endpoint = LOCAL,
        serving: Serving | None = None,
    ) -> None:
        self.settings = settings
        self._on_departure = on_departure
        self._on_end_asked = on_end_asked
        self._write_checkpoint = write_checkpoint
        self._on_logged = on_logged
        self._serving = serving
        self._security = reach.security
        self._why: JournalError | None = None
        self._stopped, self._over = threading.Event(), threading.Event()
        self._journal = Journal(journal, settings.kept())
        self.cluster = self._journal.cluster
        self._machine = CoordinatorMachine(
            settings,
            Identity(self.cluster, self._journal.secret, bool(self._journal.path), os.getpid()),
            time.monotonic(),
            generation=generation,
            record=self._journal.found,
            enlists=serving is not None,
        )
        self._threads = ConnectionThreads("headwater-coordinator")
        # Until then a silent member's lease decides.
        self._pump = Pump(self._machine, self, self._threads, log=_log, keep_alive=2 * settings.lease)
        try:
            self.addresses = self._threads.listen(reach, self._pump.serve)
        except BaseException:
            self._journal.close()
            raise
        self.address = self._machine.surveys.address = self.addresses[-1]
        self._machine.surveys.traffic = self._threads.traffic
        self._machine.traces.machine = machine()
        self._pump.begin()
        self._pump.do(self._machine.begin)

    # ── its own life ────────────────────────────────────────────────────────────────────────────

    def wait(self) -> None:
        """Block until this node has ended. Raises JournalError if that is why."""
        self._stopped.wait()
        if self._why is not None:
            raise JournalError(str(self._why))

    def reserve(self, ranks: Iterable[int]) -> None:
        """Give these ranks only to workers that ask for them by number."""
        self._pump.do(lambda now: self._machine.reserve(ranks))

    def end(self, error: str, reason: str) -> None:
        """Refuse everybody from now on, with an error of this name: those who ask, and those who wait."""
        self._pump.do(lambda now: self._machine.end(error, reason, now))

    def finish(self, refusal: m.Refused | None = None) -> None:
        """Tell everybody that training has finished, or with what they are refused from now on.

        Blocks until every member has come back after this node was started on its journal, or is dead:
        whoever called back later would find nobody.
        """
        self._pump.do(lambda now: self._machine.finish(refusal or m.Finished(), now))
        self._over.wait()
        self._pump.flush()

    def close(self) -> None:
        """End the cluster: every connection and thread; idempotent. Members are told that it is closed."""
        self.end("ClusterEndedError", "the cluster is closed")
        self._pump.flush()
        self.halt()

    def halt(self) -> None:
        """End this node alone, as a kill would: with a journal the next one on it goes on. Idempotent."""
        self._stop()
        self._threads.join()
        self._journal.close()

    def _stop(self) -> None:
        self._pump.stop()
        self._stopped.set()
        self._over.set()
        self._threads.close_channels()

    # ── what the machine asks for ───────────────────────────────────────────────────────────────

    def dial(self, member: m.Member | str) -> Channel:
        """Connect to a server or standby."""
        if isinstance(member, str):
            return dial(member, timeout=_DIAL_S, security=self._security)
        return dial_member(member, timeout=_DIAL_S, security=self._security)

    def persist(self, record: Any) -> None:
        """Write it into the journal."""
        self._journal.write(record)

    def perform(self, task: Any) -> Any:
        """Dial a newcomer's addresses, choose a checkpoint, or write one."""
        if isinstance(task, CheckAddresses):
            check_reachable(task.join, self._security)
            return None
        if isinstance(task, WriteCheckpoint):
            if self._write_checkpoint is None:
                raise ConfigurationError("nobody takes checkpoints of this cluster")
            return self._write_checkpoint()
        assert isinstance(task, ChooseCheckpoint)
        assert self._serving is not None
        return self._serving.restore(task.begun, task.first)

    def tell(self, event: Any) -> None:
        """Pass on who has departed, and that there is nothing left to do."""
        if isinstance(event, Departure):
            self._on_departure(event)
        elif isinstance(event, EndAsked):
            self._on_end_asked(event.by)
        elif isinstance(event, Logged):
            self._on_logged(event)
        elif isinstance(event, AllFinished) and self._serving is not None:
            self._serving.over(None)
        elif isinstance(event, Ended):
            self._over.set()
            if event.refusal is not None and self._serving is not None:
                refusal = event.refusal
                self._serving.over(named(refusal.error, refusal.reason, default=RefusedError))

    def failed(self, error: HeadwaterError) -> None:
        """What cannot be kept may not be seen: members go on without a coordinator until the next one."""
        _log.error("the coordinator ends: %s", error)
        self._why = JournalError(str(error))
        self._stop()
        if self._serving is not None:
            self._serving.over(error)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    @property
    def generation(self) -> int:
        """Of the log."""
        return self._machine.generation

    def checkpointed(self, counts: m.CheckpointCounts) -> None:
        """Note what was written of checkpoints; from any thread."""
        self._pump.do(lambda now: self._machine.checkpointed(counts, now))

    def finished(self) -> bool:
        """Whether every declared worker has done its work, and the cluster has not ended yet."""
        return bool(self._pump.look(lambda: self._machine.all_finished))

    def complete(self) -> bool:
        """Whether there is a server of every index now."""
        return bool(self._pump.look(lambda: self._machine.complete))

    def has_met(self, process: tuple[int, str]) -> bool:
        """Whether a process (pid and host name) was ever a member: then its end is told as a departure."""
        return bool(self._pump.look(lambda: process in self._machine.state.met))

    def statistics(self) -> m.ClusterStatistics:
        """The state of the cluster now; asks every server and blocks for their answers.

        Raises:
            ConnectionLostError: this node has ended.
        """
        answer = self._pump.ask(m.Ask(), _ANSWER_S)
        if not isinstance(answer, m.ClusterStatistics):
            raise ConnectionLostError("this coordinator has ended")
        return answer
