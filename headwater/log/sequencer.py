"""The sequencer: decides the one order in which everything that changes shared state happens.

A state machine without I/O, clock or randomness: the time is an argument. What it decides depends only on its
inputs and their order.

## Theory of operation

The sequencer knows three things: the *log's state*, which follows from the entries written so far and which
every shard has too; the *pending exchanges*, which servers have reported; and which *norms* the servers were
asked for. An input is a report of a server, a roster, or the time. Each passes through two phases:

1. *Decide.* An exchange that became complete with the input, because the last server holds it now, goes to
   the handler of its kind. The handler writes the entry that answers the exchange, or moves it to the stage
   that says what it waits for.
2. *Settle.* What has changed may let others go on. In this order: the mode is asked what becomes of the ready
   steps; withheld answers are given that the mode allows now; a registration goes on whose declaring worker
   is gone; a meeting or those who begin again go on when nobody is active. When every worker waits and none
   of this moved anybody, nothing ever will, unless a dead rank comes back: all are told so (`Stalled`).

Stages of an exchange (`log/pending.py`), with what moves it from one to the next:

    ARRIVING ── the last server holds it ──→ COMPLETE ── its answer's entry is written ──→ IDLE
    COMPLETE ──→ DECLARING   a registration, until the lowest active rank has declared the model
             ──→ MEETING     a barrier, sum, gather or broadcast, until all workers are at the same one
             ──→ SCHEDULED   a checkpoint or publication, when its version is reached (`snapshot_schedule.py`)
             ──→ WORKING     work on vectors, until it is measured or evaluated (`log/evaluations.py`)
             ──→ ASKING      a worker that computes portions, until there is one for it
             ──→ RESUMING    a step after its worker's last batch, until nobody is active      ──→ READY
             ──→ READY       a step, until `mode.next` commits it; a mode may also call it late  ──→ IDLE
    READY    ──→ COMMITTED   its update is in the log, until `mode.may_read` allows the answer  ──→ IDLE

They couple through the log's state alone. A commit advances clocks, which releases withheld answers, and
the version, which releases checkpoints. A worker that ends, meets, leaves or dies (`Retired`) is no longer
active, so a round needs one update less, the slowest clock may grow, and a meeting may have everybody. That
is why all of it is settled after every input, and in one place.

Gradients that are clipped, or merged by their lengths, must be measured first: the commit's steps are named
in a `Measured` entry, stay READY, and are committed when every server has said its part. If the mode
meanwhile chooses other steps, those are measured anew. So it is with a meeting whose work on vectors has
reductions: its workers stay in MEETING until every server has said its part.

An entry is applied to the log's state as it is written, so each decision sees all entries before it. A new
sequencer, after a server was lost, takes the log's state from the servers and the pending exchanges from what
they hold; it finds the stage of each by deciding it again.

## Invariants

- An exchange becomes an entry only when every server holds it. It is decided once; what is written for it
  after its answer only answers it again, for a newer connection epoch that every server holds.
- Nothing is committed before the declared workers have joined, or while too few workers are present.
- The version grows by one with each entry that changes values or vectors (Committed, Assigned, a Met whose
  work operates on them), never otherwise.
- A worker that waits does so for a reason `waits` can name; waits that wait for each other fail at once.
- With replicas an entry counts as committed when every server has prepared it, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.log import meetings
from headwater.log.committer import Committer
from headwater.log.evaluations import Evaluations
from headwater.log.pending import (
    COMPLETE,
    DECLARING,
    MEETING,
    READY,
    RESUMING,
    WORKING,
    PendingExchange,
    ids,
)
from headwater.log.recovery import find
from headwater.log.snapshot_schedule import SnapshotSchedule
from headwater.log.state import UNFINISHED, LogState
from headwater.log.waits import Waits
from headwater.log.writer import LogWriter
from headwater.spec.sync import Mode


class Sequencer:
    """The log's writer for `servers` servers under one mode.

    Args:
        min_workers: with fewer workers present no step is committed; one that left by itself counts as
            present until its rank is taken again, for it has done its part.
        replicated: entries are committed when all servers have prepared them, not when they are written.
        term: reports of an older one are refused.

    Attributes:
        standings: the log's state as of the last entry written.
    """

    def __init__(
        self,
        servers: int,
        sync: Mode,
        *,
        min_workers: int = 1,
        replicated: bool = False,
        term: int = 0,
        standings: LogState | None = None,
    ) -> None:
        self.standings = standings or LogState()
        self.term = term
        self._mode = sync
        self._min_workers = min_workers
        self._replicated = replicated
        self._committed = self.standings.position
        self._prepared = [0] * servers
        self._roster_term = 0
        self._deadlocked: dict[int, str] = {}  # members that wait for meetings outside of the log, and why
        self._now = 0.0
        self._writer = LogWriter(servers, self.standings)
        self._pending = self._writer.pending
        self._snapshots = SnapshotSchedule(self._writer)
        self._steps = Committer(self._writer, sync, enough=self._enough, committed=self._snapshots.take_ready)
        self._evaluations = Evaluations(self._writer)
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
            "gather": self._meet,
            "broadcast": self._meet,
            "operate": self._meet,
            "measure": self._meet,
            "work": self._on_vectors,
            "portion": self._portion,
            "recall": self._serve,
            "end": self._end,
            "stop": self._stop,
            "leave": self._leave,
            "checkpoint": self._snapshots.schedule,
            "verify": self._serve,
            "publish": self._snapshots.schedule,
            "taken": self._serve,
        }

    @classmethod
    def recover(
        cls,
        sync: Mode,
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
        """The number of the last commit."""
        return self.standings.version

    @property
    def position(self) -> int:
        """The number of the last entry; the first is 1."""
        return self.standings.position

    @property
    def committed(self) -> int:
        """Position up to which entries may be applied."""
        return self._committed if self._replicated else self.standings.position

    @property
    def due(self) -> float | None:
        """When `tick` should be called, in the time that `report` was told; None: not needed."""
        return self._steps.due

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────

    def roster(self, roster: m.Roster, now: float = 0.0) -> list[m.AnyEntry]:
        """Take over a new roster: new members take part, missing ones are retired for good.

        One that has left may still be in it, when the coordinator has not heard of that yet.

        Raises:
            RefusedError: it is older than the last one.
        """
        if roster.term < self._roster_term:
            raise RefusedError(f"roster of term {roster.term} after that of term {self._roster_term}")
        self._roster_term, self._now = roster.term, max(self._now, now)
        members = {member.id: member for member in roster.members if member.role in ("worker", "observer")}
        for gone in [exchange for id, exchange in self._pending.of.items() if id not in members]:
            self._remove(gone, reason="its process ended or its connection was lost")
        if newcomers := self.standings.newcomers(members.values()):
            self._enrol(roster.workers, newcomers)
            for exchange in self._pending.hear_early(self._now):
                self._decide(exchange)
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
        for exchange in self._pending.hear(server, held, self._now):
            self._decide(exchange)
        self._writer.measures.add(server, sums)
        if prepared > self._prepared[server]:
            self._prepared[server] = prepared
            self._committed = max(self._committed, min(self._prepared))
        return self._settle()

    def tick(self, now: float) -> list[m.AnyEntry]:
        """Draw the consequences of time having passed; to be called when `due` has come."""
        self._now = max(self._now, now)
        return self._settle()

    # ── decide: what becomes of an exchange that every server holds ─────────────────────────────

    def _decide(self, exchange: PendingExchange) -> None:
        """It became complete, for the first time or again in a newer connection epoch."""
        assert exchange.held is not None
        self._deadlocked.pop(exchange.member, None)
        if exchange.held.number == exchange.state.answered:
            self._serve(exchange)
        elif exchange.stage is COMPLETE:
            self._on_held[exchange.kind](exchange)

    def _serve(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        self._writer.write(m.Served(self._writer.next, exchange.id, exchange.held.kind))
        self._writer.done(exchange)

    def _register(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        name = exchange.held.name
        if ("register", name) in self.standings.names:
            self._serve(exchange)
        elif self.standings.may_supply(exchange.state):
            self._writer.write(m.Registered(self._writer.next, exchange.id, name))
            self._writer.done(exchange)
            for other in self._pending.at(DECLARING):
                if other.held is not None and other.held.name == name:
                    self._serve(other)
        elif exchange.stage is not DECLARING:
            self._pending.move(exchange, DECLARING)

    def _declare(self, exchange: PendingExchange) -> None:
        """A table has no initial values, so whoever comes first declares it."""
        assert exchange.held is not None
        if ("table", exchange.held.name) in self.standings.names:
            self._serve(exchange)
        else:
            self._writer.write(m.Registered(self._writer.next, exchange.id, exchange.held.name, "table"))
            self._writer.done(exchange)

    def _step(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        if not self.standings.started:
            return
        if exchange.held.number == exchange.state.committed:
            self._steps.recovered(exchange)
        elif exchange.state.phase != "active":
            self._resume(exchange)
        else:
            self._steps.admit(exchange)

    def _resume(self, exchange: PendingExchange) -> None:
        """A step of a worker that ended its batches makes it active again; in rounds only together
        with everybody, since who is in a round must not depend on timing."""
        if self._mode.rounds:
            self._pending.move(exchange, RESUMING)
        else:
            self._activate([exchange])
            self._step(exchange)

    def _assign(self, exchange: PendingExchange) -> None:
        if self.standings.started:
            self._writer.write(m.Assigned(self._writer.next, self.version + 1, exchange.id))
            self._writer.done(exchange)
            self._snapshots.take_ready()

    def _meet(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        assert exchange.held.meeting is not None
        if exchange.held.meeting.number <= self.standings.met:
            self._serve(exchange)  # it has ended, perhaps without this rank: its result is what everybody has
        elif self.standings.started:
            self._pending.move(exchange, MEETING)
            if exchange.state.phase != "meeting":
                reason = f"waits in {exchange.what}"
                self._writer.write(m.Retired(self._writer.next, exchange.member, False, reason))

    def _on_vectors(self, exchange: PendingExchange) -> None:
        if self.standings.started:
            self._evaluations.work(exchange)

    def _portion(self, exchange: PendingExchange) -> None:
        if self.standings.started:
            self._evaluations.ask(exchange)

    def _end(self, exchange: PendingExchange) -> None:
        self._writer.write(
            m.Retired(self._writer.next, exchange.member, False, "its batches are over", exchange.id)
        )
        if exchange.held is not None and exchange.held.name:
            self._deadlocked[exchange.member] = exchange.held.name
        self._writer.done(exchange)

    def _stop(self, exchange: PendingExchange) -> None:
        told = tuple(other.member for other in self._pending.workers() if not other.state.over)
        absent = tuple(rank for rank in self.standings.absent_ranks() if not self.standings.was_over(rank))
        self._writer.write(m.Stopped(self._writer.next, exchange.id, told, absent))
        self._writer.done(exchange)

    def _leave(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        finished = exchange.held.name != UNFINISHED
        self._remove(exchange, "it left" if finished else f"it left {UNFINISHED}", exchange.id, finished)

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def _enrol(self, workers: int, newcomers: list[m.Newcomer]) -> None:
        """Take newcomers in and activate them, all at once the first time: when the declared workers have
        joined. What was complete before then is decided then."""
        started = self.standings.started
        self._writer.write(m.Enrolled(self._writer.next, workers, tuple(newcomers)))
        for newcomer in newcomers:
            self._pending.add(newcomer.member)
        if self.standings.started:
            self._activate_new()
            if not started:
                for exchange in self._pending.at(COMPLETE):
                    self._on_held[exchange.kind](exchange)

    def _activate_new(self) -> None:
        self._activate([one for one in self._pending.workers() if one.state.phase == "new"])

    def _activate(self, exchanges: list[PendingExchange]) -> None:
        """Those of workers that take steps from now on."""
        if exchanges:
            members = tuple(exchange.member for exchange in exchanges)
            self._writer.write(m.Activated(self._writer.next, members, self.standings.clocks.slowest))

    def _remove(
        self,
        exchange: PendingExchange,
        reason: str,
        answered: m.ExchangeId | None = None,
        finished: bool = False,
    ) -> None:
        self._writer.write(m.Retired(self._writer.next, exchange.member, True, reason, answered, finished))
        self._writer.done(exchange)
        self._deadlocked.pop(exchange.member, None)
        self._pending.remove(exchange)

    # ── settle: what follows for those who wait ─────────────────────────────────────────────────

    def _settle(self) -> list[m.AnyEntry]:
        """Draw the consequences of the last input until there are none; return the new entries."""
        if self.standings.started:
            self._steps.commit_ready(self._now)
            self._steps.release()
            self._evaluations.settle()
            self._snapshots.take_ready()
            for exchange in self._pending.at(DECLARING):
                if exchange.stage is DECLARING:  # the one before it may have declared for it
                    self._register(exchange)
            if self._deadlocked and (meeting := self._pending.at(MEETING)):
                self._fail("; ".join(self._deadlocked.values()), meeting)
            if self._pending.all_wait() and not self.standings.clocks and self._enough():
                self._end_meeting()
            if self._pending.all_wait() and self.due is None and not self._writer.measures and self._enough():
                self._fail_stalled()
        self._snapshots.take_ready()  # a follower that has received its publication, or is gone, leaves room
        return self._writer.take()

    def _enough(self) -> bool:
        """Whether enough workers are present to train."""
        return self._pending.present + len(self.standings.finished) >= self._min_workers

    def _end_meeting(self) -> None:
        """All wait, nobody is active: end the meeting that all are in, or let the rest resume.

        Clocks say who leads whom, so after a meeting all begin at 0.
        """
        workers = self._pending.workers()
        verdict = meetings.judge(workers, self.standings)
        if verdict.ends:
            self._meet_all(workers, verdict.number)
        elif verdict.failure:
            self._fail(verdict.failure, workers)
        elif resuming := self._pending.at(RESUMING):
            self._activate(resuming)
            for exchange in resuming:
                self._pending.move(exchange, READY)
            self._steps.commit_ready(self._now)

    def _meet_all(self, workers: list[PendingExchange], number: int) -> None:
        """End a meeting, once the servers have said what its work on vectors comes to, if it has any."""
        totals: tuple[float, ...] | None = ()
        if any(exchange.held is not None and exchange.held.measured for exchange in workers):
            measures = self._writer.measures
            if not measures.under_way(workers, self.version):
                self._writer.write(m.Measured(self._writer.next, ids(workers)))
                measures.begin(workers, self.position, self.version)
            totals = measures.totals(workers)
        if totals is not None:
            version = self.version + 1 if workers[0].kind == "operate" else 0
            self._writer.write(m.Met(self._writer.next, ids(workers), number, version, totals))
            for exchange in workers:
                self._writer.done(exchange)
            self._snapshots.take_ready()

    def _fail_stalled(self) -> None:
        """Everybody waits and nothing followed: nothing will, unless a rank comes back that is needed."""
        workers = self._pending.workers()
        evaluates = any(exchange.held and exchange.held.plan for exchange in self._pending.at(WORKING))
        comes_back = evaluates and self.standings.absent_ranks()
        if not comes_back and not meetings.judge(workers, self.standings).absent:
            told = (f"worker {exchange.rank} waits in {exchange.what}" for exchange in workers)
            self._fail(f"everybody waits for each other: {'; '.join(told)}", workers)

    def _fail(self, reason: str, workers: list[PendingExchange]) -> None:
        """What these workers wait for can never come."""
        self._writer.write(m.Stalled(self._writer.next, ids(workers), reason))
        for exchange in workers:
            self._writer.done(exchange)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def waits(self) -> dict[int, str]:
        """For what and for whom each member waits that does, by its id."""
        return Waits(
            self._pending,
            self.standings,
            self._mode,
            self._min_workers,
            self._writer.measures,
            self._steps.reason,
        ).all()
