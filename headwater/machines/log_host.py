"""The sequencer beside server 0, one for each term of the log, and its connections to the other servers.

Theory of operation: see `headwater.machines.log_link`, which is the servers' end. Of a term this end knows
the servers' recoveries, until the sequencer begins with them, and afterwards over which connection each
server is told what comes next. Whatever the sequencer returns goes to all servers at once, so all get one
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError
from headwater.log.sequencer import Sequencer
from headwater.machines.actions import BESIDE, Actions, Close, Conn, Note, Pause, Resume, Send
from headwater.machines.log_link import Policy

_TAIL = 1 << 14
"""Entries kept for a server whose connection is made anew; far more than there are exchanges under way."""


class _Term:
    """One term of the log, as its sequencer sees it."""

    def __init__(self, servers: int, policy: Policy, term: int) -> None:
        self.term = term
        self.sequencer: Sequencer | None = None
        self._servers = servers
        self._policy = policy
        self._agreed: m.StartTerm | None = None
        self._roster: m.Roster | None = None
        self._recoveries: dict[int, m.Recovery] = {}
        self._conns: dict[int, Conn] = {0: BESIDE}
        self._early: list[m.Reports] = []
        self._tail: deque[m.AnyEntry] = deque(maxlen=_TAIL)
        self._spread = 0

    # ── how it begins ───────────────────────────────────────────────────────────────────────────

    def recovered(self, recovery: m.Recovery, conn: Conn, now: float) -> Actions:
        """A server says where it is; once more after it connected anew.

        Raises:
            RefusedError: it is too far behind.
        """
        server = recovery.server
        former = self._conns.get(server, conn)
        self._conns[server] = conn
        self._recoveries[server] = recovery
        actions: Actions = [Close(former, f"server {server} has connected anew")] if former != conn else []
        if self.sequencer is not None:
            actions += self._lacking(recovery, conn, self.sequencer.position)
            # What it had before it was told where the log goes on may have been discarded since.
            agreed = recovery.agreed == self.term
            prepared, sums = (recovery.prepared, recovery.sums) if agreed else (0, ())
            told = m.Reports(server, recovery.held, self.term, prepared, sums)
            return actions + self._report(self.sequencer, told, now)
        if len(self._recoveries) == self._servers and self._roster is not None:
            actions += self._begin(self._roster, now)
        return actions

    def _lacking(self, recovery: m.Recovery, conn: Conn, position: int) -> Actions:
        """What a server that has connected anew must be told before anything else."""
        assert self._agreed is not None
        actions: Actions = []
        after = recovery.standings.position + len(recovery.closed)
        if recovery.agreed != self.term:
            after = self._agreed.position
            actions.append(Send(conn, self._agreed))
        missing = tuple(entry for entry in self._tail if entry.position > after)
        if len(missing) != position - after:
            raise RefusedError(f"server {recovery.server} is at {after}, too far behind")
        if missing or self._spread:
            actions.append(Send(conn, m.Entries(missing, self.term, self._spread)))
        return actions

    def _begin(self, roster: m.Roster, now: float) -> Actions:
        policy = self._policy
        self.sequencer, self._agreed, entries = Sequencer.recover(
            policy.sync,
            list(self._recoveries.values()),
            roster,
            term=self.term,
            min_workers=policy.min_workers,
            replicated=policy.replicated,
            now=now,
        )
        actions: Actions = [Send(conn, self._agreed) for conn in self._conns.values()]
        actions += self._extend(self.sequencer, entries)
        early, self._early = self._early, []
        for told in early:
            actions += self._report(self.sequencer, m.Reports(told.server, told.held, self.term), now)
        return actions

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────

    def roster(self, roster: m.Roster, now: float) -> Actions:
        """Take over a newer roster."""
        if self._roster is not None and roster.term <= self._roster.term:
            return []
        self._roster = roster
        if self.sequencer is not None:
            return self._extend(self.sequencer, self.sequencer.roster(roster, now))
        return self._begin(roster, now) if len(self._recoveries) == self._servers else []

    def report(self, told: m.Reports, now: float) -> Actions:
        """What a server holds, and what it has done of the log.

        What it did before the servers were told what stands means nothing: they say it again then.
        """
        if self.sequencer is None:
            self._early.append(told)
            return []
        return self._report(self.sequencer, told, now)

    def _report(self, sequencer: Sequencer, told: m.Reports, now: float) -> Actions:
        return self._extend(
            sequencer,
            sequencer.report(told.server, told.held, now, prepared=told.prepared, sums=told.sums),
        )

    def tick(self, now: float) -> Actions:
        """Draw the consequences of time."""
        sequencer = self.sequencer
        return [] if sequencer is None else self._extend(sequencer, sequencer.tick(now))

    def lost(self, conn: Conn) -> None:
        """A connection has ended; its server will say what it lacks."""
        for server, known in list(self._conns.items()):
            if known == conn:
                del self._conns[server]

    def conns(self) -> list[Conn]:
        """The connections of the other servers."""
        return [conn for conn in self._conns.values() if conn != BESIDE]

    def reasons(self) -> m.Reasons:
        """For what members wait."""
        if self.sequencer is not None:
            return m.Reasons(self.sequencer.waits(), "server 0 is processing it")
        missing = [str(index) for index in range(self._servers) if index not in self._recoveries]
        if not missing:
            return m.Reasons({}, "the log begins anew with the next roster")
        who = f"servers {', '.join(missing)} have" if len(missing) > 1 else f"server {missing[0]} has"
        return m.Reasons({}, f"the log begins anew when {who} said how far it is")

    # ── what leaves ─────────────────────────────────────────────────────────────────────────────

    def _extend(self, sequencer: Sequencer, entries: Sequence[m.AnyEntry]) -> Actions:
        """Send entries, and how far the log is committed, to all servers: server 0, which is here, last."""
        committed = sequencer.committed
        if not entries and committed == self._spread:
            return []
        self._spread = committed
        self._tail.extend(entries)
        message = m.Entries(tuple(entries), self.term, committed)
        return [Send(conn, message) for conn in (*self.conns(), BESIDE)]


class _Early(NamedTuple):
    """A server that knows a later term than the sequencer."""

    conn: Conn
    recovery: m.Recovery
    until: float


class SequencerMachine:
    """The sequencer beside server 0, one for each term, and its connections to the other servers.

    Args:
        patience: seconds for which a server of a later term may wait.

    Attributes:
        due: when `tick` should come; None for never.
    """

    def __init__(self, servers: int, policy: Policy, *, patience: float) -> None:
        self.due: float | None = None
        self._servers = servers
        self._policy = policy
        self._patience = patience
        self._indices: dict[Conn, int] = {BESIDE: 0}
        self._early: list[_Early] = []
        self._now: _Term | None = None

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """The connection of another server, whose index `dialled` is; it says first where it is."""
        assert dialled is not None
        self._indices[conn] = int(dialled)
        return []

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: object, now: float, *, request: int = 0
    ) -> Actions:
        """What a server says.

        Raises:
            ProtocolError: a server does not say that.
            RefusedError: it is of another term, or too far behind.
        """
        if conn not in self._indices:
            return []
        actions = self._take(conn, message, now)
        self._watch()
        return actions

    def _take(self, conn: Conn, message: m.AnyMessage, now: float) -> Actions:
        if isinstance(message, m.Reports | m.Recovery) and message.server != self._indices[conn]:
            raise ProtocolError(f"server {self._indices[conn]} speaks as server {message.server}")
        if isinstance(message, m.Reports):
            return self._report(message, now)
        if isinstance(message, m.Recovery):
            return self._recovered(conn, message, now)
        if conn == BESIDE and isinstance(message, m.Roster):
            return self._roster(message, now)
        if isinstance(message, m.Explain):
            return [Send(conn, self.reasons())]
        raise ProtocolError(f"server {self._indices[conn]} sent the sequencer {type(message).__name__}")

    def _report(self, told: m.Reports, now: float) -> Actions:
        term = self._now
        if term is None or told.term != term.term:
            known = 0 if term is None else term.term
            if told.term < known:
                return []  # it was on its way when the term ended; the recovery has all of it
            raise ProtocolError(f"server {told.server} reports in term {told.term}, it is {known}")
        return term.report(told, now)

    def _recovered(self, conn: Conn, recovery: m.Recovery, now: float) -> Actions:
        term = 0 if self._now is None else self._now.term
        if recovery.term > term:
            self._early.append(_Early(conn, recovery, now + self._patience))
            return [Pause(conn)]
        if recovery.term < term or self._now is None:
            raise RefusedError(f"server {recovery.server} is in term {recovery.term}, expected {term}")
        return self._now.recovered(recovery, conn, now)

    def _roster(self, roster: m.Roster, now: float) -> Actions:
        servers = [member for member in roster.members if member.role == "server"]
        actions: Actions = []
        former = self._now
        if len(servers) == self._servers and (former is None or roster.since > former.term):
            self._now = _Term(self._servers, self._policy, roster.since)
            for conn in () if former is None else former.conns():
                actions.append(Close(conn, "another term of the log has begun"))
        if self._now is None:
            return actions
        actions += self._now.roster(roster, now)
        early, self._early = self._early, []
        for one in early:
            actions += self._admit(one, now)
        return actions

    def _admit(self, early: _Early, now: float) -> Actions:
        """Take a recovery that came before the roster of its term did, if it has come now."""
        assert self._now is not None
        if early.recovery.term > self._now.term:
            self._early.append(early)
            return []
        try:
            return [*self._recovered(early.conn, early.recovery, now), Resume(early.conn)]
        except RefusedError as error:
            return [Close(early.conn, str(error))]

    def reasons(self) -> m.Reasons:
        """For what members wait."""
        return m.Reasons({}, "there is no roster yet") if self._now is None else self._now.reasons()

    def unreachable(
        self, dialled: str, why: str, now: float, *, nobody: bool = False, refused: bool = False
    ) -> Actions:
        """A sequencer connects to nobody."""
        raise AssertionError(dialled)

    def closed(self, conn: Conn, now: float) -> Actions:
        """A server's connection has ended: it will connect anew, and say what it lacks."""
        self._indices.pop(conn, None)
        self._early = [one for one in self._early if one.conn != conn]
        if self._now is not None:
            self._now.lost(conn)
        return []

    def tick(self, now: float) -> Actions:
        """Draw the consequences of time: the grace of a round is over, or a server waited for too long."""
        over = [one for one in self._early if now >= one.until]
        self._early = [one for one in self._early if now < one.until]
        actions: Actions = []
        for one in over:
            why = f"no roster of term {one.recovery.term} came here, in which server {one.recovery.server} is"
            actions += [Note(why, "warning"), Close(one.conn, why)]
        if self._now is not None:
            actions += self._now.tick(now)
        self._watch()
        return actions

    def _watch(self) -> None:
        due = None if self._now is None or self._now.sequencer is None else self._now.sequencer.due
        for one in self._early:
            due = one.until if due is None else min(due, one.until)
        self.due = due
