"""What starts the processes of a simulated cluster, and others in the places of those that have ended.

Either the coordinator says who is gone, as an engine hears it; or servers come by themselves and ask what
they are to be, and whoever ends before its work is done is started again, as under any scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.machines.enlistment import Enlistment, asks_again
from headwater.machines.roster import Departure
from headwater.testing.following import Following
from headwater.testing.processes.client import Program
from headwater.testing.processes.host import Host
from headwater.testing.processes.member import Member
from headwater.testing.processes.network import End, Process
from headwater.testing.processes.recruit import Recruit
from headwater.testing.processes.times import START_S

if TYPE_CHECKING:
    from headwater.testing.world import World


class Replacements:
    """Of `world`. `enlists`: servers come by themselves. `program`: of workers; None: nobody replaces them.

    Attributes:
        starting: processes that are being started.
    """

    def __init__(self, world: World, enlists: bool, program: Program | None) -> None:
        self.starting = 0
        self.enlists = enlists
        self._world = world
        self._program = program

    def start_hosts(self, servers: int, replicas: int, spares: int) -> None:
        """All that a cluster needs, and so many nodes more."""
        roles: tuple[m.ServerRole, ...] = ("server", "standby")
        for role in roles[: 1 + replicas]:
            for index in range(servers):
                if self.enlists:
                    self._recruit()
                else:
                    self._host(index, role)
        for _ in range(spares):
            self._recruit()

    def _host(self, index: int, role: m.Role) -> None:
        world = self._world
        host = Host(world.network, world, world.name(f"server {index}"), index, role)
        world.hosts.append(host)
        world.launch(host)

    def _recruit(self, enlistment: Enlistment | None = None) -> None:
        world = self._world
        world.launch(Recruit(world.network, self, world.name("node"), enlistment or Enlistment()))

    def _later(self, start: Callable[..., None], *arguments: Any) -> None:
        self.starting += 1
        agenda = self._world.agenda
        agenda.at(agenda.now + START_S, self._start, start, arguments)

    def _start(self, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.starting -= 1
        start(*arguments)

    def _join(self, rank: int) -> None:
        assert self._program is not None
        self._world.join(self._program, rank=rank)

    # ── who comes by itself ─────────────────────────────────────────────────────────────────────

    def note(self, text: str) -> None:
        """For the trace."""
        self._world.note(text)

    def enlisted(self, recruit: Recruit, assignment: m.Assignment, end: End) -> None:
        """A node knows what it is to be."""
        world, index, role = self._world, assignment.index, assignment.role
        name = world.name(f"server {index}")
        world.note(f"{recruit.name} is {name}: {role} {index}, from {assignment.restore or 'nothing'}")
        recruit.alive = False
        host = Host(world.network, world, name, index, role, assignment.restore, recruit.enlistment)
        world.hosts.append(host)
        end.give(host)
        host.start(end)

    def parted(self, host: Host, error: HeadwaterError) -> None:
        """A server has lost its place: it asks for another, where that is how it came."""
        if host.enlistment is not None and (isinstance(error, ConnectionLostError) or asks_again(error)):
            self._later(self._recruit, host.enlistment)

    def killed(self, process: Process) -> None:
        """A process that comes by itself has died."""
        if self.enlists and isinstance(process, Host):
            self._later(self._recruit)
        elif self.enlists and isinstance(process, Member):
            self.ended(process)

    def ended(self, member: Member) -> None:
        """A member's process has ended before its work was done."""
        if not self.enlists:
            return
        if member.role == "worker" and self._program is not None and member.wanted is not None:
            self._later(self._join, member.wanted)
        agenda = self._world.agenda
        for follower in self._world.followers:
            if follower.member is member:
                agenda.at(agenda.now + START_S, self._follow, follower)

    def _follow(self, follower: Following) -> None:
        self._world.join(follower.program, role="observer")

    def begin_anew(self) -> None:
        """Everything does: those who had finished have not, in what is now."""
        for rank in range(self._world.workers):
            mine = [one for one in self._world.members if one.role == "worker" and one.wanted == rank]
            if self._program is not None and mine and mine[-1].ended and mine[-1].leaves():
                self._later(self._join, rank)

    # ── where an engine starts them ─────────────────────────────────────────────────────────────

    def departed(self, departure: Departure) -> None:
        """A member ended without leaving."""
        member = departure.member
        if self.enlists:
            return  # whoever started the process sees that it ends
        if member.role == "worker" and self._program is not None:
            self._later(self._join, member.index)
        elif member.role in ("server", "standby"):
            agenda = self._world.agenda
            agenda.at(agenda.now + START_S, self._host, member.index, "standby")
