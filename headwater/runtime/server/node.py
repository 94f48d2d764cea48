"""A server node: its shard's way through the log, the sequencer beside it on server 0, its standby.

A standby is the same node in another role: it follows a server until the roster says that it is that server.
A thread for every connection; nothing is sent or received while a lock is held.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass

from headwater import messages as m
from headwater.errors import ConnectionLostError, EngineError, HeadwaterError, ProtocolError, RefusedError
from headwater.runtime.coordinator_client import CoordinatorClient
from headwater.runtime.dialling import dial_member
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.following import Following
from headwater.runtime.server.reporting import Reporting
from headwater.runtime.server.restoring import restored
from headwater.runtime.server.sequencing import Policy
from headwater.runtime.server.serving import MemberConnection
from headwater.runtime.server.standby_link import StandbyLink
from headwater.runtime.threads import ConnectionThreads
from headwater.shard import Shard
from headwater.spec.sync import parse_sync
from headwater.wire.channel import Channel
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logging.getLogger("headwater.server")

_DIAL_S = 10.0
_LOOK_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server belongs. `coordinator`: its address; `reach`: where members reach this server.

    `role`: "server", or "standby" of the server with this index; `replicas`: of every server. `restore`: path
    of the checkpoint that a server begins with, "" for none.
    """

    index: int
    servers: int
    sync: str
    coordinator: str
    reach: Endpoint = LOCAL
    patience: float = 10.0
    role: m.Role = "server"
    replicas: int = 0
    min_workers: int = 1
    restore: str = ""


class ServerNode:
    """One server; `start` returns when it has joined, `close` when all its threads have ended."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._sync = parse_sync(settings.sync)
        place = settings.index, settings.servers, self._sync.reduce
        begins = settings.restore and settings.role == "server"
        shard = restored(settings.restore, *place) if begins else Shard(*place)
        self._threads = ConnectionThreads(f"headwater-{settings.role}-{settings.index}")
        self._course = LogApplier(shard, replicated=settings.replicas > 0)
        policy = Policy(self._sync, settings.min_workers, settings.replicas > 0)
        self._reporting = Reporting(
            self._course, settings.index, settings.servers, policy, self._threads, self._fail, self._dial
        )
        self._role: m.Role = settings.role
        self._roster = m.Roster(0, 0, ())
        self._known = threading.Condition()
        self._membership: CoordinatorClient | None = None
        self._closed = False
        self._mirrors = False
        self._standby = 0
        self._standbys: dict[int, m.CaughtUp | m.StandbyLost] = {}
        self._joined, self._ended = threading.Event(), threading.Event()
        self._why = ""
        self._parted = threading.Event()
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
        settings, reach = self.settings, self.settings.reach
        addresses = self._threads.listen(reach, self._serve, towards=settings.coordinator)
        try:
            membership = CoordinatorClient(
                settings.coordinator,
                settings.role,
                settings.index,
                addresses,
                security=reach.security,
                over=over,
            )
        except BaseException:
            self.close()
            raise
        membership.watch(self._threads.channels)
        self._membership = membership
        self._joined.set()
        self._threads.start(self._watch_membership, "membership")
        if self._closed:
            membership.close()

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

    def _watch_membership(self) -> None:
        """The coordinator says nothing but that it is back after it was away, and why this node's membership
        has ended."""
        membership = self._membership
        assert membership is not None
        deadline = membership.welcome.deadline
        try:
            while True:
                try:
                    membership.next_message(min(deadline / 4, _LOOK_S))
                    self._tell_again()
                except TimeoutError:
                    if membership.away_s > deadline and not self._is_of_use():
                        self._parting = ConnectionLostError(
                            f"no coordinator for {deadline:g} s, and nobody to serve"
                        )
                        self._fail(str(self._parting))
                        return
        except ConnectionLostError as error:
            _log.info("%s: %s", self._threads.name, error)
            self._parting = error
        except HeadwaterError as error:
            self._parting = error
            self._fail(str(error))
        finally:
            self._parted.set()

    def _is_of_use(self) -> bool:
        """Whether somebody is served here, so that this node goes on however long the coordinator is away."""
        return bool(self._course.outboxes) or self._mirrors

    def _fail(self, why: str) -> None:
        """End all connections: a server that cannot go on is of no use to anybody."""
        _log.warning("%s ends: %s", self._threads.name, why)
        self._threads.close_channels()
        if self._membership is not None:
            self._membership.close()
        self._why = why
        self._ended.set()
        self._parted.set()

    def close(self) -> None:
        """End every connection and thread; idempotent."""
        with self._known:
            self._closed = True
            self._known.notify_all()
        self._joined.set()
        self._course.serving.set()
        self._threads.close_channels()
        self._reporting.close()
        for outbox in list(self._course.outboxes.values()):
            outbox.answers.put(None)
        replica = self._course.detach()
        if replica is not None:
            replica.close()
        if self._membership is not None:
            self._membership.close()
        self._threads.join()

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        """Serve one connection until its end; what it does wrong ends it and nothing else."""
        received = channel.receive(timeout=self.settings.patience)
        first = received.message if received is not None else None
        if isinstance(first, m.Ask):
            channel.send(self.statistics())
            return
        if first is None:
            return
        if not isinstance(first, m.Hello):
            raise ProtocolError(f"first message was {type(first).__name__}, expected Hello")
        self._joined.wait()
        if self._membership is None:
            return
        if first.role == "coordinator":
            self._obey(channel)
        elif first.role == "server":
            self._serve_server(channel, first)
        else:
            self._serve_member(channel, first)

    def _serve_member(self, channel: Channel, hello: m.Hello) -> None:
        roster = self._roster_of(hello.term)
        if roster.term < hello.term:
            # The coordinator has not reached this server yet: the member asks again where to go.
            _log.info("%s knows term %d, a member came with %d", self._threads.name, roster.term, hello.term)
            return
        member = next((one for one in roster.members if one.id == hello.member), None)
        if member is None or self._role != "server":
            why = f"is not in the roster of term {roster.term}" if member is None else "came to a standby"
            channel.send(
                m.Refused("RefusedError", f"member {hello.member} {why}: join the coordinator first")
            )
            return
        patience = self.settings.patience
        if not self._course.serving.wait(patience):
            why = self._reporting.reason(member.id)
            raise ProtocolError(f"server {self.settings.index} does not serve members yet: {why}")
        MemberConnection(
            channel, member, hello.connection_epoch, self._course, self._reporting, patience
        ).serve()

    def _serve_server(self, channel: Channel, hello: m.Hello) -> None:
        """A server that reports to the sequencer here, or one whose standby this is."""
        roster = self._roster_of(hello.term)
        sender = next((one for one in roster.members if one.id == hello.member), None)
        if sender is None or sender.role != "server":
            raise ProtocolError(f"member {hello.member} is no server in term {roster.term}")
        if sender.index == self.settings.index:
            self._mirror(channel)
        else:
            self._reporting.serve_reports(channel, sender.index)

    def _roster_of(self, term: int) -> m.Roster:
        """The roster, once it is of this term or a newer one; as it is when that takes too long."""
        with self._known:
            self._known.wait_for(lambda: self._roster.term >= term or self._closed, self.settings.patience)
            return self._roster

    # ── the coordinator ─────────────────────────────────────────────────────────────────────────

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
        with self._known:
            if roster.term <= self._roster.term:
                return
            self._roster = roster
            own = next((one for one in roster.members if one.id == self._own_id), None)
            if own is not None and own.role == "server":
                if self._role == "standby":
                    self._take_over(roster.since)
                self._reporting.take_roster(roster)
                self._keep_standby(roster)
            self._known.notify_all()

    @property
    def _own_id(self) -> int:
        assert self._membership is not None
        return self._membership.welcome.member.id

    # ── as a standby ────────────────────────────────────────────────────────────────────────────

    def _mirror(self, channel: Channel) -> None:
        """Follow a server entry by entry, until it ends or this node takes over from it."""
        self._mirrors = True
        try:
            Following(channel, self._course, self._sync.reduce, self._threads).run()
        finally:
            self._mirrors = False

    def _take_over(self, term: int) -> None:
        """The roster says that this node is the server now."""
        with self._course.lock:
            self._course.shard.promote(term)
        self._role = "server"
        _log.warning("standby %d (pid %d) takes over in term %d", self.settings.index, os.getpid(), term)

    # ── with a standby ──────────────────────────────────────────────────────────────────────────

    def _keep_standby(self, roster: m.Roster) -> None:
        """Begin with a new standby, once, and let go of one that is none any more.

        Rosters come while it is dialled. One that was begun with twice would follow both, and be promoted as
        either: what its server was told that it has could be gone.
        """
        living = {member.id for member in roster.members}
        self._standbys = {id: told for id, told in self._standbys.items() if id in living}
        index = self.settings.index
        standby = next((x for x in roster.members if x.role == "standby" and x.index == index), None)
        replica = self._course.replica
        if replica is not None and (standby is None or standby.id != replica.member.id):
            self._course.detach()
            replica.close()
            self._reporting.prepared()  # what only the standby lacked counts now
        if standby is not None and standby.id != self._standby:
            self._standby = standby.id
            self._threads.start(lambda: self._replicate(standby, roster.term), "replica")

    def _replicate(self, standby: m.Member, term: int) -> None:
        """Keep a standby until its connection ends, and tell the coordinator of both ends.

        `term`: of a roster that has both. The standby may get it later than this server.
        """
        try:
            channel = self._threads.own(self._dial(standby))
            channel.send(m.Hello(self._own_id, "server", term))
            replica = StandbyLink(standby, channel)
            self._course.attach(replica)
            replica.follow(lambda message: self._followed(replica, message))
        except ConnectionLostError as error:
            _log.info("%s lost its standby: %s", self._threads.name, error)
        except RefusedError as error:
            _log.warning("%s has no standby: %s", self._threads.name, error)
        self._tell_of(m.StandbyLost(standby.id))

    def _dial(self, member: m.Member) -> Channel:
        return dial_member(member, timeout=_DIAL_S, security=self.settings.reach.security)

    def _followed(self, replica: StandbyLink, message: m.AppendAck) -> None:
        if self._course.acknowledged(replica, message):
            self._tell_of(m.CaughtUp(replica.member.id))
        self._reporting.prepared()

    def _tell_of(self, news: m.CaughtUp | m.StandbyLost) -> None:
        assert self._membership is not None
        self._standbys[news.standby] = news
        self._membership.tell(news)

    def _tell_again(self) -> None:
        """The coordinator is back: what it was told last of standbys it may never have read."""
        assert self._membership is not None
        for news in list(self._standbys.values()):
            self._membership.tell(news)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def statistics(self) -> m.ServerStatistics:
        """A snapshot; waits for the pass under way, as positions change with it."""
        with self._course.lock:
            shard = self._course.shard
            recorded = shard.positions.recorded()
        return m.ServerStatistics(
            member=self._membership.welcome.member.id if self._membership is not None else 0,
            role=self._role,
            index=self.settings.index,
            version=shard.version,
            position=shard.position,
            term=self._roster.term,
            exchanges=shard.exchanges,
            models=tuple(vector.statistics() for vector in list(shard.vectors.values())),
            tables=tuple(table.statistics() for table in list(shard.tables)),
            waits=self._reporting.waits(),
            recorded=recorded,
        )
