"""A server node: who is served, in which role, and what follows from a roster.

Theory of operation. A node is a *server* or the *standby* of one, and a standby may become a server, never
the other way round. Everything that it does begins with a connection, whose first message says who is
there:

    stranger ──Hello──▶ coordinator: rosters and questions
                      ▶ member: its exchanges (`headwater.machines.requests`)
                      ▶ another server, on server 0: handed over to the sequencer (`…log_host`)
                      ▶ this standby's server: replication (`…standby_receiver`)
             ──Ask────▶ answered, and closed

A Hello may come too early: before this node has joined, before the roster of the Hello's term, before all
that members may have seen is applied here, or before the member's former connection has ended. It waits
then, as an entry with a deadline, and `headwater.machines.hello` judges it again when one of these changes.

A roster couples everything. It makes a standby a server, begins a new term of the log (`ReportLink`), and
says which standby this server has (`OwnStandby`). What the log brings is done piece by piece: while the
machine is `busy` the driver calls `advance`, which makes at most one pass over parameters, and what came of
it leaves before the next.

Members read outside the log what is applied here. A server that was replaced without knowing it must not
show that any more, so it does only while it holds a lease of its standby (`headwater.machines.read_lease`),
and a standby that takes over serves nobody before any such lease has ended.

On server 0 the sequencer speaks over `BESIDE`; what this node hears as a member of the coordinator's comes
with `joined` and `coordinator_returned`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, RefusedError
from headwater.machines.actions import (
    BESIDE,
    Actions,
    Close,
    Conn,
    HandOver,
    Note,
    Pause,
    Perform,
    Resume,
    Send,
    Tell,
)
from headwater.machines.applier import LogApplier
from headwater.machines.hello import HelloVerdict, Self, judge
from headwater.machines.log_link import ReportLink
from headwater.machines.memory import Given, ServerMemory
from headwater.machines.own_standby import OwnStandby
from headwater.machines.questions import Questions
from headwater.machines.read_lease import FENCE_S
from headwater.machines.requests import MemberRequests
from headwater.machines.standby_link import StandbyLink
from headwater.machines.standby_receiver import StandbyReceiver
from headwater.shard import Shard
from headwater.shard.snapshot import ShardSnapshot


class CannotGoOn(NamedTuple):
    """Told to the node's owner: this node cannot go on."""

    why: str


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What a node is to be.

    `patience`: seconds for which a connection may wait before it is given up, and a member before it hears
    why. `standby_limit`: seconds for which a standby may be unreachable, or owe an acknowledgement.
    """

    index: int
    servers: int
    role: m.Role = "server"
    replicated: bool = False
    patience: float = 10.0
    standby_limit: float = 30.0


class _Early(NamedTuple):
    """A connection that waits to be served; `hello` None: it has not said who is there."""

    hello: m.Hello | None
    until: float


class ServerMachine:
    """One server or standby. `shard`: what it begins with; `restore`: makes a shard of a snapshot.

    Attributes:
        role: "server" or "standby".
        id: of its membership; 0 before it has joined.
        due: when `tick` should come; None for never.
        log: its end of the log.
        traffic: asks the node what it has sent and received.
    """

    def __init__(
        self, plan: ServerPlan, shard: Shard, memory: ServerMemory, restore: Callable[[ShardSnapshot], Shard]
    ) -> None:
        self.index = plan.index
        self.role: m.Role = plan.role
        self.id = 0
        self.due: float | None = None
        self.memory = memory
        self.traffic: Callable[[], m.Traffic] = m.Traffic
        self._plan = plan
        self._cluster = ""
        self._restore = restore
        self._roster = m.Roster(0, 0, ())
        self._applier = LogApplier(shard, replicated=plan.replicated)
        self.log = ReportLink(self._applier, plan.index, plan.servers)
        self._standby = OwnStandby(self._applier, plan.index, memory, plan.standby_limit)
        self._receiver: StandbyReceiver | None = None
        self._early: dict[Conn, _Early] = {}
        self._controls: set[Conn] = set()
        self._requests: dict[Conn, MemberRequests] = {}
        self._members: dict[int, MemberRequests] = {}
        self._questions = Questions(self.log, plan.patience, self.statistics)
        self._served = False
        self._fenced_until: float | None = None
        self._tasks: dict[str, tuple[Conn, Callable[[Any], Actions]]] = {}
        self._task = 0

    # ── for the driver ──────────────────────────────────────────────────────────────────────────

    @property
    def shard(self) -> Shard:
        """The shard of now."""
        return self._applier.shard

    @property
    def standby(self) -> StandbyLink | None:
        """The link to the standby that follows this server."""
        return self._standby.link

    def served(self, conn: Conn) -> MemberRequests | None:
        """The member's exchanges that come over a connection; None where it is no member's."""
        return self._requests.get(conn)

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        return self._applier.busy

    @property
    def of_use(self) -> bool:
        """Whether this node serves or follows anybody, so that it goes on without a coordinator."""
        return bool(self._members) or self._receiver is not None

    def exchanges_of(self, conn: Conn, message: m.AnyMessage) -> tuple[tuple[int, int], ...]:
        """The exchange that a message from `conn` is, for traces."""
        requests, number = self._requests.get(conn), getattr(message, "number", 0)
        return ((requests.member.id, number),) if requests is not None and number else ()

    def next_piece(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        """What `advance` would do next, for traces."""
        entry = self._applier.next_entry
        if isinstance(entry, m.Committed):
            return f"commit {entry.version}", tuple((one.member, one.number) for one in entry.updates)
        return "apply" if entry is None else type(entry).__name__, ()

    def place(self, conn: Conn, message: m.AnyMessage, length: int) -> Any:
        """Where the payload of `message` goes; in the connection's thread, without the lock.

        Raises:
            ProtocolError: the message has none.
        """
        owner = self._requests.get(conn) or self._receiver_of(conn)
        if owner is None:
            raise ProtocolError(f"{type(message).__name__} with a payload of {length} bytes, expected none")
        return owner.place(message, length)

    def unpack(self, conn: Conn, message: m.AnyMessage, given: Given) -> Any:
        """What came with `message`, for `received`; in the connection's thread, without the lock.

        Raises:
            HeadwaterError: as `MemberMemory.unpack`, `StandbyReceiver.unpack`.
        """
        owner = self._requests.get(conn) or self._receiver_of(conn)
        if owner is not None:
            return owner.unpack(message, given)
        if given:
            raise ProtocolError(f"{type(message).__name__} came with a descriptor, expected none")
        return None

    def _receiver_of(self, conn: Conn) -> StandbyReceiver | None:
        receiver = self._receiver
        return receiver if receiver is not None and receiver.conn == conn else None

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """A connection exists."""
        if dialled is None:
            self._early[conn] = _Early(None, now + self._plan.patience)
            self._wake(now + self._plan.patience)
            return []
        hello = m.Hello(self.id, "server", self._roster.term, cluster=self._cluster)
        if dialled.startswith("log "):
            return self.log.opened(conn, dialled, hello)
        actions = self._standby.opened(conn, dialled, hello, now)
        self._wake(self._standby.due)
        return actions

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """A message came.

        Raises:
            HeadwaterError: the peer broke the protocol.
        """
        requests = self._requests.get(conn)
        if requests is not None:
            actions = requests.received(message, payload, now, request)
            if requests.waiting:
                self._wake(now + self._plan.patience)
            return actions
        if conn == BESIDE or conn == self.log.conn:
            return self._hear_log(message, now)
        receiver = self._receiver_of(conn)
        if receiver is not None:
            return receiver.received(message, payload)
        if self.standby is not None and self.standby.conn == conn:
            return self._standby.received(message, now) + self._report_moved() + self._compared()
        if conn in self._controls:
            return self._obey(conn, message, now, request)
        return self._meet(conn, message, now) if conn in self._early else []

    def unreachable(
        self, dialled: str, why: str, now: float, *, nobody: bool = False, refused: bool = False
    ) -> Actions:
        """A dial failed."""
        if not dialled.startswith("log "):
            actions = self._standby.unreachable(dialled, why, now, refused=refused)
            self._wake(self._standby.due)
            return actions
        if refused and dialled == self.log.dialled:
            return [Tell(CannotGoOn(f"it is not admitted to the log: {why}"))]
        self.log.unreachable(dialled, why, now)
        self._wake(self.log.due)
        return []

    def closed(self, conn: Conn, now: float) -> Actions:
        """A connection has ended."""
        self._early.pop(conn, None)
        self._controls.discard(conn)
        self._questions.closed(conn)
        if self._receiver_of(conn) is not None:
            self._receiver = None
        self.log.closed(conn, now)
        self._wake(self.log.due)
        actions = self._standby.closed(conn) + self._compared()
        requests = self._requests.pop(conn, None)
        if requests is not None:
            del self._members[requests.member.id]
            actions += self._look_at_hellos(now)  # the member's next connection may wait for this
        return actions

    def failed(self, conn: Conn, error: HeadwaterError, now: float) -> Actions:
        """Something that came over a connection breaks the protocol: a member is told before it ends."""
        actions: Actions = []
        if conn in self._requests and isinstance(error, ProtocolError):
            actions.append(Send(conn, m.Refused("ProtocolError", str(error))))
        return [*actions, Close(conn, str(error))]

    # ── who is there ────────────────────────────────────────────────────────────────────────────

    def _meet(self, conn: Conn, message: m.AnyMessage, now: float) -> Actions:
        """The first message of a connection."""
        if isinstance(message, m.Ask):
            del self._early[conn]
            return self._answer_ask(conn, 0)
        if not isinstance(message, m.Hello):
            raise ProtocolError(f"first message was {type(message).__name__}, expected Hello")
        until = now + self._plan.patience
        self._early[conn] = _Early(message, until)
        actions = self._greet(conn, message)
        if conn in self._early:
            self._wake(until)
            actions.append(Pause(conn))
        return actions

    def _look_at_hellos(self, now: float) -> Actions:
        """Something has changed that a Hello may wait for."""
        actions: Actions = []
        for conn, early in list(self._early.items()):
            if early.hello is not None:
                actions += self._greet(conn, early.hello)
                if conn not in self._early:
                    actions.append(Resume(conn))
        return actions

    def _judge(self, hello: m.Hello) -> HelloVerdict:
        known = self._members.get(hello.member)
        former = None if known is None else known.connection_epoch
        own = Self(self.id, self.index, self.role, self._cluster, self._roster, self._may_serve)
        return judge(hello, own, former)

    def _greet(self, conn: Conn, hello: m.Hello) -> Actions:
        """Have whoever says Hello served or refused, or wait on."""
        what, why, sender = self._judge(hello)
        if what == "wait":
            known = self._members.get(hello.member) if sender is not None else None
            if known is None or not self._may_serve:
                return []
            return [Close(known.conn, f"member {hello.member} has connected anew", at_once=True)]
        del self._early[conn]
        if what == "member" and sender is not None:
            return self._serve(conn, sender, hello.connection_epoch)
        if what == "reports" and sender is not None:
            return [HandOver(conn, str(sender.index))]
        if what == "followed":
            return self._follow(conn)
        if what == "coordinator":
            self._controls.add(conn)
            return []
        refusal: Actions = [Send(conn, m.Refused("RefusedError", why))] if what == "refuse" else []
        return [*refusal, Close(conn, why)]

    def _serve(self, conn: Conn, member: m.Member, epoch: int) -> Actions:
        try:
            self.shard.reconnected(member.id, epoch)
        except RefusedError as error:
            return [Send(conn, m.Refused("RefusedError", str(error))), Close(conn, str(error))]
        requests = MemberRequests(self, conn, member, epoch)
        self._requests[conn] = self._members[member.id] = requests
        return []

    def _follow(self, conn: Conn) -> Actions:
        """Replicate the server at the other end; of two connections the later one counts."""
        former = self._receiver
        self._receiver = StandbyReceiver(conn, self._applier, self.memory, self._restore, self.perform)
        return [] if former is None else [Close(former.conn, "its server has connected anew", at_once=True)]

    # ── the coordinator ─────────────────────────────────────────────────────────────────────────

    def coordinator_returned(self, now: float) -> Actions:
        """The coordinator is back after it was away."""
        return self._standby.tell_again()

    def joined(self, welcome: m.Welcome, now: float) -> Actions:
        """The coordinator has taken this node in."""
        self.id, self._cluster = welcome.member.id, welcome.cluster
        return self._look_at_hellos(now)

    def _obey(self, conn: Conn, message: m.AnyMessage, now: float, request: int) -> Actions:
        """Rosters and questions."""
        if isinstance(message, m.Ask):
            return self._answer_ask(conn, request)
        if not isinstance(message, m.Roster):
            raise ProtocolError(f"the coordinator sent {type(message).__name__}")
        return [*self._take_roster(message, now), Send(conn, m.Acknowledged(), request=request)]

    def _take_roster(self, roster: m.Roster, now: float) -> Actions:
        if roster.term <= self._roster.term:
            return []
        self._roster = roster
        actions: Actions = []
        own = next((one for one in roster.members if one.id == self.id), None)
        if own is not None and own.role == "server":
            if self.role == "standby":
                actions += self._take_over(roster.since, own, now)
            actions += self.log.take_roster(roster)
            actions += self._standby.take_roster(roster, now)
            actions += self._report_moved()  # what only a lost standby lacked counts now
            self._wake(self._standby.due)
        return actions + self._note_serving(now) + self._look_at_hellos(now)

    def _take_over(self, term: int, own: m.Member, now: float) -> Actions:
        """The roster says that this standby is the server now."""
        self.shard.promote(term)
        self.role = "server"
        self._fenced_until = now + FENCE_S
        self._wake(self._fenced_until)
        former, self._receiver = self._receiver, None
        note = Note(f"standby {self.index} (pid {own.pid}) takes over in term {term}", "warning")
        if former is None:
            return [note]
        return [note, Close(former.conn, "this standby has taken over", at_once=True)]

    # ── the log ─────────────────────────────────────────────────────────────────────────────────

    def readable(self, now: float) -> bool:
        """As `RequestServer.readable`: no other server has this one's place, as far as that can be known."""
        standby = self._applier.standby
        return self._served and (standby is None or not standby.needed or standby.lease.holds(now))

    def report(self, held: m.Held) -> Actions:
        """Tell the sequencer that this is held."""
        return self.log.report((held,))

    def _report_moved(self) -> Actions:
        return self.log.report() if self._applier.moved and self.role == "server" else []

    def _hear_log(self, message: m.AnyMessage, now: float) -> Actions:
        if isinstance(message, m.Reasons):
            return self._questions.explained(message, self._requests.values())
        try:
            actions = self.log.take(message)
        except HeadwaterError as error:
            return [Tell(CannotGoOn(f"it cannot follow the log: {error}"))]
        if self._applier.moved:
            actions += self._report_moved()
        return actions if self._served == self._may_serve else actions + self._note_serving(now)

    @property
    def _may_serve(self) -> bool:
        """Whether members can be served: all that they may have seen is here, and nobody else serves them."""
        return self._applier.serving and self._fenced_until is None

    def _note_serving(self, now: float) -> Actions:
        """Members can be served from now on, or can be no more."""
        if self._served == self._may_serve:
            return []
        self._served = self._may_serve
        return self._look_at_hellos(now)

    def advance(self, now: float) -> Actions:
        """Do the next thing that the log asks for, at most one pass over parameters.

        Raises:
            HeadwaterError: it cannot be done, so this node cannot go on.
        """
        actions: Actions = []
        for member, answer in self._applier.advance(actions):
            requests = self._members.get(member)
            if requests is not None:
                actions += requests.answered(answer)
        if self._receiver is not None:
            return actions + self._receiver.applied()
        if self._applier.moved and not self._applier.waiting:
            actions += self._report_moved()
        if self._standby.link is not None:
            self._standby.watch(now)
            self._wake(self._standby.due)
        return actions if self._served else actions + self._note_serving(now)

    @property
    def unprepared(self) -> bool:
        """Whether there is not enough memory for rows to come."""
        return self.shard.tables.unprepared

    def prepare(self) -> None:
        """Have memory ready for rows to come; without the lock, in a thread of its own."""
        self.shard.tables.prepare()

    def _compared(self) -> Actions:
        """What the standby says, or its loss, may be what somebody who verifies waits for."""
        return [action for requests in self._requests.values() for action in requests.compared()]

    # ── what takes long ─────────────────────────────────────────────────────────────────────────

    def perform(self, task: Callable[[], Any], then: Callable[[Any], Actions], conn: Conn = 0) -> Perform:
        """As `RequestServer.perform`."""
        self._task += 1
        self._tasks[str(self._task)] = conn, then
        return Perform(task, str(self._task))

    def performed(self, tag: str, result: Any, now: float) -> Actions:
        """What was asked for is done; `result` is what came of it, or a HeadwaterError."""
        conn, then = self._tasks.pop(tag)
        try:
            return then(result)
        except HeadwaterError as error:
            return self.failed(conn, error, now)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def _answer_ask(self, conn: Conn, request: int) -> Actions:
        writes = self.index == 0 and self.role == "server"
        return self._questions.ask(conn, request, stays=conn in self._controls, sequencer=writes)

    def statistics(self, waits: dict[int, str]) -> m.ServerStatistics:
        """A snapshot. `waits`: by member, for what it waits."""
        shard = self.shard
        return m.ServerStatistics(
            member=self.id,
            role=self.role,
            index=self.index,
            version=shard.version,
            position=shard.position,
            term=self._roster.term,
            exchanges=shard.exchanges,
            models=tuple(vector.statistics() for vector in shard.vectors.values()),
            tables=tuple(table.statistics() for table in shard.tables),
            waits=waits,
            recorded=shard.positions.recorded(),
            enrolled=tuple(id for id, one in shard.standings.members.items() if one.rank >= 0),
            traffic=self.traffic(),
        )

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def _wake(self, at: float | None) -> None:
        if at is not None and (self.due is None or at < self.due):
            self.due = at

    def tick(self, now: float) -> Actions:
        """End waits that are over, say why others last, and try again what failed."""
        self.due = None
        actions: Actions = []
        for conn, early in list(self._early.items()):
            if now >= early.until:
                actions.append(self._give_up(conn, early))
        if self._fenced_until is not None and now >= self._fenced_until:
            self._fenced_until = None
            actions += self._note_serving(now)
        actions += self.log.tick(now) + self._standby.tick(now)
        if self._receiver is not None and self._receiver.restoring:
            actions.append(Send(self._receiver.conn, m.Acknowledged()))
        actions += self._questions.overdue(self._requests.values(), now)
        self._schedule(now)
        return actions

    def _give_up(self, conn: Conn, early: _Early) -> Close:
        """A connection has waited for too long: whoever is there tries again, or goes elsewhere."""
        why = "it did not say who is there" if early.hello is None else self._judge(early.hello).why
        del self._early[conn]
        return Close(conn, f"{why}, for {self._plan.patience:g} s")

    def _schedule(self, now: float) -> None:
        """When to look again."""
        for early in self._early.values():
            self._wake(early.until)
        for requests in self._requests.values():
            if requests.waiting:
                self._wake(requests.since + self._plan.patience)
        self._wake(self._fenced_until)
        self._wake(self.log.due)
        self._wake(self._standby.due)
        if self._receiver is not None and self._receiver.restoring:
            self._wake(now + self._plan.standby_limit / 4)
