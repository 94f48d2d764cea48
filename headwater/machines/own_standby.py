"""The standby of one server: who it is, how it is reached, and what the coordinator is told of it.

Theory of operation. The roster names a standby, and the server begins with it once, however many rosters
follow: a newer one may arrive while the standby is still being dialled, and replicating to it twice would
give it two streams. Promoted from the one that lags, it would lack entries that it had acknowledged.

    none ──named by a roster──▶ dialled ──connected──▶ catching up ──has all──▶ caught up
                                   │                        │                       │
                                   └─not within `limit`──▶ lost ◀──connection ends, or silent for `limit`

A dial that fails is tried again, with growing pauses, for `limit` seconds. The coordinator is told once when
the standby has caught up, and once when it is lost; what it was told last it is told again when it comes back
after it was away. A lost standby stays the one that counts until the roster names it no more: then, and only
then, does what it lacked count as prepared.
"""

from __future__ import annotations

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.actions import Actions, Close, Conn, Dial, Note, Send, Tell
from headwater.machines.applier import LogApplier
from headwater.machines.memory import ServerMemory
from headwater.machines.standby_link import StandbyLink

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
"""Between two attempts to connect to a standby."""


class OwnStandby:
    """Of server `index`, whose shard `applier` takes through the log.

    Args:
        limit: seconds for which a standby may be unreachable, and for which it may owe an acknowledgement.

    Attributes:
        due: when `tick` should come; None for never.
        link: to the standby that is followed, connected or not any more; None before.
    """

    def __init__(self, applier: LogApplier, index: int, memory: ServerMemory, limit: float) -> None:
        self.due: float | None = None
        self.link: StandbyLink | None = None
        self._applier = applier
        self._index = index
        self._memory = memory
        self._limit = limit
        self._member: m.Member | None = None
        self._until = self._pause = 0.0
        self._dialling = False
        self._told: dict[int, m.CaughtUp | m.StandbyLost] = {}

    # ── who it is ───────────────────────────────────────────────────────────────────────────────

    def take_roster(self, roster: m.Roster, now: float) -> Actions:
        """Let go of a standby that is none any more, and begin with a new one."""
        living = {member.id for member in roster.members}
        self._told = {id: told for id, told in self._told.items() if id in living}
        named = next((x for x in roster.members if x.role == "standby" and x.index == self._index), None)
        known = self._member
        actions: Actions = []
        if known is not None and (named is None or named.id != known.id):
            actions += self._let_go()
        if named is not None and (known is None or named.id != known.id):
            self._member = named
            self._until, self._pause = now + self._limit, _FIRST_PAUSE_S
            actions.append(self._dial(named))
        return actions

    def _let_go(self) -> Actions:
        link, self.link = self.link, None
        self._member, self._dialling, self.due = None, False, None
        if link is None:
            return []
        self._applier.detach()
        if link.over:
            return []
        link.end()
        return [Close(link.conn, "the roster names this standby no more", at_once=True)]

    # ── how it is reached ───────────────────────────────────────────────────────────────────────

    def _dial(self, member: m.Member) -> Dial:
        self._dialling, self.due = True, None
        return Dial(member, f"standby {member.id}")

    def opened(self, conn: Conn, dialled: str, hello: m.Hello, now: float) -> Actions:
        """A connection that was asked for is there: follow from now on. Blocks while the shard is copied."""
        member = self._member
        if member is None or not self._dialling or dialled != f"standby {member.id}":
            return [Close(conn, "the roster names this standby no more")]
        self._dialling = False
        self.link = StandbyLink(member, conn, self._memory)
        self.due = now + self._limit
        actions: Actions = [Send(conn, hello), *self._applier.attach(self.link)]
        self.link.note_shipped(now)
        return actions

    def unreachable(self, dialled: str, why: str, now: float, *, refused: bool) -> Actions:
        """A dial failed: try again after a pause, while that can help and there is time."""
        member = self._member
        if member is None or not self._dialling or dialled != f"standby {member.id}":
            return []
        if refused or now + self._pause > self._until:
            return self._lost(f"cannot reach its standby: {why}")
        self.due = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        return [Note(f"server {self._index} tries to reach its standby again: {why}")]

    # ── what it says ────────────────────────────────────────────────────────────────────────────

    def received(self, message: m.AnyMessage, now: float) -> Actions:
        """The standby says something.

        Raises:
            ProtocolError: a standby does not say that.
        """
        link = self.link
        if link is None:
            return []
        link.heard()
        if isinstance(message, m.AppendAck):
            caught_up = self._applier.acknowledged(link, message)
            return self._tell(m.CaughtUp(link.member.id)) if caught_up else []
        if isinstance(message, m.Digested):
            link.digested(message)
        elif not isinstance(message, m.Acknowledged):
            raise ProtocolError(f"a standby sent {type(message).__name__}")
        return []

    def closed(self, conn: Conn) -> Actions:
        """A connection has ended."""
        link = self.link
        if link is None or link.conn != conn or link.over:
            return []
        link.end()
        return self._lost("lost the connection to its standby")

    def watch(self, now: float) -> None:
        """Something may have been sent: look later whether it was acknowledged."""
        link = self.link
        if link is None:
            return
        link.note_shipped(now)
        if self.due is None and link.awaits:
            self.due = now + self._limit

    def tick(self, now: float) -> Actions:
        """Dial again where that is due; give up a standby that owes something and is silent."""
        if self.due is None or now < self.due:
            return []
        self.due = None
        if self._dialling:
            assert self._member is not None
            return [self._dial(self._member)]
        link = self.link
        if link is None:
            return []
        if link.is_silent():
            link.end()
            why = f"its standby acknowledged nothing for {self._limit:g} s"
            return [Close(link.conn, why, at_once=True), *self._lost(why)]
        self.watch(now)
        return []

    # ── what the coordinator is told ────────────────────────────────────────────────────────────

    def _lost(self, why: str) -> Actions:
        assert self._member is not None
        self._dialling, self.due = False, None
        note = Note(f"server {self._index} has no standby: {why}", "warning")
        return [note, *self._tell(m.StandbyLost(self._member.id))]

    def _tell(self, news: m.CaughtUp | m.StandbyLost) -> Actions:
        self._told[news.standby] = news
        return [Tell(news)]

    def tell_again(self) -> Actions:
        """The coordinator is back: it may never have read what it was told last."""
        return [Tell(news) for news in self._told.values()]
