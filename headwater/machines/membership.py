"""A node's membership in a cluster, as the node itself sees it: its dealings with the coordinator.

Theory of operation. A membership goes through these phases, and never back to an earlier one but from
`away`:

    outside ──join──▶ joining ──Welcome──▶ member ◀──Welcome── away
                         │                   │ └─connection ends──▶│
                         └───────────────────┴──────▶ over ◀──────-┘

- *joining*: the coordinator was dialled, or has been sent Join. It answers at once, or says whom it waits
  for (JoinWaits, with the patience and the deadline of the cluster). A join that has no answer for the
  deadline is given up. Before the coordinator has said anything the defaults of a cluster count.
- *member*: a heartbeat leaves three times in a lease. Where the node has connections to servers, it asks
  for their addresses instead, which is as good a heartbeat: a server that was stopped keeps its connections
  open, so nothing else would tell that it was replaced.
- *away*: the connection ended without a word. The node calls again, with growing pauses, and shows the key
  of its Welcome (Rejoin). Nothing can be asked meanwhile, what is told is lost, and all else goes on.
- *over*: the coordinator said why (Refused, Finished), or will never answer again. A coordinator without a
  journal is gone with its process: where nobody listens at its address any more, or where it was not heard
  of for the deadline.

Only the coordinator ends a membership, so every wait for another node that this node makes must look at
`over`.

Pauses between calls differ between members, so that they do not all call a restarted coordinator at one
moment. They follow from the member's id, as a machine draws no random numbers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from headwater import messages as m
from headwater.errors import (
    ConnectionLostError,
    FinishedError,
    HeadwaterError,
    ProtocolError,
    RefusedError,
    StalledError,
    named,
)
from headwater.machines.actions import Actions, Close, Conn, Dial, Note, Send, Tell

COORDINATOR = "coordinator"
"""Tag of every Dial of this machine."""

PATIENCE_S, DEADLINE_S = 10.0, 600.0
"""Of a join, until the coordinator has said what they are in its cluster."""

ANSWER_S = 2.0
"""How long a coordinator may take to answer Rejoin: a member is patient between calls, not in one."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
"""Between calls to a coordinator that is away."""

Phase: TypeAlias = Literal["outside", "joining", "member", "away", "over"]


class Joined(NamedTuple):
    """Event: the coordinator took this node in."""

    welcome: m.Welcome


class Returned(NamedTuple):
    """Event: the coordinator is back. What it was told before it went away it may never have read."""


class Heard(NamedTuple):
    """Event: the coordinator said something that is not about membership."""

    message: m.AnyMessage


class TraceAsked(NamedTuple):
    """Event: the coordinator wants to know what this node does, for a while, or no longer."""

    asked: m.RecordTrace


class Ended(NamedTuple):
    """Event: this node is no member any more, or never became one."""

    error: HeadwaterError


class Membership:
    """Of the node that makes this `join`, in the cluster whose coordinator listens at `coordinator`.

    Attributes:
        phase: as above.
        error: why it is over; None before.
        addresses: the last word on where the servers are.
        connection: counts the connections to the coordinator; what was sent over an older one may be lost.
        watching: ask where the servers are with every heartbeat.
        due: when `tick` should come.
    """

    def __init__(self, coordinator: str, join: m.Join) -> None:
        self.phase: Phase = "outside"
        self.error: HeadwaterError | None = None
        self.addresses: m.ServerAddresses | None = None
        self.connection = 0
        self.watching = False
        self.due: float | None = None
        self.conn: Conn | None = None
        self._coordinator = coordinator
        self._join = join
        self._welcome: m.Welcome | None = None
        self._patience, self._deadline = PATIENCE_S, DEADLINE_S
        self._reason = f"no word from the coordinator at {coordinator}"
        self._since = 0.0  # of joining, or of being away
        self._note_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._calls = 0

    @property
    def welcome(self) -> m.Welcome:
        """What the coordinator said when it took this node in."""
        assert self._welcome is not None, "not welcomed yet"
        return self._welcome

    @property
    def name(self) -> str:
        """Who this is, for logs."""
        member = self._welcome.member if self._welcome is not None else None
        role = self._join.role
        return role if member is None or member.index < 0 else f"{role} {member.index}"

    def away_s(self, now: float) -> float:
        """For how many seconds the coordinator has been away; 0.0 while it is there."""
        return now - self._since if self.phase == "away" else 0.0

    def beside(self, reason: str, now: float) -> str:
        """Why something waits, with the coordinator's absence, without which it might not."""
        if self.phase != "away":
            return reason
        seconds = self.away_s(now)
        return f"{reason or 'waits'}; the coordinator at {self._coordinator} is away for {seconds:.1f} s"

    @property
    def gives_up_at(self) -> float:
        """When a coordinator that is away has been so for the deadline."""
        return self._since + self.welcome.deadline

    # ── what the node asks for ──────────────────────────────────────────────────────────────────

    def join(self, now: float, *, dial: bool = True) -> Actions:
        """Ask to become a member. `dial` False: over a connection that the driver opens by itself."""
        assert self.phase == "outside"
        self.phase, self._since = "joining", now
        self._note_at = now + self._patience
        self.due = min(self._note_at, now + self._deadline)
        return [Dial(self._coordinator, COORDINATOR)] if dial else []

    def tell(self, message: m.AnyMessage) -> Actions:
        """Say something to the coordinator; lost where it is away or gone."""
        return [Send(self.conn, message)] if self.phase == "member" and self.conn is not None else []

    def leave(self) -> Actions:
        """End the connection without another word."""
        return self._end(ConnectionLostError("this node has left the cluster"))

    def give_up(self, error: HeadwaterError) -> Actions:
        """The node does not wait for the coordinator any longer."""
        return self._end(error)

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """A connection to the coordinator exists."""
        if self.phase == "joining" and self.conn is None:
            self.conn = conn
            return [Send(conn, self._join)]
        if self.phase == "away" and self.conn is None:
            self.conn = conn
            self.due = now + ANSWER_S
            welcome = self.welcome
            return [Send(conn, m.Rejoin(welcome.member.id, welcome.key, welcome.generation, welcome.cluster))]
        return [Close(conn)]

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """The coordinator said something."""
        if conn != self.conn:
            return []
        if isinstance(message, m.Refused):
            return self._end(named(message.error, message.reason, default=RefusedError))
        if isinstance(message, m.Finished):
            return self._end(FinishedError("training has finished"))
        if self.phase == "joining":
            return self._answered(message, now)
        if self.phase == "away":
            return self._answered_again(message, now)
        if isinstance(message, m.RecordTrace):
            return [Tell(TraceAsked(message))]
        if isinstance(message, m.ServerAddresses):
            self.addresses = message
            return []
        return [Tell(Heard(message))]

    def unreachable(
        self,
        dialled: str,
        why: str,
        now: float,
        *,
        error: HeadwaterError | None = None,
        nobody: bool = False,
        refused: bool = False,
    ) -> Actions:
        """The coordinator cannot be connected to. `error`: as the caller should see it, if that is known."""
        error = error or (RefusedError(why) if refused else ConnectionLostError(why))
        if self.phase == "joining":
            return self._end(error)
        return self._not_answered(error, now, nobody=nobody) if self.phase == "away" else []

    def closed(self, conn: Conn, now: float) -> Actions:
        """The connection to the coordinator has ended."""
        if conn != self.conn:
            return []
        self.conn = None
        lost = ConnectionLostError(f"the coordinator at {self._coordinator} closed the connection")
        if self.phase == "joining":
            return self._end(lost)
        if self.phase == "away":
            return self._not_answered(lost, now)
        self.phase, self._since = "away", now
        self._pause_s, self._calls = FIRST_PAUSE_S, 0
        self._call_later(now)
        return [Note(f"{self.name}: lost the coordinator", "info")]

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        if self.due is None or now < self.due:
            return []
        if self.phase == "joining":
            return self._wait_to_join(now)
        if self.phase == "member":
            self.due = now + self.welcome.heartbeat
            return self.tell(m.GetServers() if self.watching else m.Heartbeat())
        if self.conn is None:
            self.due = None  # until the driver has an answer
            self._calls += 1
            return [Dial(self._coordinator, COORDINATOR)]
        conn, self.conn = self.conn, None
        silent = ConnectionLostError(f"the coordinator did not answer within {ANSWER_S:g} s")
        return [Close(conn), *self._not_answered(silent, now)]

    # ── joining ─────────────────────────────────────────────────────────────────────────────────

    def _answered(self, message: m.AnyMessage, now: float) -> Actions:
        if isinstance(message, m.Welcome):
            self._welcome = message
            self.phase, self.due = "member", now + message.heartbeat
            return [Tell(Joined(message))]
        if isinstance(message, m.JoinWaits):
            self._reason = message.reason
            self._patience, self._deadline = message.patience, message.deadline
            self._note_at = min(self._note_at, self._since + self._patience)
            self.due = min(self._note_at, self._since + self._deadline)
            return []
        if isinstance(message, m.Waiting):
            self._reason = message.reason
            return []
        return self._end(ProtocolError(f"the coordinator answered {type(message).__name__}"))

    def _wait_to_join(self, now: float) -> Actions:
        until = self._since + self._deadline
        if now >= until:
            return self._end(StalledError(f"joining had no answer for {self._deadline:g} s: {self._reason}"))
        self._note_at = now + self._patience
        self.due = min(self._note_at, until)
        return [Note(f"{self.name}: cannot join yet: {self._reason}", "warning")]

    # ── while the coordinator is away ───────────────────────────────────────────────────────────

    def _answered_again(self, message: m.AnyMessage, now: float) -> Actions:
        if not isinstance(message, m.Welcome):
            conn, self.conn = self.conn, None
            assert conn is not None
            wrong = ConnectionLostError(f"the coordinator answered {type(message).__name__}")
            return [Close(conn), *self._not_answered(wrong, now)]
        seconds = self.away_s(now)
        self.phase, self.due = "member", now + self.welcome.heartbeat
        self.connection += 1
        return [
            Note(f"{self.name}: the coordinator is back after {seconds:.1f} s", "warning"),
            Tell(Returned()),
        ]

    def _not_answered(self, error: HeadwaterError, now: float, *, nobody: bool = False) -> Actions:
        cut_off = isinstance(error, ConnectionLostError) and not nobody
        patient = cut_off and self.away_s(now) <= self.welcome.deadline
        if not patient and not self.welcome.returns:
            return self._end(ConnectionLostError(f"the coordinator is gone: {error}"))
        first = self._pause_s == FIRST_PAUSE_S
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._call_later(now)
        return [Note(f"{self.name}: calls the coordinator: {error}", "warning")] if first else []

    def _call_later(self, now: float) -> None:
        spread = (self.welcome.member.id * 0.6180339887 + self._calls * 0.7548776662) % 1.0
        self.due = now + self._pause_s * (0.5 + 0.5 * spread)

    def _end(self, error: HeadwaterError) -> Actions:
        if self.phase == "over":
            return []
        conn, self.conn = self.conn, None
        self.phase, self.error, self.due = "over", error, None
        closing: Actions = [] if conn is None else [Close(conn)]
        return [*closing, Tell(Ended(error))]
