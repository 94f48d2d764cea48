"""A server node: threads and channels around `headwater.machines.server`, and its membership in a cluster.

Server 0, and whoever may become it, has a second machine beside, the sequencer, with a lock of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from headwater import messages as m
from headwater.errors import ConnectionLostError, EngineError, EnvironmentFailure, HeadwaterError
from headwater.loggers import logger
from headwater.machines.log_host import SequencerMachine
from headwater.machines.log_link import Policy, joined
from headwater.machines.server import CannotGoOn, ServerMachine, ServerPlan
from headwater.runtime.coordinator_client import CoordinatorClient
from headwater.runtime.dialling import dial_member
from headwater.runtime.payload import MappedMemory, ServerPayloads
from headwater.runtime.pump import Pump
from headwater.runtime.restored_shard import restored
from headwater.runtime.threads import ConnectionThreads
from headwater.shard import Shard
from headwater.spec.sync import parse_sync
from headwater.wire.channel import Channel
from headwater.wire.endpoint import LOCAL, Endpoint
from headwater.wire.listener import dial

_log = logger("headwater.server")

_DIAL_S = 10.0
_LOOK_S = 60.0


class ServerNode:
    """One server or standby; `start` returns when it has joined, `close` when all its threads have ended.

    Attributes:
        assignment: what it is.
    """

    def __init__(self, coordinator: str, assignment: m.Assignment, reach: Endpoint = LOCAL) -> None:
        """`coordinator`: its address; `reach`: where members reach this server."""
        self.assignment = assignment
        self._coordinator, self._reach = coordinator, reach
        role, index, servers = assignment.role, assignment.index, assignment.servers
        sync, replicated, patience = parse_sync(assignment.sync), assignment.replicas > 0, assignment.patience
        place = index, servers, sync.reduce
        begins = assignment.restore and role == "server"
        shard = restored(assignment.restore, *place) if begins else Shard(*place)
        plan = ServerPlan(index, servers, role, replicated=replicated, patience=patience)
        self._threads = ConnectionThreads(f"headwater-{role}-{index}")
        self.machine = ServerMachine(
            plan,
            shard,
            MappedMemory(lambda conn: self.pump.channel(conn)),
            lambda snapshot: Shard.restore(snapshot, sync.reduce),
        )
        self.machine.traffic = self._threads.traffic
        self._sequencer: Pump | None = None
        if index == 0:
            policy = Policy(sync, assignment.min_workers, replicated)
            sequencer = SequencerMachine(servers, policy, patience=patience)
            self._sequencer = Pump(sequencer, self, self._threads, log=_log, join=joined)
        self.pump = Pump(
            self.machine,
            self,
            self._threads,
            log=_log,
            payloads=ServerPayloads(self.machine),
            other=self._sequencer,
            join=joined,
        )
        self._membership: CoordinatorClient | None = None
        self._closed = False
        self._ended, self._parted = threading.Event(), threading.Event()
        self._why = ""
        self._parting: HeadwaterError | None = None

    # ── life ────────────────────────────────────────────────────────────────────────────────────

    def start(self, over: Channel | None = None) -> None:
        """Listen and join the coordinator, over the connection over which this node enlisted, if it did;
        blocks until all servers have joined.

        Raises:
            ConfigurationError: it cannot listen as `reach` says.
            ConnectionLostError: the coordinator cannot be reached.
            RefusedError: the coordinator refuses this server.
        """
        addresses = self._threads.listen(self._reach, self.pump.serve, towards=self._coordinator)
        for pump in self._pumps():
            pump.begin()
        try:
            membership = CoordinatorClient(
                self._coordinator,
                self.assignment.role,
                self.assignment.index,
                addresses,
                security=self._reach.security,
                over=over,
            )
        except BaseException:
            self.close()
            raise
        membership.watch(self._threads.channels)
        self._membership = membership
        for pump in self._pumps():
            pump.trace = membership.trace
        self.pump.do(lambda now: self.machine.joined(membership.welcome, now))
        self._threads.start(self._watch_membership, "membership")
        if self._closed:
            membership.close()

    def statistics(self) -> m.ServerStatistics:
        """A snapshot of this node; blocks while it processes an entry.

        Raises:
            ConnectionLostError: the node has ended.
        """
        answer = self.pump.ask(m.Ask(), _DIAL_S)
        if not isinstance(answer, m.ServerStatistics):
            raise ConnectionLostError(f"{self.machine.role} {self.machine.index} has ended")
        return answer

    def wait(self) -> None:
        """Block until the node cannot go on.

        Raises:
            EngineError: always; says why.
        """
        self._ended.wait()
        raise EngineError(self._why)

    def wait_for_parting(self) -> HeadwaterError:
        """Block until this is no member any more; returns why: as the coordinator named it where it said so.

        A node that `wait`s outlives a cluster that was closed, and whoever started it ends it.
        """
        self._parted.wait()
        return self._parting or EngineError(self._why)

    def close(self) -> None:
        """End every connection and thread; idempotent."""
        self._closed = True
        self._stop()
        self._threads.join()

    def _stop(self) -> None:
        for pump in self._pumps():
            pump.stop()
        self._threads.close_channels()
        if self._membership is not None:
            self._membership.close()

    def _pumps(self) -> list[Pump]:
        return [pump for pump in (self._sequencer, self.pump) if pump is not None]

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def _watch_membership(self) -> None:
        """The coordinator says nothing but that it is back after it was away, and why this node's membership
        has ended."""
        membership = self._membership
        assert membership is not None
        deadline = membership.welcome.deadline
        try:
            while True:
                try:
                    message = membership.next_message(min(deadline / 4, _LOOK_S))
                except TimeoutError:
                    if membership.away_s > deadline and not self.pump.look(lambda: self.machine.of_use):
                        self._parting = ConnectionLostError(
                            f"no coordinator for {deadline:g} s, and nobody to serve"
                        )
                        self.failed(self._parting)
                        return
                else:
                    self._hear(message)
        except ConnectionLostError as error:
            _log.info("%s: %s", self._threads.name, error)
            self._parting = error
        except HeadwaterError as error:
            self._parting = error
            self.failed(error)
        finally:
            self._parted.set()

    def _hear(self, message: m.AnyMessage) -> None:
        if isinstance(message, m.Welcome):
            self.pump.do(self.machine.coordinator_returned)

    # ── what the machines ask for ───────────────────────────────────────────────────────────────

    def dial(self, member: m.Member | str) -> Channel:
        """Connect to another server, or to the standby."""
        security = self._reach.security
        if isinstance(member, str):
            return dial(member, timeout=_DIAL_S, security=security)
        return dial_member(member, timeout=_DIAL_S, security=security)

    def persist(self, record: Any) -> None:
        """A server keeps nothing on disk."""
        raise AssertionError(record)

    def tell(self, event: Any) -> None:
        """What the coordinator is to know of the standby, or that this node cannot go on."""
        if isinstance(event, CannotGoOn):
            self.failed(EngineError(event.why))
        elif self._membership is not None:
            self._membership.tell(event)

    def perform(self, task: Callable[[], Any]) -> Any:
        """Do what takes long."""
        try:
            return task()
        except (MemoryError, OSError) as error:
            raise EnvironmentFailure(f"{type(error).__name__}: {error}") from error

    def failed(self, error: HeadwaterError) -> None:
        """End all connections: a server that cannot go on is of no use to anybody."""
        if self._closed:
            return
        _log.warning("%s ends: %s", self._threads.name, error)
        self._why = str(error)
        self._stop()
        self._ended.set()
        self._parted.set()
