"""The roster: who is a member, who takes over from whom, and the term that each change of it gets.

A state machine without I/O or clock: the time is an argument, in seconds. A node that starts again is a new
member with the same index: the id names the incarnation, and an id is never used twice. `record` is all of
it that outlives the process that keeps it; a book made of one goes on as the other would have.

Invariants:
- Of each index there is at most one server and one standby.
- A standby takes over only if it was caught up, which it stays until it is struck off.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from headwater.errors import DeclaredDeadError, RefusedError, RewoundError
from headwater.messages import Join, Member, Role, Roster

GONE = 1000
"""Members of which it is kept why they were struck off. Readers come and go for as long as training lasts."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A member that was struck off, and of a server the standby that took over, if there was one."""

    member: Member
    heir: Member | None = None

    @property
    def loses_shard(self) -> bool:
        """Whether nobody has the shard any more."""
        return self.member.role == "server" and self.heir is None


class RosterRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RosterBook as plain values. `next`: the next id; `gone`: why members of this generation were struck
    off without having left, by id; `finished`: ranks; `first`: the first generation."""

    term: int
    since: int
    generation: int
    next: int
    members: tuple[Member, ...]
    caught_up: tuple[int, ...]
    gone: dict[int, str]
    finished: tuple[int, ...] = ()
    first: int = 0


class RosterBook:
    """Members of a cluster of `servers` servers that declared `workers` workers.

    Args:
        lease_s: how long a member that is not heard of stays one.
        record: of a book to go on with, its generation too; everybody in it has a full lease from `now` on.
        cluster: its identity, which every roster carries.

    Attributes:
        term: number of the last change; since: that of the last change among servers.
        generation: counts the times that everything began anew from a checkpoint; first: where that began.
        changes: counts all changes of what `record` returns, those without a term too.
        reserved: ranks that only a worker gets which asks for them by number.
    """

    def __init__(
        self,
        workers: int,
        servers: int,
        *,
        lease_s: float = 15.0,
        generation: int = 0,
        record: RosterRecord | None = None,
        now: float = 0.0,
        cluster: str = "",
    ) -> None:
        record = record or RosterRecord(0, 0, generation, 1, (), (), {}, first=generation)
        self.term, self.since = record.term, record.since
        self.generation, self.first = record.generation, record.first
        self._workers = workers
        self._servers = servers
        self._lease_s = lease_s
        self._next = record.next
        self._members = {member.id: member for member in record.members}
        self._caught_up = set(record.caught_up)
        self._heard = dict.fromkeys(self._members, now)
        self._gone = dict(record.gone)
        self._finished = set(record.finished)
        self.changes = 0
        self.reserved: frozenset[int] = frozenset()
        self._cluster = cluster

    # ── changes ─────────────────────────────────────────────────────────────────────────────────

    def join(self, join: Join, now: float = 0.0) -> Member:
        """Take a node in; it counts as heard of at `now`, and infinity is before its lease begins.

        Raises:
            RefusedError: its rank or index is taken, or there can be no such server.
        """
        index = self._index_for(join)
        member = Member(self._next, join.role, index, join.pid, join.host, join.addresses, join.machine)
        self._next += 1
        self._members[member.id] = member
        self._heard[member.id] = now
        if join.role == "worker":
            self._finished.discard(index)
        self._change(servers=join.role == "server")
        return member

    def remove(self, id: int, why: str = "") -> Departure | None:
        """Strike a member off; None when it is no member (any more). A caught-up standby takes over.

        `why` is kept for a member that did not leave, of the last `GONE`: should it come back, it is told.
        """
        member = self._members.pop(id, None)
        if member is None:
            return None
        if why:
            self._gone[id] = why
            if len(self._gone) > GONE:
                del self._gone[next(iter(self._gone))]
        self._caught_up.discard(id)
        del self._heard[id]
        self._change(servers=member.role == "server")
        return Departure(member, self._promote(member.index) if member.role == "server" else None)

    def _promote(self, index: int) -> Member | None:
        for standby in self.of("standby"):
            if standby.index == index and standby.id in self._caught_up:
                self._caught_up.discard(standby.id)
                heir: Member = msgspec.structs.replace(standby, role="server")
                self._members[heir.id] = heir
                return heir
        return None

    def caught_up(self, id: int) -> bool:
        """Note that a standby has all that its server has; False when that is no news, or it is none."""
        member = self._members.get(id)
        if member is None or member.role != "standby" or id in self._caught_up:
            return False
        self._caught_up.add(id)
        self._change()
        return True

    def finish(self, id: int) -> None:
        """Note that a worker has done all that it was to do, whether it stays a member or not."""
        member = self._members.get(id)
        if member is not None and member.role == "worker" and member.index not in self._finished:
            self._finished.add(member.index)
            self.changes += 1

    def begin_anew(self) -> list[Member]:
        """Strike everybody off and begin the next generation; returns who there was."""
        gone = list(self._members.values())
        for kept in (self._members, self._heard, self._caught_up, self._gone, self._finished):
            kept.clear()
        self.generation += 1
        self._change(servers=True)
        return gone

    def _change(self, *, servers: bool = False) -> None:
        self.changes += 1
        self.term += 1
        if servers:
            self.since = self.term

    # ── leases ──────────────────────────────────────────────────────────────────────────────────

    def heard(self, id: int, now: float) -> None:
        """A member showed that it lives."""
        if id in self._heard:
            self._heard[id] = now

    def silence(self, id: int, now: float) -> float:
        """Seconds since a member was heard of; 0 before its lease begins."""
        return max(0.0, now - self._heard.get(id, now))

    def expired(self, now: float) -> list[Member]:
        """Members whose lease has ended."""
        return [self._members[id] for id, heard in self._heard.items() if now - heard > self._lease_s]

    def take_back(self, id: int, generation: int, now: float) -> Member:
        """A member connects again: it is heard of.

        Raises:
            RefusedError: it is no member any more; says why.
            RewoundError: everything began anew without it.
        """
        if generation != self.generation:
            raise RewoundError(
                f"training began anew from a checkpoint, as generation {self.generation}; "
                f"member {id} is of generation {generation}: join again"
            )
        if id not in self._members:
            kind = DeclaredDeadError if id in self._gone else RefusedError
            raise kind(
                f"member {id} is none any more: {self._gone.get(id, 'it has left')}; join again as a new one"
            )
        self._heard[id] = now
        return self._members[id]

    # ── views ───────────────────────────────────────────────────────────────────────────────────

    def of(self, role: Role) -> tuple[Member, ...]:
        """The members of one role, by index."""
        return tuple(sorted((m for m in self._members.values() if m.role == role), key=lambda m: m.index))

    def member(self, id: int) -> Member | None:
        """The member with this id; None when there is none."""
        return self._members.get(id)

    def complete(self) -> bool:
        """Whether there is a server of every index."""
        return not self.missing()

    def missing(self) -> list[int]:
        """Indices of which there is no server."""
        return sorted(set(range(self._servers)) - {server.index for server in self.of("server")})

    def finished(self) -> list[int]:
        """Ranks that have done all their work."""
        return sorted(self._finished)

    def all_finished(self) -> bool:
        """Whether every declared worker has done its work, and nobody else is at work."""
        if len(self._finished) < self._workers:
            return False
        return {*range(self._workers), *(worker.index for worker in self.of("worker"))} <= self._finished

    def unreplicated(self) -> list[int]:
        """Indices of servers that have no caught-up standby."""
        replicated = {self._members[id].index for id in self._caught_up}
        return [server.index for server in self.of("server") if server.index not in replicated]

    def record(self) -> RosterRecord:
        """What a book that goes on is made of."""
        return RosterRecord(
            self.term,
            self.since,
            self.generation,
            self._next,
            tuple(self._members.values()),
            tuple(sorted(self._caught_up)),
            dict(self._gone),
            tuple(sorted(self._finished)),
            self.first,
        )

    def view(self) -> Roster:
        """What every server is told."""
        members, caught_up = tuple(self._members.values()), tuple(sorted(self._caught_up))
        return Roster(
            self.term, self._workers, members, self.since, caught_up, self.generation, self._cluster
        )

    def _index_for(self, join: Join) -> int:
        if join.role == "observer":
            return -1
        taken = {member.index for member in self.of(join.role)}
        index = join.index
        if index is None:
            kept = taken | self.reserved if join.role == "worker" else taken
            index = next(i for i in range(len(kept) + 1) if i not in kept)
        noun = "rank" if join.role == "worker" else "index"
        if index in taken:
            holder = next(member for member in self.of(join.role) if member.index == index)
            raise RefusedError(
                f"{join.role} {noun} {index} is taken by a living {join.role} (pid {holder.pid} on "
                f"{holder.host}): end that one, or give no {noun} to get the next free one"
            )
        if index < 0 or (join.role in ("server", "standby") and index >= self._servers):
            raise RefusedError(f"there can be no {join.role} with {noun} {index}")
        return index
