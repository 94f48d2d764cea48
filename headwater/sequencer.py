"""The sequencer: decides the one order in which everything that changes shared state happens.

A state machine without I/O, time or randomness. Servers report which exchanges they hold; what every
server holds may become an entry; the entries that a call returns continue the log and must reach
every server in that order. What it decides depends only on the order of its inputs.

Invariants:
- An exchange becomes an entry only when every server holds it, and at most once.
- Nothing is committed before the declared workers have joined.
- The version grows by one with each entry that changes values (Committed, Assigned), never otherwise.
- A worker that waits does so for a reason `waits` can name; waits that wait for each other fail at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from headwater.clocks import Clocks
from headwater.messages import (
    Activated,
    AnyEntry,
    Assigned,
    Committed,
    Held,
    Member,
    Met,
    Registered,
    Retired,
    Roster,
    Served,
    Stalled,
    Stopped,
    Ticket,
)
from headwater.sync import Sync

Standing: TypeAlias = Literal["new", "active", "ended", "meeting", "observer"]
"""`new`: joined, not yet activated; `ended`: its batches are over; `meeting`: in a barrier or sum."""


@dataclass(slots=True, eq=False)
class _Seat:
    """What the sequencer knows of one member. `over`: its batches are, until it is active again."""

    member: Member
    standing: Standing = "new"
    over: bool = False
    clock: int = 0
    held: Held | None = None
    holders: set[int] = field(default_factory=set)
    waiting: bool = False

    @property
    def ticket(self) -> Ticket:
        assert self.held is not None
        return Ticket(self.member.id, self.held.number)


class Sequencer:
    """The log's writer for `servers` servers under one synchronisation mode.

    Attributes:
        version: of the last commit.
        position: of the last entry; the first is 1.
    """

    def __init__(self, servers: int, sync: Sync) -> None:
        self.version = 0
        self.position = 0
        self._servers = servers
        self._sync = sync
        self._seats: dict[int, _Seat] = {}
        self._left: set[int] = set()
        self._declared = 0
        self._ranks: set[int] = set()
        self._started = False
        self._present = 0
        self._waiting = 0
        self._clocks = Clocks()
        self._caught_up = 0
        self._ready: dict[int, _Seat] = {}
        self._blocked: dict[int, _Seat] = {}
        self._registering: dict[int, _Seat] = {}
        self._models: set[str] = set()
        self._tables: set[str] = set()
        self._entries: list[AnyEntry] = []
        self._on_held: dict[str, Callable[[_Seat], None]] = {
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
            "leave": self._leave,
        }

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────

    def roster(self, roster: Roster) -> list[AnyEntry]:
        """Take over a new roster: new members get a seat, missing ones are retired for good.

        One that has left may still be in it, when the coordinator has not heard of that yet.
        """
        self._declared = roster.workers
        members = {member.id: member for member in roster.members if member.role != "server"}
        for gone in [seat for id, seat in self._seats.items() if id not in members]:
            self._remove(gone, reason="its process ended or its connection was lost")
        self._left &= members.keys()
        for id, member in members.items():
            if id not in self._seats and id not in self._left:
                self._seats[id] = _Seat(member, "observer" if member.role == "observer" else "new")
                if member.role == "worker":
                    self._ranks.add(member.index)
                    self._present += 1
        self._start()
        return self._settle()

    def report(self, server: int, held: Iterable[Held]) -> list[AnyEntry]:
        """Note what `server` holds; a report of an unknown member is of one that is already gone."""
        for one in held:
            seat = self._seats.get(one.member)
            if seat is None:
                continue
            if seat.held is None:
                seat.held, seat.holders = one, set()
            assert seat.held.number == one.number, f"{one} while {seat.held} is outstanding"
            seat.holders.add(server)
            if len(seat.holders) == self._servers and not seat.waiting:
                seat.waiting = True
                self._waiting += seat.standing != "observer"
                self._on_held[one.kind](seat)
        return self._settle()

    # ── what becomes of an exchange that every server holds ─────────────────────────────────────

    def _serve(self, seat: _Seat) -> None:
        self._write(Served(self._next(), seat.ticket))
        self._done(seat)

    def _register(self, seat: _Seat) -> None:
        assert seat.held is not None
        name = seat.held.name
        if name in self._models:
            self._serve(seat)
        elif self._may_supply(seat):
            self._models.add(name)
            self._write(Registered(self._next(), seat.ticket))
            self._done(seat)
            for other in self._workers():
                if _waits_in(other, "register") and other.held and other.held.name == name:
                    self._serve(other)
        else:
            self._registering[seat.member.id] = seat

    def _declare(self, seat: _Seat) -> None:
        """A table has no initial values, so whoever comes first declares it."""
        assert seat.held is not None
        if seat.held.name in self._tables:
            self._serve(seat)
        else:
            self._tables.add(seat.held.name)
            self._write(Registered(self._next(), seat.ticket))
            self._done(seat)

    def _may_supply(self, seat: _Seat) -> bool:
        """The lowest active rank supplies initial values; before all have joined that is rank 0."""
        if not self._started:
            return seat.member.index == 0
        active = [other.member.index for other in self._workers() if other.standing == "active"]
        return seat.member.index <= min(active, default=seat.member.index)

    def _step(self, seat: _Seat) -> None:
        if seat.standing != "active":
            self._resume(seat)
        elif self._sync.rounds:
            self._ready[seat.member.id] = seat
            self._close_round()
        else:
            self._commit([seat])

    def _resume(self, seat: _Seat) -> None:
        """A step of a worker that ended its batches makes it active again; in rounds only together
        with everybody, since who is in a round must not depend on timing."""
        if self._started and not self._sync.rounds:
            self._activate([seat])
            self._commit([seat])

    def _close_round(self) -> None:
        if self._clocks and self._sync.may_commit(len(self._ready), len(self._clocks)):
            self._commit(_by_rank(self._ready.values()))

    def _commit(self, seats: list[_Seat]) -> None:
        self.version += 1
        for seat in seats:
            self._clocks.advance(seat.clock)
            seat.clock += 1
        may_read = [seat for seat in seats if self._sync.may_read(seat.clock, self._clocks.slowest)]
        self._write(Committed(self._next(), self.version, _tickets(seats), _tickets(may_read)))
        self._blocked.update((seat.member.id, seat) for seat in seats)
        for seat in may_read:
            self._done(seat)

    def _release_blocked(self) -> None:
        """Answer those whose lead the others have caught up with."""
        slowest = self._clocks.slowest
        if slowest == self._caught_up:
            return
        self._caught_up = slowest
        for seat in list(self._blocked.values()):
            if self._sync.may_read(seat.clock, slowest):
                self._serve(seat)

    def _assign(self, seat: _Seat) -> None:
        if self._started:
            self.version += 1
            self._write(Assigned(self._next(), self.version, seat.ticket))
            self._done(seat)

    def _meet(self, seat: _Seat) -> None:
        if self._started:
            assert seat.held is not None
            self._deactivate(seat, "meeting")
            self._write(Retired(self._next(), seat.member.id, False, f"waits in a {seat.held.kind}"))

    def _end(self, seat: _Seat) -> None:
        self._deactivate(seat, "ended")
        seat.over = True
        self._write(Retired(self._next(), seat.member.id, False, "its batches are over", seat.ticket))
        self._done(seat)

    def _stop(self, seat: _Seat) -> None:
        told = [other.member.id for other in self._workers() if not other.over]
        self._write(Stopped(self._next(), seat.ticket, tuple(told)))
        self._done(seat)

    def _leave(self, seat: _Seat) -> None:
        self._remove(seat, "it left", seat.ticket)

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        """Activate newcomers, all at once the first time: when the declared workers have joined."""
        first = not self._started
        if first:
            self._started = self._declared > 0 and self._ranks >= set(range(self._declared))
        if self._started:
            self._activate([seat for seat in self._workers() if seat.standing == "new"])
        if self._started and first:
            for seat in self._workers():
                if seat.waiting and seat.held is not None:
                    self._on_held[seat.held.kind](seat)

    def _activate(self, seats: list[_Seat]) -> None:
        if seats:
            self._count_in(seats, self._clocks.slowest)
            self._write(Activated(self._next(), tuple(seat.member.id for seat in seats)))

    def _count_in(self, seats: list[_Seat], clock: int) -> None:
        for seat in seats:
            seat.standing, seat.clock, seat.over = "active", clock, False
            self._clocks.add(clock)

    def _deactivate(self, seat: _Seat, standing: Standing) -> None:
        if seat.standing == "active":
            self._clocks.remove(seat.clock)
        seat.standing = standing

    def _remove(self, seat: _Seat, reason: str, answered: Ticket | None = None) -> None:
        if seat.standing != "observer":
            self._present -= 1
            self._deactivate(seat, "ended")
        self._write(Retired(self._next(), seat.member.id, True, reason, answered))
        self._done(seat)
        del self._seats[seat.member.id]
        self._left.add(seat.member.id)

    # ── what follows when somebody became inactive ──────────────────────────────────────────────

    def _settle(self) -> list[AnyEntry]:
        """Draw the consequences of the last input until there are none; return the new entries."""
        if self._started:
            if self._sync.rounds:
                self._close_round()
            self._release_blocked()
            for seat in _by_rank(self._registering.values()):
                if seat.member.id in self._registering:
                    self._register(seat)
            if self._all_wait() and not self._clocks:
                self._release_meeting()
            if self._all_wait():
                self._fail_stalled()
        entries, self._entries = self._entries, []
        return entries

    def _all_wait(self) -> bool:
        return self._waiting > 0 and self._waiting == self._present

    def _release_meeting(self) -> None:
        """All wait, nobody is active: end a barrier or sum that all are in, or let the rest resume.

        Clocks say who leads whom, so after a meeting all begin at 0.
        """
        workers = self._workers()
        kinds = {seat.held.kind for seat in workers if seat.held is not None}
        if kinds == {"barrier"} or kinds == {"sum"}:
            self._write(Met(self._next(), _tickets(workers)))
            for seat in workers:
                self._done(seat)
            self._count_in(workers, 0)
        elif resuming := [seat for seat in workers if _waits_in(seat, "step")]:
            self._activate(resuming)
            for seat in resuming:
                self._step(seat)

    def _fail_stalled(self) -> None:
        """Everybody waits and nothing followed: nothing ever will."""
        workers = self._workers()
        reason = "everybody waits for each other: " + "; ".join(
            f"worker {seat.member.index} waits in {_what(seat)}" for seat in workers
        )
        self._write(Stalled(self._next(), _tickets(workers), reason))
        for seat in workers:
            self._deactivate(seat, "ended")
            self._done(seat)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def waits(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom."""
        return {id: self._why(seat) for id, seat in self._seats.items() if seat.held is not None}

    def _why(self, seat: _Seat) -> str:
        what = _what(seat)
        if not seat.waiting:
            missing = sorted(set(range(self._servers)) - seat.holders)
            return f"{what} waits for {_list('server', missing)}"
        if not self._started and not (_waits_in(seat, "register") and 0 in self._ranks):
            missing = sorted(set(range(self._declared)) - self._ranks)
            return f"{what} waits for {_list('worker', missing)} to join"
        return f"{what} waits for {self._whom(seat)}"

    def _whom(self, seat: _Seat) -> str:
        others = [other for other in self._workers() if other is not seat]
        active = [other for other in others if other.standing == "active"]
        if _waits_in(seat, "register"):
            return f"{_named((active or others)[:1])} to declare the model"
        if seat.member.id in self._blocked:
            slowest = self._clocks.slowest
            reason = self._sync.may_read(seat.clock, slowest).reason
            return f"{_named([other for other in active if other.clock == slowest])}: {reason}"
        if seat.member.id in self._ready:
            return _named([other for other in active if other.member.id not in self._ready])
        return _named([other for other in others if not other.waiting])

    # ── small things ────────────────────────────────────────────────────────────────────────────

    def _workers(self) -> list[_Seat]:
        """In rank order."""
        return _by_rank(seat for seat in self._seats.values() if seat.standing != "observer")

    def _done(self, seat: _Seat) -> None:
        """Its exchange is over."""
        self._waiting -= seat.waiting and seat.standing != "observer"
        for waiting in (self._ready, self._blocked, self._registering):
            waiting.pop(seat.member.id, None)
        seat.held, seat.waiting = None, False

    def _next(self) -> int:
        self.position += 1
        return self.position

    def _write(self, entry: AnyEntry) -> None:
        self._entries.append(entry)


def _by_rank(seats: Iterable[_Seat]) -> list[_Seat]:
    return sorted(seats, key=lambda seat: seat.member.index)


def _waits_in(seat: _Seat, kind: str) -> bool:
    return seat.waiting and seat.held is not None and seat.held.kind == kind


def _what(seat: _Seat) -> str:
    assert seat.held is not None
    return f"{seat.held.kind} {seat.held.name}".rstrip()


def _tickets(seats: Iterable[_Seat]) -> tuple[Ticket, ...]:
    return tuple(seat.ticket for seat in seats)


def _named(workers: Iterable[_Seat]) -> str:
    return _list("worker", [seat.member.index for seat in workers])


def _list(noun: str, indices: list[int]) -> str:
    if not indices:
        return "nobody"
    return f"{noun}{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
