"""A simulated server or standby: the real course, replica link and sequencer in a process that can fail.

It does what `headwater.runtime.server` does with threads and sockets; whatever is decided is decided by the
classes that servers run.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.membership import Ended, Joined, Returned
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.sequencing import Policy
from headwater.runtime.server.standby_link import StandbyLink
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.testing.processes.intake import MemberLine
from headwater.testing.processes.log import LogSide
from headwater.testing.processes.membership import CoordinatorLine
from headwater.testing.processes.mirror import MirrorLine
from headwater.testing.processes.network import End, Network, Process
from headwater.testing.processes.shard import WatchedShard, Write
from headwater.testing.processes.times import PATIENCE_S
from headwater.wire.channel import Channel


class World(Protocol):
    """What a server tells the world."""

    servers: int
    policy: Policy

    def processed(self, host: Host, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """An entry was processed here."""

    def prepared(self, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """What a standby must follow was collected here."""

    def broke_protocol(self, member: int, connection_epoch: int, error: ProtocolError) -> None:
        """A member's connection ended with this."""

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken."""

    def note(self, text: str) -> None:
        """For the trace."""


class Host(Process):
    """Server or standby `index`.

    Attributes:
        role: "server" or "standby"; changes when this standby takes over.
        id: of its membership; 0 before it has one.
        stops_in_pass: seconds that it will stop in the middle of the next pass over windows, once.
    """

    def __init__(
        self, network: Network, world: World, name: str, index: int, role: m.Role, coalesce_s: float
    ) -> None:
        super().__init__(network, name)
        self.index = index
        self.role = role
        self.id = 0
        self.stops_in_pass: float | None = None
        self._world = world
        shard = self.watched(WatchedShard(index, world.servers, world.policy.sync.reduce))
        self.course = LogApplier(shard, replicated=world.policy.replicated)
        self.log = LogSide(self, self.course, index, world.servers, world.policy, coalesce_s, self._settle)
        self._roster = m.Roster(0, 0, ())
        self._line = CoordinatorLine(self, m.Join(role, index, self.pid, "here", (name,)), self._told)
        self._news: dict[int, m.CaughtUp | m.StandbyLost] = {}
        self._early: list[tuple[End, m.Hello]] = []
        self._waiting: list[tuple[End, m.Hello, float]] = []

    def start(self) -> None:
        """Join the coordinator."""
        self._line.begin()

    @property
    def shard(self) -> WatchedShard:
        """Its shard of now."""
        assert isinstance(self.course.shard, WatchedShard)
        return self.course.shard

    def _told(self, event: Any) -> None:
        if isinstance(event, Joined):
            self.id = event.welcome.member.id
            early, self._early = self._early, []
            for end, hello in early:
                self._first(end, hello)
        elif isinstance(event, Returned):  # it may never have read what it was told of standbys
            for news in self._news.values():
                self._line.tell(news)
        elif isinstance(event, Ended):
            self._world.note(f"{self.name} hears that it has lost its place, and ends: {event.error}")
            self.exit()

    def _tell(self, news: m.CaughtUp | m.StandbyLost) -> None:
        self._news[news.standby] = news
        self._line.tell(news)

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def accept(self, end: End) -> None:
        """Whoever it is says so first."""
        end.listen(lambda frame: self._first(end, frame.message), lambda: None)

    def _first(self, end: End, hello: m.AnyMessage) -> None:
        assert isinstance(hello, m.Hello), hello
        if not self.id:
            end.wait()
            self._early.append((end, hello))
        elif hello.role == "coordinator":
            end.listen(lambda frame: self._obey(end, frame.message), lambda: None)
        else:
            end.wait()
            self._waiting.append((end, hello, self.network.agenda.now + PATIENCE_S))
            self.after(PATIENCE_S, self._settle)
            self._settle()

    def _settle(self) -> None:
        """Serve those whose time has come, or has passed."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not self._served(*one):
                self._waiting.append(one)

    def _served(self, end: End, hello: m.Hello, until: float) -> bool:
        over = self.network.agenda.now >= until
        if end.closed:
            return True
        if self._roster.term < hello.term and not over:
            return False
        member = next((one for one in self._roster.members if one.id == hello.member), None)
        if hello.role == "server":
            self._serve_server(end, member)
            return True
        if self._roster.term < hello.term:
            end.close()
            return True
        if member is None or self.role != "server":
            end.send(
                m.Refused("RefusedError", f"member {hello.member} is not in the roster, or came to a standby")
            )
            end.close()
            return True
        if not self.course.serving.is_set():
            if over:
                end.close()
            return over
        MemberLine(self, end, member.id, hello.connection_epoch).begin()
        return True

    def _serve_server(self, end: End, sender: m.Member | None) -> None:
        """A server that reports to the sequencer here, or one whose standby this is."""
        if sender is None or sender.role != "server":
            end.close()
        elif sender.index == self.index:
            MirrorLine(self.course, end, self._world.policy.sync.reduce, self.watched).begin()
        else:
            self.log.serve_reports(end, sender.index)

    # ── the coordinator's rosters ───────────────────────────────────────────────────────────────

    def _obey(self, end: End, message: m.AnyMessage) -> None:
        answer: m.AnyMessage = m.Acknowledged()
        if isinstance(message, m.Roster):
            self._take_roster(message)
        else:
            assert isinstance(message, m.Ask), message
            answer = self._statistics()
        if not end.closed:
            end.send(answer)

    def _statistics(self) -> m.ServerStatistics:
        shard = self.shard
        return m.ServerStatistics(
            self.id,
            self.role,
            self.index,
            shard.version,
            shard.position,
            self._roster.term,
            shard.exchanges,
            (),
            (),
            self.log.waits(),
            shard.positions.recorded(),
        )

    def _take_roster(self, roster: m.Roster) -> None:
        if roster.term <= self._roster.term:
            return
        self._roster = roster
        own = next((one for one in roster.members if one.id == self.id), None)
        if own is not None and own.role == "server":
            if self.role == "standby":
                self.course.shard.promote(roster.since)
                self.role = "server"
                self._world.note(f"{self.name} takes over in term {roster.since}")
            self.log.take_roster(roster)
            self._keep_standby(roster)
        self._settle()

    # ── with a standby ──────────────────────────────────────────────────────────────────────────

    def _keep_standby(self, roster: m.Roster) -> None:
        """Begin with a new standby, and let go of one that is none any more."""
        standby = next((x for x in roster.members if x.role == "standby" and x.index == self.index), None)
        replica = self.course.replica
        if replica is not None and (standby is None or standby.id != replica.member.id):
            self.course.detach()
            replica.close()
            replica = None
            self.log.held(())  # what only the standby lacked counts now
        if standby is not None and replica is None:
            self._replicate(standby, roster.term)

    def _replicate(self, standby: m.Member, term: int) -> None:
        end = self.network.dial(self, standby.addresses[0])
        if end is None:
            self._tell(m.StandbyLost(standby.id))
            return
        end.send(m.Hello(self.id, "server", term))
        replica = StandbyLink(standby, cast(Channel, end))
        self.course.attach(replica)
        end.listen(
            lambda frame: self._followed(replica, cast(m.AppendAck, frame.message)),
            lambda: self._tell(m.StandbyLost(standby.id)),
        )

    def _followed(self, replica: StandbyLink, message: m.AppendAck) -> None:
        if self.course.acknowledged(replica, message):
            self._tell(m.CaughtUp(replica.member.id))
        self.log.held(())

    def watched(self, shard: WatchedShard) -> WatchedShard:
        """A shard of this server, whose entries the world is told of."""
        shard.watcher = self
        return shard

    # ── as a member's connection and a shard see it ─────────────────────────────────────────────

    def held(self, held: m.Held) -> None:
        """This is held here: report it."""
        self.log.held((held,))

    def broke_protocol(self, member: int, connection_epoch: int, error: ProtocolError) -> None:
        """A member's connection ends with this."""
        self._world.broke_protocol(member, connection_epoch, error)

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken here."""
        self._world.took_snapshot(member, number, snapshot)

    def processed(self, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """The shard has processed this entry."""
        self._world.processed(self, shard, entry)

    def prepared(self, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """The shard has collected what the standby must follow."""
        self._world.prepared(shard, resolved)

    def interrupts(self, shard: WatchedShard) -> bool:
        """Whether the pass that begins now is to be interrupted."""
        return self.stops_in_pass is not None

    def interrupted(self, shard: WatchedShard, rest: list[Write]) -> None:
        """Stop here, and write the rest when it goes on."""
        seconds, self.stops_in_pass = self.stops_in_pass, None
        self._world.note(f"{self.name} stops in the middle of a pass over windows")
        self.freeze(seconds or 0.0, rest)
