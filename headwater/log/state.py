"""Standings: everything about members that follows from the log alone.

The sequencer applies each entry as it writes it, every shard as it processes it, so a new sequencer can
begin with the standings of any shard. A state machine without I/O.

Invariants:
- Entries are applied strictly in order; two that applied the same entries are equal.
- What is kept is bounded by the members present, the ranks ever taken and the names ever registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from headwater import messages as m
from headwater.log.clocks import Clocks
from headwater.log.portions import Portions

UNFINISHED = "before its end"
"""Names the exchange of a worker that leaves without having done all that it was to do."""


@dataclass(slots=True, eq=False)
class MemberState:
    """One member; the fields are those of `MemberRecord`."""

    rank: int = -1
    phase: m.Phase = "new"
    over: bool = False
    clock: int = 0
    answered: int = 0
    connection_epoch: int = 0
    committed: int = 0
    round: int = 0
    stopping: bool = False
    receiving: bool = False
    fragments: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class RankState:
    """One rank, over all its incarnations; the fields are those of `RankRecord`."""

    incarnations: int = 0
    steps: int = 0
    over: bool = False


_of_member = attrgetter(*(field.name for field in fields(MemberState)))
_of_rank = attrgetter(*(field.name for field in fields(RankState)))
"""The fields of one as a tuple, in their order."""


class LogState:
    """Who is where as of one position of the log.

    Attributes:
        version, position: of the last entry that changed values; of the last entry.
        rounds: commits so far; fragments: those of each fragment, by model, where its rounds leave workers
            out.
        late: steps that came too late for their round so far.
        workers: how many the cluster declared; newest: the largest id ever enrolled.
        started: all declared workers have joined, so that something may be committed.
        members: the living ones, by id.
        clocks: of the active ones.
        ranks: that were ever taken.
        finished: ranks whose worker left by itself and that nobody has taken since.
        names: of what was registered, each with its kind.
        met: meetings that have ended; the next one has the number after it.
        histories: by rank, over all generations.
        stopping: ranks whose next worker is told to end its batches.
        portions: of the evaluation of now.
    """

    def __init__(self) -> None:
        self.version = self.position = self.rounds = self.late = 0
        self.workers = self.newest = 0
        self.started = False
        self.members: dict[int, MemberState] = {}
        self.clocks = Clocks()
        self.ranks: set[int] = set()
        self.finished: set[int] = set()
        self.names: set[tuple[m.Kind, str]] = set()
        self.met = 0
        self.histories: dict[int, RankState] = {}
        self.stopping: set[int] = set()
        self.portions = Portions()
        self.fragments: dict[int, int] = {}
        self._on_entry: dict[type, Callable[[Any], None]] = {
            m.Enrolled: self._enrolled,
            m.Registered: self._registered,
            m.Measured: lambda entry: None,
            m.Committed: self._committed,
            m.Served: self._served,
            m.Late: self._late,
            m.Assigned: self._assigned,
            m.Activated: self._activated,
            m.Retired: self._retired,
            m.Met: self._met,
            m.Operated: self._operated,
            m.Opened: self._opened,
            m.Counted: lambda entry: self.portions.add(entry.done),
            m.Handed: self._handed,
            m.Stopped: self._stopped,
            m.Stalled: self._stalled,
            m.Checkpointed: lambda entry: self._answered(entry.ticket),
            m.Published: self._published,
        }

    def missing_ranks(self) -> list[int]:
        """Declared ranks that nobody has taken yet."""
        return [rank for rank in range(self.workers) if rank not in self.ranks]

    def newcomers(self, members: Iterable[m.Member]) -> list[m.Newcomer]:
        """Those of a roster's workers and observers who were not enrolled yet, by id."""
        return [
            m.Newcomer(member.id, member.index if member.role == "worker" else -1)
            for member in sorted(members, key=lambda member: member.id)
            if member.id > self.newest
        ]

    def absent_ranks(self) -> list[int]:
        """Declared ranks that no worker has now and whose last one, if any, had not finished."""
        present = {member.rank for member in self.members.values()}
        return [rank for rank in range(self.workers) if rank not in present and rank not in self.finished]

    def was_over(self, rank: int) -> bool:
        """Whether the batches of the rank's last worker were over when it went."""
        return rank in self.histories and self.histories[rank].over

    def may_supply(self, standing: MemberState) -> bool:
        """The lowest active rank supplies initial values; before all have joined that is rank 0."""
        if not self.started:
            return standing.rank == 0
        active = [one.rank for one in self.members.values() if one.phase == "active"]
        return standing.rank <= min(active, default=standing.rank)

    def is_gone(self, member: int) -> bool:
        """Whether the member was enrolled and is no longer there."""
        return member <= self.newest and member not in self.members

    def receiving(self) -> list[int]:
        """Members whose publication is on its way: servers keep memory for each of them."""
        return [id for id, member in self.members.items() if member.receiving]

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def apply(self, entry: m.AnyEntry) -> None:
        """Take over the next entry of the log."""
        self.position = entry.position
        self._on_entry[type(entry)](entry)

    def standing(self, member: int) -> MemberState:
        """The member's; one that is not there yet gets one."""
        standing = self.members.get(member)
        if standing is None:
            standing = self.members[member] = MemberState()
        return standing

    def _answered(self, ticket: m.ExchangeId) -> None:
        standing = self.standing(ticket.member)
        standing.answered, standing.connection_epoch, standing.round = (
            ticket.number,
            ticket.connection_epoch,
            self.rounds,
        )
        standing.receiving = False
        if self.fragments:
            standing.fragments = dict(self.fragments)

    def _answered_step(self, ticket: m.ExchangeId, fragment: int = -1) -> None:
        """An outer step brings its fragment's values, any other those of all models that its worker reads."""
        standing = self.members.get(ticket.member) or self.standing(ticket.member)
        standing.answered, standing.connection_epoch, standing.round = (
            ticket.number,
            ticket.connection_epoch,
            self.rounds,
        )
        standing.stopping = False
        if fragment >= 0:
            # Never in place: records of this state have the mapping too.
            standing.fragments = {**standing.fragments, fragment: self.fragments.get(fragment, 0)}
        elif self.fragments:
            standing.fragments = dict(self.fragments)

    def _finished_step(self, ticket: m.ExchangeId) -> None:
        standing = self.members.get(ticket.member) or self.standing(ticket.member)
        if standing.phase == "active":
            self.clocks.advance(standing.clock)
        standing.clock += 1
        standing.committed = ticket.number
        self._history(standing.rank).steps += 1

    def _history(self, rank: int) -> RankState:
        history = self.histories.get(rank)
        if history is None:
            history = self.histories[rank] = RankState()
        return history

    def _enrolled(self, entry: m.Enrolled) -> None:
        self.workers = entry.workers
        for newcomer in entry.members:
            self.newest = max(self.newest, newcomer.member)
            phase: m.Phase = "observer" if newcomer.rank < 0 else "new"
            stopping = newcomer.rank in self.stopping
            self.members[newcomer.member] = MemberState(newcomer.rank, phase, stopping=stopping)
            if newcomer.rank >= 0:
                self.ranks.add(newcomer.rank)
                self.finished.discard(newcomer.rank)
                self.stopping.discard(newcomer.rank)
                self._history(newcomer.rank).incarnations += 1
        self.started = self.workers > 0 and not self.missing_ranks()

    def _registered(self, entry: m.Registered) -> None:
        self.names.add((entry.kind, entry.name))
        self._answered(entry.source)

    def _committed(self, entry: m.Committed) -> None:
        self.version = entry.version
        self.rounds += 1
        for ticket in entry.updates:
            self._finished_step(ticket)
        if entry.fragments:
            self._committed_fragments(entry)
            return
        for ticket in entry.answered:
            self._answered_step(ticket)

    def _committed_fragments(self, entry: m.Committed) -> None:
        for model in {one for one in entry.fragments if one >= 0}:
            self.fragments[model] = self.fragments.get(model, 0) + 1
        of = dict(zip(entry.updates, entry.fragments, strict=True))
        for ticket in entry.answered:
            self._answered_step(ticket, of[ticket])

    def _served(self, entry: m.Served) -> None:
        first = entry.ticket.number > self.standing(entry.ticket.member).answered
        if first and entry.kind == "step":
            self._answered_step(entry.ticket)
        else:
            self._answered(entry.ticket)
            self.standing(entry.ticket.member).receiving = entry.kind == "publish"

    def _published(self, entry: m.Published) -> None:
        for ticket in entry.tickets:
            self._answered(ticket)
            self.standing(ticket.member).receiving = True

    def _late(self, entry: m.Late) -> None:
        self.late += 1
        self._finished_step(entry.ticket)
        self._answered_step(entry.ticket, entry.fragment)

    def _assigned(self, entry: m.Assigned) -> None:
        self.version = entry.version
        self._answered(entry.source)

    def _activated(self, entry: m.Activated) -> None:
        for member in entry.members:
            self._count_in(self.standing(member), entry.clock)

    def _count_in(self, standing: MemberState, clock: int) -> None:
        standing.phase, standing.clock, standing.over, standing.round = "active", clock, False, self.rounds
        standing.fragments = dict(self.fragments)
        self.clocks.add(clock)

    def _count_out(self, standing: MemberState, phase: m.Phase) -> None:
        if standing.phase == "active":
            self.clocks.remove(standing.clock)
        if standing.phase != "observer":
            standing.phase = phase

    def _retired(self, entry: m.Retired) -> None:
        """For good, at the end of its batches, or because it waits in a barrier and goes on after it."""
        standing = self.standing(entry.member)
        if entry.gone:
            self._count_out(standing, "ended")
            if entry.finished and standing.rank >= 0:
                self.finished.add(standing.rank)
            if standing.rank >= 0:
                self._history(standing.rank).over = standing.over
            del self.members[entry.member]
            self.portions.gone(entry.member)
        elif entry.answered is not None:
            self._count_out(standing, "ended")
            standing.over = True
            self._answered_step(entry.answered)
        else:
            self._count_out(standing, "meeting")

    def _met(self, entry: m.Met) -> None:
        self.met = entry.number
        self.version = entry.version or self.version
        for ticket in entry.tickets:
            self._answered(ticket)
            self._count_in(self.standing(ticket.member), 0)

    def _operated(self, entry: m.Operated) -> None:
        self.version = entry.version
        self._answered(entry.source)

    def _opened(self, entry: m.Opened) -> None:
        self.version = entry.version
        self.portions.open((entry.source.member, entry.source.number), entry.plan, entry.model)

    def _handed(self, entry: m.Handed) -> None:
        if entry.portion is None:
            self.portions.release(entry.ticket.member)
        else:
            self.portions.hand(entry.ticket.member, entry.portion)
        self._answered(entry.ticket)

    def _stopped(self, entry: m.Stopped) -> None:
        for member in entry.members:
            self.standing(member).stopping = True
        self.stopping.update(entry.ranks)
        self._answered(entry.ticket)

    def _stalled(self, entry: m.Stalled) -> None:
        for ticket in entry.tickets:
            self._count_out(self.standing(ticket.member), "ended")
            self._answered(ticket)

    # ── as plain structs ────────────────────────────────────────────────────────────────────────

    def record(self) -> m.LogStateRecord:
        """All of it; `of` is the inverse."""
        return m.LogStateRecord(
            version=self.version,
            position=self.position,
            rounds=self.rounds,
            late=self.late,
            workers=self.workers,
            newest=self.newest,
            ranks=tuple(sorted(self.ranks)),
            finished=tuple(sorted(self.finished)),
            names=tuple(sorted(self.names)),
            members=tuple(m.MemberRecord(id, *_of_member(self.members[id])) for id in sorted(self.members)),
            met=self.met,
            histories=tuple(
                m.RankRecord(rank, *_of_rank(one)) for rank, one in sorted(self.histories.items())
            ),
            stopping=tuple(sorted(self.stopping)),
            portions=self.portions.record(),
            fragments=dict(self.fragments),
        )

    @classmethod
    def of(cls, record: m.LogStateRecord) -> LogState:
        """The standings that `record` was made of."""
        standings = cls()
        standings.version, standings.position = record.version, record.position
        standings.rounds, standings.late = record.rounds, record.late
        standings.workers, standings.newest = record.workers, record.newest
        standings.ranks, standings.finished = set(record.ranks), set(record.finished)
        standings.started = record.workers > 0 and not standings.missing_ranks()
        standings.names = set(record.names)
        standings.met, standings.stopping = record.met, set(record.stopping)
        standings.portions = Portions(record.portions)
        standings.fragments = dict(record.fragments)
        standings.histories = {
            one.rank: RankState(one.incarnations, one.steps, one.over) for one in record.histories
        }
        for member in record.members:
            id, *fields = (getattr(member, name) for name in member.__struct_fields__)
            standings.members[id] = MemberState(*fields)
            if member.phase == "active":
                standings.clocks.add(member.clock)
        return standings


def tickets_of(entry: m.AnyEntry) -> tuple[m.ExchangeId, ...]:
    """The exchanges that an entry names, each once."""
    if isinstance(entry, m.Committed):
        return entry.updates
    if isinstance(entry, m.Met | m.Stalled | m.Published):
        return entry.tickets
    if isinstance(entry, m.Registered | m.Assigned | m.Operated | m.Opened | m.Counted):
        return (entry.source,)
    if isinstance(entry, m.Served | m.Late | m.Handed | m.Stopped | m.Checkpointed):
        return (entry.ticket,)
    if isinstance(entry, m.Retired) and entry.answered is not None:
        return (entry.answered,)
    return ()
