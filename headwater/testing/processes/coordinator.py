"""The coordinator of a simulated cluster: roster and splits, spoken to over connections.

It does what `headwater.runtime.coordinator` does with its threads, and starts anew what ends, as engines
do. It
does not fail itself.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from headwater import messages as m
from headwater.errors import HeadwaterError, RefusedError
from headwater.machines.roster import Departure, RosterBook
from headwater.machines.splits import LeaseBook, Replies
from headwater.testing.processes.network import End, Frame, Network, Process
from headwater.testing.processes.times import ANSWER_S, DEADLINE_S, HEARTBEAT_S, PATIENCE_S

NAME = "coordinator"


class Surroundings(Protocol):
    """What the coordinator needs to know of the world."""

    mode: str
    workers: int

    def recorded(self) -> m.DataProgress:
        """Everybody's positions, as server 0 has them."""

    def departed(self, departure: Departure) -> None:
        """A member ended without leaving."""


class Coordinator(Process):
    """Takes members in, tells servers the roster, notices deaths.

    Attributes:
        book: the roster.
        lost: why training cannot go on, once a shard is lost with all its copies.
    """

    def __init__(self, network: Network, world: Surroundings, book: RosterBook) -> None:
        super().__init__(network, NAME)
        self.book = book
        self.lost = ""
        self._world = world
        self._leases: LeaseBook | None = None
        self._members: dict[int, End] = {}
        self._controls: dict[int, End] = {}
        self._behind: set[int] = set()
        self._joining: list[tuple[End, m.Join]] = []
        self._unanswered: dict[int, deque[int]] = {}
        self._welcomes: list[tuple[int, set[int], m.Member]] = []

    def accept(self, end: End) -> None:
        """A node wants to become a member, or a member to know where the servers are."""
        end.listen(lambda frame: self._first(end, frame.message), lambda: None)

    def _first(self, end: End, message: m.AnyMessage) -> None:
        if isinstance(message, m.Join):
            self._join(end, message)
        else:
            end.send(m.ServerAddresses(self.book.term, self.book.of("server")))

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _join(self, end: End, join: m.Join) -> None:
        self._joining.append((end, join))
        complete = self.book.complete()
        ready = [one for one in self._joining if complete or one[1].role == "server"]
        for one in ready:
            self._joining.remove(one)
            self._take_in(*one)
        if not complete and self.book.complete():
            for server in self.book.of("server"):
                self._welcome(server)
            self.publish()
            for one in self._joining:
                self._take_in(*one)
            self._joining.clear()

    def _take_in(self, end: End, join: m.Join) -> None:
        try:
            member = self.book.join(join, self.network.agenda.now)
        except RefusedError as error:
            end.send(m.Refused("RefusedError", str(error)))
            end.close()
            return
        self._members[member.id] = end
        end.listen(lambda frame: self._told(member, frame), lambda: self._strike_off(member, False))
        if join.role == "server":
            return  # all are welcomed together
        if join.role == "standby":
            self._welcome(member)
            self.publish()
        else:
            self.publish(member)

    def _welcome(self, member: m.Member) -> None:
        end = self._members.get(member.id)
        if end is None:
            return
        last = self._world.recorded().last if member.role == "worker" else ()
        end.send(
            m.Welcome(
                member,
                self.book.term,
                self.book.of("server"),
                self._world.workers,
                self._world.mode,
                b"",
                patience=PATIENCE_S,
                deadline=DEADLINE_S,
                heartbeat=HEARTBEAT_S,
                position=next((position for position in last if position.rank == member.index), None),
            )
        )

    def _told(self, member: m.Member, frame: Frame) -> None:
        message = frame.message
        self.book.heard(member.id, self.network.agenda.now)
        if isinstance(message, m.Departed):
            self._strike_off(member, True)
        elif member.id not in self._members:
            return
        elif isinstance(message, m.GetServers):
            self._members[member.id].send(m.ServerAddresses(self.book.term, self.book.of("server")))
        elif isinstance(message, m.Lease | m.Finish):
            self._lease(member, message)
        elif isinstance(message, m.CaughtUp):
            if self.book.caught_up(message.standby):
                self.publish()
        elif isinstance(message, m.StandbyLost):
            standby = self.book.member(message.standby)
            if standby is not None and standby.role == "standby":
                self._strike_off(standby, False)

    def _strike_off(self, member: m.Member, departed: bool) -> None:
        end = self._members.pop(member.id, None)
        departure = self.book.remove(member.id)
        if end is not None:
            if not departed and not end.closed:
                end.send(m.Refused("RefusedError", f"{member.role} {member.index} was declared dead"))
            end.close()
        if departure is None or self.lost:
            return
        if departure.loses_shard:
            self.lost = f"server {member.index} is gone, and nobody else has its shard"
            return
        self.publish()
        if not departed:
            self._world.departed(departure)
        if self._leases is not None:
            self._reply(self._leases.gone(member.id, self._world.recorded()))

    def watch_leases(self) -> None:
        """Declare dead who was not heard of for a lease, now and from time to time."""
        for member in self.book.expired(self.network.agenda.now):
            self._strike_off(member, False)
        if self._behind:
            self.publish()
        self.after(HEARTBEAT_S / 3, self.watch_leases, idle=True)

    # ── rosters ─────────────────────────────────────────────────────────────────────────────────

    def publish(self, newcomer: m.Member | None = None) -> None:
        """Tell every server and standby the roster; welcome a newcomer when those that answer have it."""
        if not self.book.complete():
            return
        roster = self.book.view()
        hosts = [member for member in roster.members if member.role in ("server", "standby")]
        for id in self._controls.keys() - {host.id for host in hosts}:
            self._controls.pop(id).close()
        self._behind.clear()
        waiting = {host.id for host in hosts if self._tell(host, roster)}
        if newcomer is not None:
            self._welcomes.append((roster.term, waiting, newcomer))
            self.after(ANSWER_S, self._give_up, waiting)
        self._settle_welcomes()

    def _tell(self, host: m.Member, roster: m.Roster) -> bool:
        end = self._controls.get(host.id)
        if end is None or end.closed:
            end = self.network.dial(self, host.addresses[0])
            if end is None:
                self._behind.add(host.id)
                return False
            self._controls[host.id] = end
            self._unanswered[host.id] = deque()
            end.listen(lambda frame: self._has_it(host.id), lambda: self._hung_up(host.id))
            end.send(m.Hello(0, "coordinator", 0))
        end.send(roster)
        self._unanswered[host.id].append(roster.term)
        return True

    def _has_it(self, host: int) -> None:
        self._acknowledged(host, self._unanswered[host].popleft())

    def _hung_up(self, host: int) -> None:
        if self.book.member(host) is not None:
            self._behind.add(host)
        self._acknowledged(host, self.book.term)

    def _give_up(self, waiting: set[int]) -> None:
        """A server that does not answer in time is left behind, not waited for."""
        for host in list(waiting):
            end = self._controls.pop(host, None)
            if end is not None:
                end.close()
            self._hung_up(host)

    def _acknowledged(self, host: int, term: int) -> None:
        for wanted, waiting, _ in self._welcomes:
            if term >= wanted:
                waiting.discard(host)
        self._settle_welcomes()

    def _settle_welcomes(self) -> None:
        for one in [one for one in self._welcomes if not one[1]]:
            self._welcomes.remove(one)
            self._welcome(one[2])

    # ── splits ──────────────────────────────────────────────────────────────────────────────────

    def _lease(self, member: m.Member, message: m.Lease | m.Finish) -> None:
        if self._leases is None:
            self._leases = LeaseBook(self._world.workers, self._world.recorded())
        try:
            if isinstance(message, m.Lease):
                self._reply(self._leases.lease(member.id, member.index, message))
            else:
                self._reply(self._leases.finish(member.id, message))
        except HeadwaterError as error:
            self._members[member.id].send(m.Refused(type(error).__name__, str(error)))

    def _reply(self, replies: Replies) -> None:
        for member, reply in replies:
            end = self._members.get(member)
            if end is not None and not end.closed:
                end.send(reply)
