"""A server node: its shard, the sequencer beside it on server 0, and a thread for every connection.

Locks: `_deciding` guards the sequencer and the order in which entries leave; `_lock` guards the
shard and is held during its passes. Nothing is sent or received under either.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass

from headwater import messages as m
from headwater.errors import ProtocolError, UsageError
from headwater.nodes.intake import Intake
from headwater.nodes.join import join
from headwater.nodes.link import Link
from headwater.nodes.threads import ConnectionThreads
from headwater.sequencer import Sequencer
from headwater.shard import Shard
from headwater.sync import parse_sync
from headwater.wire.channel import Channel, Received
from headwater.wire.listener import Listener, dial

_READING = (m.Attach, m.Pull, m.PullRows, m.CountRows, m.ReadState, m.Leave)

_log = logging.getLogger("headwater.server")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server belongs. `transport`: "unix" (with windows) or "tcp" (values by payload)."""

    index: int
    servers: int
    sync: str
    coordinator: str
    transport: str = "unix"
    patience: float = 10.0


class ServerNode:
    """One server; `start` returns when it has joined, `close` when all its threads have ended."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        sync = parse_sync(settings.sync)
        self._shard = Shard(settings.index, settings.servers, sync.reduce)
        self._sequencer = Sequencer(settings.servers, sync) if settings.index == 0 else None
        self._lock = threading.Lock()
        self._deciding = threading.Lock()
        self._log: deque[m.AnyEntry] = deque()
        self._entry_links: dict[int, Link[m.AnyEntry]] = {}
        self._report_link: Link[m.Held] = Link(lambda held: m.Reports(settings.index, held))
        self._outboxes: dict[int, queue.SimpleQueue[m.Answer | None]] = {}
        self._term = 0
        self._members: dict[int, m.Member] = {}
        self._server_ids: dict[int, int] = {}
        self._welcomed = threading.Event()
        self._threads = ConnectionThreads(f"headwater-server-{settings.index}")

    # ── life ────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Listen, join the coordinator and link up with the sequencer; blocks until all servers joined.

        Raises:
            ConnectionLostError: the coordinator cannot be reached.
            RefusedError: the coordinator refuses this server.
        """
        listener = Listener("unix" if self.settings.transport == "unix" else "tcp")
        self._threads.listen(listener, self._serve)
        try:
            self._join(listener.address)
        except BaseException:
            self.close()
            raise

    def _join(self, address: str) -> None:
        index = self.settings.index
        _, welcome = join(
            self.settings.coordinator, "server", index, addresses=(address,), own=self._threads.own
        )
        self._term = welcome.term
        self._server_ids = {server.id: server.index for server in welcome.servers}
        if self._sequencer is not None:
            self._entry_links = {i: Link(m.Entries) for i in range(1, self.settings.servers)}
        else:
            first = self._threads.own(dial(welcome.servers[0].addresses[0], timeout=self.settings.patience))
            first.send(m.Hello(welcome.member.id, "server", welcome.term))
            self._report_link.connect(first)
            self._threads.start(lambda: self._follow(first), "log")
        self._welcomed.set()

    def close(self) -> None:
        """End every connection and thread; idempotent."""
        self._welcomed.set()
        self._threads.close_channels()
        for outbox in list(self._outboxes.values()):
            outbox.put(None)
        self._threads.join()

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        """Serve one connection until its end; what it does wrong ends it and nothing else."""
        received = channel.receive(timeout=self.settings.patience)
        first = received.message if received is not None else None
        if isinstance(first, m.Ask):
            channel.send(self.statistics())
        elif isinstance(first, m.Hello):
            self._welcomed.wait()
            if first.role == "coordinator":
                self._obey(channel)
            elif first.role == "server":
                self._sequence(channel, first.member)
            else:
                self._serve_member(channel, first.member)
        elif first is not None:
            raise ProtocolError(f"first message was {type(first).__name__}, expected Hello")

    def _obey(self, channel: Channel) -> None:
        """The coordinator's connection: rosters and questions."""
        while (received := channel.receive()) is not None:
            if isinstance(received.message, m.Roster):
                self._take_roster(received.message)
                channel.send(m.Acknowledged(), request=received.request)
            elif isinstance(received.message, m.Ask):
                channel.send(self.statistics(), request=received.request)
            else:
                raise ProtocolError(f"the coordinator sent {type(received.message).__name__}")

    def _take_roster(self, roster: m.Roster) -> None:
        self._term = roster.term
        self._members = {member.id: member for member in roster.members}
        if self._sequencer is not None:
            with self._deciding:
                self._extend(self._sequencer.roster(roster))
            self._spread()

    def _serve_member(self, channel: Channel, member: int) -> None:
        refusal = self._refusal(member)
        if refusal:
            channel.send(m.Refused("RefusedError", refusal))
            return
        self._outboxes[member] = queue.SimpleQueue()
        intake = Intake(self._shard, member)
        try:
            while (received := channel.receive(intake.place)) is not None:
                if isinstance(received.message, m.Scratch):
                    intake.staging(received.message, received.descriptors)
                    continue
                answer = self._exchange(channel, member, intake, received)
                if answer is None:
                    return
                channel.send(answer, request=received.request, buffers=intake.payload(answer))
        finally:
            self._outboxes.pop(member, None)

    def _refusal(self, member: int) -> str:
        """Why this connection cannot be the member's; "" when it can."""
        if member not in self._members:
            return f"member {member} is not in the roster of term {self._term}: join the coordinator first"
        if member in self._outboxes:
            return f"member {member} is connected to server {self.settings.index} already"
        return ""

    def _sequence(self, channel: Channel, member: int) -> None:
        """On server 0: another server's connection, reports in and entries out."""
        if self._sequencer is None or member not in self._server_ids:
            raise ProtocolError(f"member {member} wants to report to server {self.settings.index}")
        index = self._server_ids[member]
        self._entry_links[index].connect(channel)
        while (received := channel.receive()) is not None:
            if not isinstance(received.message, m.Reports) or received.message.server != index:
                raise ProtocolError(f"server {index} sent {type(received.message).__name__}")
            self._decide(index, received.message.held)

    def _follow(self, channel: Channel) -> None:
        """On the other servers: the log, as server 0 writes it."""
        while (received := channel.receive()) is not None:
            if not isinstance(received.message, m.Entries):
                raise ProtocolError(f"server 0 sent {type(received.message).__name__}")
            self._log.extend(received.message.entries)
            self._process()

    # ── one exchange ────────────────────────────────────────────────────────────────────────────

    def _exchange(
        self, channel: Channel, member: int, intake: Intake, received: Received
    ) -> m.Answer | m.Description | None:
        """Hold the request, report it, and wait for the entry that answers it; None when closing."""
        message = received.message
        if isinstance(message, m.Describe):
            with self._lock:
                return self._shard.describe(message.number)
        if not isinstance(message, m.Request):
            raise ProtocolError(f"a member sent {type(message).__name__}")
        if member not in self._members:
            raise ProtocolError(f"member {member} is no member any more")
        if self._members[member].role == "observer" and not isinstance(message, _READING):
            raise ProtocolError(f"an observer sent {type(message).__name__}, which only workers may")
        try:
            staging, rows = intake.staging(message, received.descriptors), intake.rows(message)
            with self._lock:
                held = self._shard.hold(member, message, staging, rows)
        except UsageError as error:
            failure = m.Refused(type(error).__name__, str(error))
            return m.Answer(message.number, self._shard.version, failure=failure)
        if self._sequencer is not None:
            self._decide(0, (held,))
        else:
            self._report_link.put((held,))
            self._report_link.flush()
        outbox = self._outboxes[member]
        while True:
            try:
                return outbox.get(timeout=self.settings.patience)
            except queue.Empty:
                channel.send(m.Waiting(message.number, self._reason(member)))

    def _reason(self, member: int) -> str:
        if self._sequencer is None:
            return f"server {self.settings.index} holds the exchange and waits for the log"
        with self._deciding:
            return self._sequencer.waits().get(member, "server 0 is at it")

    # ── the log ─────────────────────────────────────────────────────────────────────────────────

    def _decide(self, server: int, held: tuple[m.Held, ...]) -> None:
        """On server 0: give the sequencer a report and spread the entries that follow from it."""
        assert self._sequencer is not None
        with self._deciding:
            self._extend(self._sequencer.report(server, held))
        self._spread()

    def _extend(self, entries: list[m.AnyEntry]) -> None:
        """Append entries for every server; under `_deciding`, so that all get one order."""
        self._log.extend(entries)
        for link in self._entry_links.values():
            link.put(entries)

    def _spread(self) -> None:
        for link in self._entry_links.values():
            link.flush()
        self._process()

    def _process(self) -> None:
        """Process what has arrived of the log and hand the answers to their connections' threads.

        A server that cannot process an entry is of no use to anybody: it hangs up on all.
        """
        while self._log:
            with self._lock:
                if not self._log:
                    return
                entry = self._log.popleft()
                try:
                    answers = self._shard.process(entry)
                except BaseException:
                    _log.exception("server %d ends: it cannot process %r", self.settings.index, entry)
                    self._threads.close_channels()
                    raise
            for member, answer in answers:
                if member in self._outboxes:
                    self._outboxes[member].put(answer)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def statistics(self) -> m.ServerStatistics:
        """A snapshot; waits for the pass under way, as positions change with it."""
        with self._lock:
            recorded = self._shard.positions.recorded()
        waits: dict[int, str] = {}
        if self._sequencer is not None:
            with self._deciding:
                waits = self._sequencer.waits()
        return m.ServerStatistics(
            index=self.settings.index,
            version=self._shard.version,
            position=self._shard.position,
            term=self._term,
            exchanges=self._shard.exchanges,
            models=tuple(vector.statistics() for vector in list(self._shard.vectors.values())),
            tables=tuple(table.statistics() for table in list(self._shard.tables)),
            waits=waits,
            recorded=recorded,
        )
