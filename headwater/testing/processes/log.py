"""A simulated server's dealings with the log: real sequencer, links and course, simulated connections.

It does what `headwater.runtime.server.reporting` does with its threads: reports out, entries in, and a new
term
of the log with every change of the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.link import ReportLink
from headwater.runtime.server.sequencing import Policy, Sequencing
from headwater.testing.processes.network import End, Frame, Process
from headwater.testing.processes.times import RETRY_S
from headwater.wire.channel import Channel


class LogSide:
    """Of server `index` of `servers`, which runs in `process`.

    `changed`: called when something was processed. `coalesce_s`: how long reports and entries are collected
    before they leave together.

    Attributes:
        term: of the log that this server takes part in.
        sequencing: the sequencer, where it is here.
    """

    def __init__(
        self,
        process: Process,
        course: LogApplier,
        index: int,
        servers: int,
        policy: Policy,
        coalesce_s: float,
        changed: Callable[[], None],
    ) -> None:
        self.term = 0
        self.sequencing: Sequencing | None = None
        self._process = process
        self._course = course
        self._index, self._servers = index, servers
        self._policy = policy
        self._coalesce_s = coalesce_s
        self._changed = changed
        self._link = ReportLink(index)
        self._early: list[tuple[End, int, m.Recovery]] = []
        self._flushing = False
        self._due: float | None = None

    # ── terms ───────────────────────────────────────────────────────────────────────────────────

    def take_roster(self, roster: m.Roster) -> None:
        """Begin a new term where the servers have changed; on server 0 tell the sequencer who is there."""
        servers = [member for member in roster.members if member.role == "server"]
        if roster.since > self.term and len(servers) == self._servers:
            first = next(member for member in servers if member.index == 0)
            own = next(member for member in servers if member.index == self._index)
            self._begin(roster.since, first, own.id)
        if self.sequencing is not None:
            self.sequencing.roster(roster)
            self._flush()

    def _begin(self, term: int, first: m.Member, own: int) -> None:
        if self._index == 0:
            self.sequencing = Sequencing(
                self._servers,
                self._policy,
                term,
                agree=self._course.agree,
                put=self._course.put,
                clock=lambda: self._process.network.agenda.now,
            )
        self.term = term
        early, self._early = self._early, []
        if self.sequencing is not None:
            self.sequencing.recovered(self._course.begin_term(term))
            self._flush()
            for end, server, recovery in early:
                self._recovered(end, server, recovery)
        else:
            self._follow(term, first.addresses[0], own)

    def _follow(self, term: int, address: str, own: int) -> None:
        """On the other servers: the log of one term, over as many connections as that takes."""
        if self.term != term:
            return
        end = self._process.network.dial(self._process, address)
        if end is None:
            self._process.after(RETRY_S, self._follow, term, address, own)
            return
        end.listen(self._entries, lambda: self._process.after(RETRY_S, self._follow, term, address, own))
        end.send(m.Hello(own, "server", term))
        recovery = self._course.begin_term(term)
        self._link.reset(term)
        end.send(recovery)
        self._link.connect(cast(Channel, end))

    def _entries(self, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, m.StartTerm):
            self._course.agree(message)
        elif isinstance(message, m.Entries):
            self._course.put(message.term, message.entries, message.committed)
        else:
            raise ProtocolError(f"server 0 sent {type(message).__name__}")
        self.process()

    # ── on server 0: other servers' connections ─────────────────────────────────────────────────

    def serve_reports(self, end: End, server: int) -> None:
        """Another server's: it says where it is, then what it holds."""
        end.listen(lambda frame: self._recovery(end, server, frame.message), lambda: None)

    def _recovery(self, end: End, server: int, message: m.AnyMessage) -> None:
        assert isinstance(message, m.Recovery), message
        if message.term > self.term:
            end.wait()
            self._early.append((end, server, message))
        else:
            self._recovered(end, server, message)

    def _recovered(self, end: End, server: int, recovery: m.Recovery) -> None:
        sequencing = self.sequencing
        if sequencing is None or recovery.term != self.term:
            end.close()
            return
        end.listen(lambda frame: self._report(sequencing, end, server, frame.message), lambda: None)
        sequencing.recovered(recovery, cast(Channel, end))
        self._flush()

    def _report(self, sequencing: Sequencing, end: End, server: int, message: m.AnyMessage) -> None:
        """To the sequencer of the connection's term, also where that was deposed."""
        assert isinstance(message, m.Reports), message
        try:
            sequencing.report(message)
        except RefusedError:
            end.close()
        sequencing.flush()
        self._flush()

    # ── reports and entries ─────────────────────────────────────────────────────────────────────

    def held(self, held: Iterable[m.Held]) -> None:
        """This server holds these: tell the sequencer, and do what follows."""
        if self.sequencing is not None:
            self._report_here(tuple(held))
        else:
            self._link.put(held, self._course.progress())
        self._flush()

    def _report_here(self, held: tuple[m.Held, ...]) -> None:
        """On server 0; what it holds counts in any term, what it has prepared only in the sequencer's."""
        assert self.sequencing is not None
        sequencing, progress = self.sequencing, self._course.progress()
        if progress.term == sequencing.term:
            sequencing.report(m.Reports(0, held, progress.term, progress.prepared, progress.measured))
        else:
            sequencing.report(m.Reports(0, held, sequencing.term))

    def _flush(self) -> None:
        """Let what is pending leave, at once or together with what comes soon."""
        if not self._coalesce_s:
            self._leave()
        elif not self._flushing:
            self._flushing = True
            self._process.after(self._coalesce_s, self._leave)

    def _leave(self) -> None:
        self._flushing = False
        if self.sequencing is not None:
            self.sequencing.flush()
        else:
            self._link.flush()
        self.process()
        self._watch_grace()

    def process(self) -> None:
        """Process what has arrived of the log, and report what is prepared, until nothing more follows."""
        while self._course.process():
            if self.sequencing is None:
                self._link.put((), self._course.progress())
                self._link.flush()
                break
            self._report_here(())
            self.sequencing.flush()
        self._changed()

    def _watch_grace(self) -> None:
        """On server 0: look again when the grace of a round is over."""
        left = self.sequencing.tick() if self.sequencing is not None else None
        due = None if left is None else self._process.network.agenda.now + left
        if due is not None and due != self._due:
            self._process.after(left or 0.0, self._leave)
        self._due = due

    def waits(self) -> dict[int, str]:
        """On server 0: for each member that waits, for what and for whom."""
        return self.sequencing.waits() if self.sequencing is not None else {}
