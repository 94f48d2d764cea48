"""Seats: the present members, what each has outstanding, and which servers hold that.

What the sequencer knows beyond the log: it is lost with it, and rebuilt from the servers' reports.

Invariants:
- An exchange is complete at a connection epoch when every server holds it as it came with that connection
  epoch; once it is
  complete at any, no report takes that back.
- A report of what was answered already, or that comes twice, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from headwater.log.state import LogState, MemberState
from headwater.messages import ExchangeId, Held


@dataclass(slots=True, eq=False)
class PendingExchange:
    """One member. `standing` is shared with the standings.

    Attributes:
        held: its outstanding exchange, as the first server reported it.
        holders: for each connection epoch the servers that hold it, as a bit mask.
        attempt: the newest one that is complete.
        waiting: the exchange is complete and has not been answered.
    """

    member: int
    standing: MemberState
    held: Held | None = None
    holders: dict[int, int] = field(default_factory=dict)
    connection_epoch: int = 0
    waiting: bool = False

    @property
    def ticket(self) -> ExchangeId:
        """Names the outstanding exchange."""
        assert self.held is not None
        return ExchangeId(self.member, self.held.number, self.connection_epoch)

    @property
    def what(self) -> str:
        """The outstanding exchange in words."""
        assert self.held is not None
        return f"{self.held.kind} {self.held.name}".rstrip()

    def waits_in(self, kind: str) -> bool:
        """Whether its complete exchange is of this kind."""
        return self.waiting and self.held is not None and self.held.kind == kind


class PendingExchanges:
    """All members present, for `servers` servers.

    Attributes:
        present: workers among them; waiting: those of them whose exchange is complete.
    """

    def __init__(self, servers: int, standings: LogState) -> None:
        self.servers = servers
        self.present = 0
        self.waiting = 0
        self.of: dict[int, PendingExchange] = {}
        self._everybody = (1 << servers) - 1
        self._standings = standings
        self._early: list[tuple[int, Held]] = []
        for member in standings.members:
            self.add(member, standings)

    def add(self, member: int, standings: LogState) -> PendingExchange:
        """Give a member of the standings a seat."""
        seat = self.of[member] = PendingExchange(member, standings.members[member])
        self.present += seat.standing.rank >= 0
        return seat

    def remove(self, seat: PendingExchange) -> None:
        """The member is gone."""
        self.release(seat)
        self.present -= seat.standing.rank >= 0
        del self.of[seat.member]

    def workers(self) -> list[PendingExchange]:
        """All but observers, in rank order."""
        return by_rank(seat for seat in self.of.values() if seat.standing.rank >= 0)

    def hear(self, server: int, held: Iterable[Held]) -> Iterator[PendingExchange]:
        """Note what `server` holds; yields each seat whose exchange became complete with that.

        A member without a seat is gone, or will be enrolled: what is held of the latter is kept until then.
        """
        for one in held:
            seat = self.of.get(one.member)
            if seat is None and one.member > self._standings.newest:
                self._early.append((server, one))
            elif seat is not None and self.hold(seat, server, one):
                yield seat

    def hear_early(self) -> Iterator[PendingExchange]:
        """Once more what was held of members who had no seat: servers may know of a newcomer before."""
        early, self._early = self._early, []
        for server, one in early:
            yield from self.hear(server, (one,))

    def hold(self, seat: PendingExchange, server: int, held: Held) -> bool:
        """Note that `server` holds this; whether it became complete, at its first or a newer connection
        epoch.
        """
        standing = seat.standing
        if (held.number, held.connection_epoch) <= (standing.answered, standing.connection_epoch):
            return False
        if seat.held is None or held.number > seat.held.number:
            if seat.waiting:
                return False
            seat.held, seat.holders = held, {}
        elif held.number < seat.held.number:
            return False
        before = seat.holders.get(held.connection_epoch, 0)
        after = seat.holders[held.connection_epoch] = before | 1 << server
        if before == after or after != self._everybody:
            return False
        seat.connection_epoch = (
            max(seat.connection_epoch, held.connection_epoch) if seat.waiting else held.connection_epoch
        )
        return True

    def wait(self, seat: PendingExchange) -> None:
        """Its exchange is complete and about to be decided."""
        seat.waiting = True
        self.waiting += seat.standing.rank >= 0

    def release(self, seat: PendingExchange) -> None:
        """Its exchange is answered; what is known of newer connection epochs, which need an answer too,
        stays.
        """
        self.waiting -= seat.waiting and seat.standing.rank >= 0
        seat.waiting = False
        if len(seat.holders) > 1:
            seat.holders = {
                connection_epoch: mask
                for connection_epoch, mask in seat.holders.items()
                if connection_epoch > seat.connection_epoch
            }
        else:
            seat.holders = {}
        if not seat.holders:
            seat.held = None

    def all_wait(self) -> bool:
        """Whether every worker waits, and there is one."""
        return self.waiting > 0 and self.waiting == self.present

    def missing(self, seat: PendingExchange) -> list[int]:
        """The servers that do not hold the outstanding exchange yet, at the epoch that most hold."""
        most = max(seat.holders.values(), key=int.bit_count, default=0)
        return [server for server in range(self.servers) if not most >> server & 1]


def by_rank(seats: Iterable[PendingExchange]) -> list[PendingExchange]:
    """In rank order."""
    return sorted(seats, key=lambda seat: seat.standing.rank)


def tickets(seats: Iterable[PendingExchange]) -> tuple[ExchangeId, ...]:
    """Of their outstanding exchanges."""
    return tuple(seat.ticket for seat in seats)
