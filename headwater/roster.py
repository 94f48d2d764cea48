"""The roster: who is a member, and the term that each change of it gets.

A state machine without I/O. A node that starts again is a new member with the same index: the id
names the incarnation, and an id is never used twice.
"""

from __future__ import annotations

from headwater.errors import RefusedError
from headwater.messages import Join, Member, Role, Roster


class RosterBook:
    """Members of a cluster of `servers` servers that declared `workers` workers.

    Attributes:
        term: number of the last change.
    """

    def __init__(self, workers: int, servers: int) -> None:
        self.term = 0
        self._workers = workers
        self._servers = servers
        self._next = 1
        self._members: dict[int, Member] = {}

    def join(self, join: Join) -> Member:
        """Take a node in.

        Raises:
            RefusedError: its rank or index is taken, or there can be no such server.
        """
        index = self._index_for(join)
        member = Member(self._next, join.role, index, join.pid, join.host, join.addresses)
        self._next += 1
        self._members[member.id] = member
        self.term += 1
        return member

    def remove(self, id: int) -> Member | None:
        """Strike a member off; None when it is no member (any more)."""
        member = self._members.pop(id, None)
        if member is not None:
            self.term += 1
        return member

    def of(self, role: Role) -> tuple[Member, ...]:
        """The members of one role, by index."""
        return tuple(sorted((m for m in self._members.values() if m.role == role), key=lambda m: m.index))

    def complete(self) -> bool:
        """Whether all servers have joined."""
        return len(self.of("server")) == self._servers

    def view(self) -> Roster:
        """What every server is told."""
        return Roster(self.term, self._workers, tuple(self._members.values()))

    def _index_for(self, join: Join) -> int:
        if join.role == "observer":
            return -1
        taken = {member.index for member in self.of(join.role)}
        index = join.index
        if index is None:
            index = next(i for i in range(len(taken) + 1) if i not in taken)
        noun = "rank" if join.role == "worker" else "index"
        if index in taken:
            raise RefusedError(
                f"{join.role} {noun} {index} is taken by a living {join.role}: "
                f"leave it out to get the next free one"
            )
        if index < 0 or (join.role == "server" and index >= self._servers):
            raise RefusedError(f"there can be no {join.role} with {noun} {index}")
        return index
