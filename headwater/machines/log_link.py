"""Reports and entries between the servers and the sequencer: the servers' end of the log's connections.

Theory of operation. Each change of the servers begins a new *term* of the log, with a sequencer of its own
beside server 0. A term has two phases:

1. *Recovery.* Every server says where it is. The sequencer begins once all have: it finds what they have
   in common, tells every server which entries stand, and writes the first entries of its own. Reports that
   come earlier are kept. A server that knows a later term than the sequencer waits, for `patience`: the
   roster is on its way.
2. *The log goes on.* Servers report what they hold and have prepared; entries and the commit index go to
   every server in one order. A server whose connection is lost connects again, says where it is once more,
   and is sent what it lacks.

Server 0 takes part like any other server. Its link is not a connection but `BESIDE`, the other machine of
its node, so that its own shard and the sequencer have a lock each: a report never waits for a pass over
parameters.

Messages may be joined on their way: `joined` says how. Whoever sends does that while a connection is busy.
"""

from __future__ import annotations

from dataclasses import dataclass

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.actions import BESIDE, Actions, Close, Conn, Dial, Send
from headwater.machines.applier import LogApplier
from headwater.spec.sync import Mode

AGAIN_S = 0.02
"""Between two attempts of a server to connect to the sequencer."""


def joined(first: m.AnyMessage, second: m.AnyMessage) -> m.AnyMessage | None:
    """One message that says both, in their order; None where there is none."""
    if isinstance(first, m.Entries) and isinstance(second, m.Entries) and first.term == second.term:
        committed = max(first.committed, second.committed)
        return m.Entries(first.entries + second.entries, first.term, committed)
    if isinstance(first, m.Reports) and isinstance(second, m.Reports) and first.term == second.term:
        prepared = max(first.prepared, second.prepared)
        held, sums = first.held + second.held, first.sums + second.sums
        return m.Reports(first.server, held, first.term, prepared, sums)
    if isinstance(first, m.AppendAck) and isinstance(second, m.AppendAck) and first.term == second.term:
        return second
    return None


@dataclass(frozen=True, slots=True)
class Policy:
    """How a sequencer decides."""

    sync: Mode
    min_workers: int = 1
    replicated: bool = False


class ReportLink:
    """The end of server `index` of `servers`, whose shard `applier` takes through the log.

    Attributes:
        term: of the log that this server takes part in.
        due: when to connect to the sequencer again; None: not needed.
        conn: the connection to the sequencer; None where there is none.
    """

    def __init__(self, applier: LogApplier, index: int, servers: int) -> None:
        self.term = 0
        self.due: float | None = None
        self._applier = applier
        self._index, self._servers = index, servers
        self.conn: Conn | None = None
        self._first: m.Member | None = None
        self._told = 0
        self._lacks = "no roster with all servers has come yet"

    # ── terms ───────────────────────────────────────────────────────────────────────────────────

    def take_roster(self, roster: m.Roster) -> Actions:
        """Begin a new term where the servers have changed; a sequencer that is here is told who is there."""
        servers = sorted((one for one in roster.members if one.role == "server"), key=lambda one: one.index)
        begins = roster.since > self.term and len(servers) == self._servers
        actions: Actions = [Send(BESIDE, roster)] if self._index == 0 else []
        if not begins:
            return actions
        self.term = roster.since
        if self._index == 0:
            return actions + self._connected(BESIDE)
        former, self.conn = self.conn, None
        if former is not None:
            actions.append(Close(former, "another sequencer writes the log now"))
        self._first = servers[0]
        return [*actions, self._dial()]

    @property
    def dialled(self) -> str:
        """The tag of this term's connections."""
        return f"log {self.term}"

    def _dial(self) -> Dial:
        assert self._first is not None
        self.due = None
        return Dial(self._first, self.dialled)

    def _connected(self, conn: Conn) -> Actions:
        """From here on reports go over `conn`; where this server is by now comes first."""
        self.conn, self._lacks, self._told = conn, "", 0
        return [Send(conn, self._applier.recovery(self.term))]

    def opened(self, conn: Conn, dialled: str, hello: m.Hello) -> Actions:
        """A connection that this link asked for is there."""
        if dialled != self.dialled:
            return [Close(conn, "another sequencer writes the log now")]
        return [Send(conn, hello), *self._connected(conn)]

    def unreachable(self, dialled: str, why: str, now: float) -> None:
        """Server 0 cannot be reached: try again soon, for as long as this term lasts."""
        if dialled == self.dialled:
            self._lacks, self.due = why, now + AGAIN_S

    def closed(self, conn: Conn, now: float) -> None:
        """A connection has ended: where it was the one in use, make another."""
        if conn == self.conn:
            self.conn = None
            self._lacks, self.due = "it lost the connection to server 0", now + AGAIN_S

    def tick(self, now: float) -> Actions:
        """Connect again where that is due."""
        return [self._dial()] if self.due is not None and now >= self.due else []

    def explain(self) -> Actions:
        """Ask the sequencer for what members wait; nothing where it cannot be asked."""
        return [] if self.conn is None else [Send(self.conn, m.Explain())]

    @property
    def why(self) -> str:
        """Why a member has no answer yet, as far as this server knows."""
        whom = "server 0" if self._index else "the log"
        holds = f"server {self._index} has the request and waits for {whom}"
        return f"{holds}: {self._lacks}" if self._lacks else holds

    # ── reports and entries ─────────────────────────────────────────────────────────────────────

    def report(self, held: tuple[m.Held, ...] = ()) -> Actions:
        """Tell the sequencer what this server holds, and what it has prepared and measured since.

        What was done in another term means nothing to this one's sequencer. Without a connection nothing is
        said: a connection begins with all of it.
        """
        conn = self.conn
        if conn is None:
            return []
        progress = self._applier.progress()
        counts = progress.term == self.term
        prepared, measured = (progress.prepared, progress.measured) if counts else (0, ())
        if not held and not measured and prepared <= self._told:
            return []
        self._told = max(self._told, prepared)
        return [Send(conn, m.Reports(self._index, held, self.term, prepared, measured))]

    def take(self, message: m.AnyMessage) -> Actions:
        """What the sequencer says.

        Raises:
            ProtocolError: a sequencer does not say that.
        """
        if isinstance(message, m.Entries):
            self._applier.put(message)
            return []
        if isinstance(message, m.StartTerm):
            # A sequencer that is none any more may say this late, also the one beside this server.
            return [] if message.term < self.term else self._applier.agree(message)
        raise ProtocolError(f"the sequencer sent {type(message).__name__}")
