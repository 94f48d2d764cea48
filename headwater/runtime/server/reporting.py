"""A server's dealings with the sequencer: reports out, entries in; on server 0 the sequencer is here.

Every change of the servers is a new term of the log: each server says where it is, and goes on from where
the sequencer of that term says that the log goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError, RefusedError
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.link import ReportLink
from headwater.runtime.server.sequencing import Policy, Sequencing
from headwater.runtime.threads import ConnectionThreads
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater.server")

_PAUSE_S = 0.02


class Reporting:
    """For server `index` of `servers`. `fail` ends the node, which cannot follow the log any more; `dial`
    connects to another server."""

    def __init__(
        self,
        course: LogApplier,
        index: int,
        servers: int,
        policy: Policy,
        threads: ConnectionThreads,
        fail: Callable[[str], None],
        dial: Callable[[m.Member], Channel],
    ) -> None:
        self._course = course
        self._index, self._servers = index, servers
        self._policy = policy
        self._threads = threads
        self._fail = fail
        self._dial = dial
        self._link = ReportLink(index)
        self._sequencing: Sequencing | None = None
        self._term = 0
        self._begun = threading.Condition()
        self._ticking = threading.Event()
        self._closed = False

    def close(self) -> None:
        """Wake whoever waits; idempotent."""
        with self._begun:
            self._closed = True
            self._begun.notify_all()
        self._ticking.set()

    # ── terms ───────────────────────────────────────────────────────────────────────────────────

    def take_roster(self, roster: m.Roster) -> None:
        """Begin a new term where the servers have changed; on server 0 tell the sequencer who is there."""
        servers = [member for member in roster.members if member.role == "server"]
        if roster.since > self._term and len(servers) == self._servers:
            first = next(member for member in servers if member.index == 0)
            own = next(member for member in servers if member.index == self._index)
            self._begin(roster.since, first, own.id)
        if self._sequencing is not None:
            self._sequencing.roster(roster)
            self._spread()

    def _begin(self, term: int, first: m.Member, own: int) -> None:
        if self._index == 0:
            # Before the recovery: what is held after it is reported to this one, what before is part of it.
            self._sequencing = Sequencing(
                self._servers, self._policy, term, agree=self._course.agree, put=self._course.put
            )
            if not self._term:
                self._threads.start(self._tick, "tick")
        with self._begun:
            self._term = term
            self._begun.notify_all()
        if self._sequencing is not None:
            self._sequencing.recovered(self._course.begin_term(term))
            self._spread()
        else:
            self._threads.start(lambda: self._follow(term, first, own), "log")

    def serve_reports(self, channel: Channel, server: int) -> None:
        """On server 0: another server's connection; it says where it is, then what it holds."""
        received = channel.receive()
        recovery = received.message if received is not None else None
        if not isinstance(recovery, m.Recovery) or recovery.server != server:
            raise ProtocolError(f"server {server} sent {type(recovery).__name__}, expected Recovery")
        with self._begun:
            self._begun.wait_for(lambda: self._term >= recovery.term or self._closed)
        sequencing = self._sequencing
        if sequencing is None:
            raise ProtocolError(f"server {server} wants to report to server {self._index}")
        sequencing.recovered(recovery, channel)
        self._spread()
        while (received := channel.receive()) is not None:
            if not isinstance(received.message, m.Reports) or received.message.server != server:
                raise ProtocolError(f"server {server} sent {type(received.message).__name__}")
            sequencing.report(received.message)
            self._spread()

    def _follow(self, term: int, first: m.Member, own: int) -> None:
        """On the other servers: the log of one term, over as many connections as that takes."""
        while self._term == term and not self._closed:
            try:
                channel = self._threads.own(self._dial(first))
                channel.send(m.Hello(own, "server", term))
                with self._course.lock:
                    recovery = self._course.recovery(term)
                    self._link.reset(term)
                channel.send(recovery)
                self._link.connect(channel)
                self._take_entries(channel, term)
            except ConnectionLostError as error:
                _log.info("server %d lost the log: %s", self._index, error)
            except RefusedError as error:
                self._fail(f"it is not admitted to the log: {error}")
                return
            time.sleep(_PAUSE_S)

    def _take_entries(self, channel: Channel, term: int) -> None:
        while (received := channel.receive()) is not None:
            message = received.message
            if isinstance(message, m.StartTerm):
                self._course.agree(message)
            elif isinstance(message, m.Entries):
                self._course.put(message.term, message.entries, message.committed)
            else:
                raise ProtocolError(f"server 0 sent {type(message).__name__}")
            self.process()

    # ── reports and entries ─────────────────────────────────────────────────────────────────────

    def held(self, held: Iterable[m.Held]) -> None:
        """This server holds these: tell the sequencer, and do what follows."""
        if self._sequencing is not None:
            self._report_here(tuple(held))
            self._spread()
        else:
            self._link.put(held, self._course.progress())
            self._link.flush()

    def _report_here(self, held: tuple[m.Held, ...]) -> None:
        """On server 0; what it holds counts in any term, what it has prepared only in the sequencer's."""
        assert self._sequencing is not None
        sequencing, progress = self._sequencing, self._course.progress()
        if progress.term == sequencing.term:
            sequencing.report(m.Reports(0, held, progress.term, progress.prepared, progress.measured))
        else:
            sequencing.report(m.Reports(0, held, sequencing.term))

    def prepared(self) -> None:
        """What counts as prepared here may have grown: tell the sequencer, and do what follows."""
        self.held(())

    def _spread(self) -> None:
        assert self._sequencing is not None
        self._sequencing.flush()
        self.process()

    def process(self) -> None:
        """Process what has arrived of the log, and report what is prepared, until nothing more follows."""
        try:
            while self._course.process():
                if self._sequencing is None:
                    self._link.put((), self._course.progress())
                    self._link.flush()
                    return
                self._report_here(())
                self._sequencing.flush()
        except BaseException as error:
            if not isinstance(error, HeadwaterError) or not self._closed:
                _log.exception("server %d ends: it cannot process the log", self._index)
            self._fail(f"it cannot process the log: {error}")
            raise

    def _tick(self) -> None:
        """On server 0: tell the sequencer when the time has come that its mode waits for."""
        while not self._closed:
            assert self._sequencing is not None
            left = self._sequencing.tick()
            self._spread()
            self._ticking.wait(_PAUSE_S if left is None else min(max(left, 0.001), _PAUSE_S))

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def waits(self) -> dict[int, str]:
        """On server 0: for each member that waits, for what and for whom."""
        return self._sequencing.waits() if self._sequencing is not None else {}

    def reason(self, member: int) -> str:
        """Why a member has no answer yet."""
        if self._sequencing is None:
            return f"server {self._index} holds the exchange and waits for the log"
        missing = self._sequencing.missing()
        if missing:
            return f"the log begins anew when servers {', '.join(map(str, missing))} have said where they are"
        return self._sequencing.waits().get(member, "server 0 is at it")
