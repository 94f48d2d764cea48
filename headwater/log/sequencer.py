"""The sequencer: decides the one order in which everything that changes shared state happens.

A state machine without I/O, clock or randomness: the time is an argument. Servers report which exchanges
they hold; what every server holds may become an entry; the entries that a call returns continue the log
and must reach every server in that order. What it decides depends only on its inputs and their order.

Invariants:
- An exchange becomes an entry only when every server holds it. It is decided once; what is written for it
  after its answer only answers it again, for a newer connection epoch that every server holds.
- Nothing is committed before the declared workers have joined, or while too few workers are present.
- The version grows by one with each entry that changes values (Committed, Assigned), never otherwise.
- A worker that waits does so for a reason `waits` can name; waits that wait for each other fail at once.
- With replicas an entry counts as committed when every server has prepared it, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.log.measures import Measures
from headwater.log.pending import PendingExchange, PendingExchanges, by_rank, tickets
from headwater.log.recovery import find
from headwater.log.state import LogState
from headwater.log.waits import Waits
from headwater.spec.sync import Sync


class Sequencer:
    """The log's writer for `servers` servers under one synchronisation mode.

    Args:
        min_workers: with fewer workers present no step is committed; one that left by itself counts as
            present until its rank is taken again, for it has done its part.
        replicated: entries are committed when all servers have prepared them, not when they are written.
        term: reports of an older one are refused.

    Attributes:
        standings: as of the last entry written.
        committed: position up to which entries may be applied.
        due: when `tick` should be called, in the time that `report` was told; None: not needed.
    """

    def __init__(
        self,
        servers: int,
        sync: Sync,
        *,
        min_workers: int = 1,
        replicated: bool = False,
        term: int = 0,
        standings: LogState | None = None,
    ) -> None:
        self.standings = standings or LogState()
        self.term = term
        self.due: float | None = None
        self._sync = sync
        self._min_workers = min_workers
        self._replicated = replicated
        self._committed = self.standings.position
        self._prepared = [0] * servers
        self._roster_term = 0
        self._now = 0.0
        self._seats = PendingExchanges(servers, self.standings)
        self._caught_up = 0
        self._ready: dict[int, PendingExchange] = {}
        self._blocked: dict[int, PendingExchange] = {}
        self._registering: dict[int, PendingExchange] = {}
        self._measures = Measures(servers)
        self._snapshots: dict[int, PendingExchange] = {}
        self._entries: list[m.AnyEntry] = []
        self._on_held: dict[str, Callable[[PendingExchange], None]] = {
            "register": self._register,
            "table": self._declare,
            "attach": self._serve,
            "step": self._step,
            "pull": self._serve,
            "state": self._serve,
            "assign": self._assign,
            "delete": self._assign,
            "barrier": self._meet,
            "sum": self._meet,
            "end": self._end,
            "stop": self._stop,
            "leave": lambda seat: self._remove(seat, "it left", seat.ticket),
            "checkpoint": self._checkpoint,
            "verify": self._serve,
        }

    @classmethod
    def recover(
        cls,
        sync: Sync,
        answers: Sequence[m.Recovery],
        roster: m.Roster,
        *,
        term: int,
        min_workers: int = 1,
        replicated: bool = True,
        now: float = 0.0,
    ) -> tuple[Sequencer, m.StartTerm, list[m.AnyEntry]]:
        """The sequencer of a new term, from one answer of every server.

        Returns it, what every server (and its standby) must be told before anything else, and the first
        entries that follow, from what all servers hold. `position` and `committed` are in force at once.

        Raises:
            ProtocolError: the answers are not one of each server in this term, or contradict each other.
        """
        found = find(answers, term)
        sequencer = cls(
            len(answers),
            sync,
            min_workers=min_workers,
            replicated=replicated,
            term=term,
            standings=found.standings,
        )
        sequencer._committed = found.committed
        agreed = m.StartTerm(term, sequencer.position)
        if sequencer.standings.started:
            sequencer._activate_new()
        entries = sequencer.roster(roster, now)
        for answer in answers:
            entries += sequencer.report(answer.server, answer.held, now, term=term)
        return sequencer, agreed, entries

    @property
    def version(self) -> int:
        """Of the last commit."""
        return self.standings.version

    @property
    def position(self) -> int:
        """Of the last entry; the first is 1."""
        return self.standings.position

    @property
    def committed(self) -> int:
        """Position up to which entries may be applied."""
        return self._committed if self._replicated else self.standings.position

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────

    def roster(self, roster: m.Roster, now: float = 0.0) -> list[m.AnyEntry]:
        """Take over a new roster: new members get a seat, missing ones are retired for good.

        One that has left may still be in it, when the coordinator has not heard of that yet.

        Raises:
            RefusedError: it is older than the last one.
        """
        if roster.term < self._roster_term:
            raise RefusedError(f"roster of term {roster.term} after that of term {self._roster_term}")
        self._roster_term, self._now = roster.term, max(self._now, now)
        members = {member.id: member for member in roster.members if member.role in ("worker", "observer")}
        for gone in [seat for id, seat in self._seats.of.items() if id not in members]:
            self._remove(gone, reason="its process ended or its connection was lost")
        if newcomers := self.standings.newcomers(members.values()):
            self._enrol(roster.workers, newcomers)
            for seat in self._seats.hear_early():
                self._decide(seat)
        return self._settle()

    def report(
        self,
        server: int,
        held: Iterable[m.Held],
        now: float = 0.0,
        *,
        term: int | None = None,
        prepared: int = 0,
        sums: Iterable[m.Sums] = (),
    ) -> list[m.AnyEntry]:
        """Note what `server` holds, has prepared and has measured; `now` in seconds.

        Of members that are not in the roster yet it counts once they are. Reports may come twice or late.

        Raises:
            RefusedError: the report is for the sequencer of an older `term`.
        """
        if term is not None and term < self.term:
            raise RefusedError(f"server {server} reports to the sequencer of term {term}, it is {self.term}")
        self._now = max(self._now, now)
        for seat in self._seats.hear(server, held):
            self._decide(seat)
        self._measures.add(server, sums)
        if prepared > self._prepared[server]:
            self._prepared[server] = prepared
            self._committed = max(self._committed, min(self._prepared))
        return self._settle()

    def tick(self, now: float) -> list[m.AnyEntry]:
        """Draw the consequences of time having passed; to be called when `due` has come."""
        self._now = max(self._now, now)
        return self._settle()

    # ── what becomes of an exchange that every server holds ─────────────────────────────────────

    def _decide(self, seat: PendingExchange) -> None:
        assert seat.held is not None
        if seat.held.number == seat.standing.answered:
            self._serve(seat)
        elif not seat.waiting:
            self._seats.wait(seat)
            self._on_held[seat.held.kind](seat)

    def _serve(self, seat: PendingExchange) -> None:
        assert seat.held is not None
        self._write(m.Served(self._next(), seat.ticket, seat.held.kind))
        self._done(seat)

    def _register(self, seat: PendingExchange) -> None:
        assert seat.held is not None
        name = seat.held.name
        if ("register", name) in self.standings.names:
            self._serve(seat)
        elif self.standings.may_supply(seat.standing):
            self._write(m.Registered(self._next(), seat.ticket, name))
            self._done(seat)
            for other in self._seats.workers():
                if other.waits_in("register") and other.held and other.held.name == name:
                    self._serve(other)
        else:
            self._registering[seat.member] = seat

    def _supply(self) -> None:
        """Let those register who are the lowest active rank by now."""
        for seat in by_rank(self._registering.values()):
            if seat.member in self._registering:
                self._register(seat)

    def _declare(self, seat: PendingExchange) -> None:
        """A table has no initial values, so whoever comes first declares it."""
        assert seat.held is not None
        if ("table", seat.held.name) in self.standings.names:
            self._serve(seat)
        else:
            self._write(m.Registered(self._next(), seat.ticket, seat.held.name, "table"))
            self._done(seat)

    def _step(self, seat: PendingExchange) -> None:
        assert seat.held is not None
        if seat.held.number == seat.standing.committed:
            self._blocked[seat.member] = seat  # of a sequencer that was lost before it answered it
            self._caught_up = -1
        elif seat.standing.phase != "active":
            self._resume(seat)
        elif self._sync.quorum is not None and seat.standing.round < self.standings.rounds:
            self._write(m.Late(self._next(), seat.ticket))
            self._done(seat)
        else:
            self._ready[seat.member] = seat
            self._commit_ready()

    def _resume(self, seat: PendingExchange) -> None:
        """A step of a worker that ended its batches makes it active again; in rounds only together
        with everybody, since who is in a round must not depend on timing."""
        if self.standings.started and not self._sync.rounds:
            self._activate([seat])
            self._step(seat)

    def _commit_ready(self) -> None:
        """Commit what may be: the round, if it is complete, or without rounds each update by itself."""
        if not self._ready or not self._enough():
            self.due = None
        elif self._sync.rounds:
            self._close_round(len(self._ready), len(self.standings.clocks))
        else:
            for seat in by_rank(self._ready.values()):
                self._close([seat])

    def _close_round(self, held: int, active: int) -> None:
        if held < self._sync.needed(active):
            self.due = None
            return
        if self.due is None:
            self.due = self._now + self._sync.grace_s
        if self._sync.may_commit(held, active, self._now >= self.due):
            self._close(by_rank(self._ready.values()))

    def _close(self, seats: list[PendingExchange]) -> None:
        """Commit these steps; where gradients are clipped, once it is known how large they are."""
        if not any(seat.held is not None and seat.held.clipped for seat in seats):
            self._commit(seats)
        elif not self._measures.under_way(seats):
            self._write(m.Measured(self._next(), tickets(seats)))
            self._measures.begin(seats, self.position)
        elif (norms := self._measures.norms(seats)) is not None:
            self._commit(seats, norms)

    def _enough(self) -> bool:
        """Whether enough workers are present to train."""
        return self._seats.present + len(self.standings.finished) >= self._min_workers

    def _commit(self, seats: list[PendingExchange], norms: tuple[tuple[int, float], ...] = ()) -> None:
        """Commit the steps of these seats, one alone where there are no rounds."""
        self.due = None
        clocks, updates = self.standings.clocks, tickets(seats)
        clock = seats[0].standing.clock
        may_read = self._sync.rounds or self._sync.may_read(clock + 1, clocks.slowest_after(clock))
        answered = updates if may_read else ()
        self._write(m.Committed(self._next(), self.version + 1, updates, answered, norms))
        for seat in seats:
            if answered:
                self._done(seat)
            else:
                self._ready.pop(seat.member, None)
                self._measures.forget(seat)
                self._blocked[seat.member] = seat
        self._take_snapshots()

    def _release_blocked(self) -> None:
        """Answer those whose lead the others have caught up with."""
        slowest = self.standings.clocks.slowest
        if slowest == self._caught_up:
            return
        self._caught_up = slowest
        for seat in list(self._blocked.values()):
            if self._sync.may_read(seat.standing.clock, slowest):
                self._serve(seat)

    def _assign(self, seat: PendingExchange) -> None:
        if self.standings.started:
            self._write(m.Assigned(self._next(), self.version + 1, seat.ticket))
            self._done(seat)
            self._take_snapshots()

    def _meet(self, seat: PendingExchange) -> None:
        if self.standings.started and seat.standing.phase != "meeting":
            assert seat.held is not None
            self._write(m.Retired(self._next(), seat.member, False, f"waits in a {seat.held.kind}"))

    def _end(self, seat: PendingExchange) -> None:
        self._write(m.Retired(self._next(), seat.member, False, "its batches are over", seat.ticket))
        self._done(seat)

    def _stop(self, seat: PendingExchange) -> None:
        told = tuple(other.member for other in self._seats.workers() if not other.standing.over)
        self._write(m.Stopped(self._next(), seat.ticket, told))
        self._done(seat)

    def _checkpoint(self, seat: PendingExchange) -> None:
        self._snapshots[seat.member] = seat
        self._take_snapshots()

    def _take_snapshots(self) -> None:
        """At the first version that each who asked for one waits for."""
        for seat in list(self._snapshots.values()):
            assert seat.held is not None
            if self.version >= int(seat.held.name or 0):
                self._write(m.Checkpointed(self._next(), seat.ticket))
                self._done(seat)

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def _enrol(self, workers: int, newcomers: list[m.Newcomer]) -> None:
        """Seat newcomers and activate them, all at once the first time: when the declared workers have
        joined."""
        started = self.standings.started
        self._write(m.Enrolled(self._next(), workers, tuple(newcomers)))
        for newcomer in newcomers:
            self._seats.add(newcomer.member, self.standings)
        if self.standings.started:
            self._activate_new()
            if not started:
                for seat in self._seats.workers():
                    if seat.waiting and seat.held is not None:
                        self._on_held[seat.held.kind](seat)

    def _activate_new(self) -> None:
        self._activate([seat for seat in self._seats.workers() if seat.standing.phase == "new"])

    def _activate(self, seats: list[PendingExchange]) -> None:
        if seats:
            members = tuple(seat.member for seat in seats)
            self._write(m.Activated(self._next(), members, self.standings.clocks.slowest))

    def _remove(self, seat: PendingExchange, reason: str, answered: m.ExchangeId | None = None) -> None:
        self._write(m.Retired(self._next(), seat.member, True, reason, answered))
        self._done(seat)
        self._seats.remove(seat)

    # ── what follows when somebody became inactive ──────────────────────────────────────────────

    def _settle(self) -> list[m.AnyEntry]:
        """Draw the consequences of the last input until there are none; return the new entries."""
        if self.standings.started:
            self._commit_ready()
            self._release_blocked()
            if self._registering:
                self._supply()
            if self._seats.all_wait() and not self.standings.clocks:
                self._release_meeting()
            if self._seats.all_wait() and self.due is None and not self._measures and self._enough():
                self._fail_stalled()
        entries, self._entries = self._entries, []
        return entries

    def _release_meeting(self) -> None:
        """All wait, nobody is active: end a barrier or sum that all are in, or let the rest resume.

        Clocks say who leads whom, so after a meeting all begin at 0.
        """
        workers = self._seats.workers()
        kinds = {seat.held.kind for seat in workers if seat.held is not None}
        if kinds == {"barrier"} or kinds == {"sum"}:
            self._write(m.Met(self._next(), tickets(workers)))
            for seat in workers:
                self._done(seat)
        elif resuming := [seat for seat in workers if seat.waits_in("step")]:
            self._activate(resuming)
            for seat in resuming:
                self._step(seat)

    def _fail_stalled(self) -> None:
        """Everybody waits and nothing followed: nothing ever will."""
        workers = self._seats.workers()
        reason = "everybody waits for each other: " + "; ".join(
            f"worker {seat.standing.rank} waits in {seat.what}" for seat in workers
        )
        self._write(m.Stalled(self._next(), tickets(workers), reason))
        for seat in workers:
            self._done(seat)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def waits(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom."""
        ready, blocked, measures = self._ready, self._blocked, self._measures
        return Waits(
            self._seats, self.standings, self._sync, self._min_workers, ready, blocked, measures
        ).all()

    # ── small things ────────────────────────────────────────────────────────────────────────────

    def _done(self, seat: PendingExchange) -> None:
        """Its exchange is over."""
        for waiting in (self._ready, self._blocked, self._registering, self._snapshots):
            waiting.pop(seat.member, None)
        self._measures.forget(seat)
        self._seats.release(seat)

    def _next(self) -> int:
        return self.standings.position + 1

    def _write(self, entry: m.AnyEntry) -> None:
        self.standings.apply(entry)
        self._entries.append(entry)
