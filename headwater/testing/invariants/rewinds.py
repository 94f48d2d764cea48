"""What must hold where servers come by themselves, and of checkpoints and what begins anew from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.machines.coordinator.phases import Spare
from headwater.testing.invariants.invariant import Invariant

if TYPE_CHECKING:
    from headwater.testing.processes.host import Host
    from headwater.testing.processes.member import Member


class NewestCheckpoint(Invariant):
    """Who had a checkpoint written has all it had seen in it; everything begins anew from the newest, as one.

    What is in the checkpoint that a generation begins with, and what follows, others check as of any log.
    """

    def took_checkpoint(self, member: Member, path: str) -> None:
        """It is complete, and not of before."""
        assert self.world.disk is not None
        written = self.world.disk.complete.get(path)
        if written is None:
            self.fail(f"{member.name} is told of {path}, which is not complete")
        elif (written.generation, written.version) < (member.timeline.generation, member.version):
            self.fail(f"{member.name} has seen version {member.version}, and is told of {path}")

    def begins(self, host: Host) -> None:
        """All servers of a generation with one checkpoint, and none was newer when that became necessary."""
        world, timeline = self.world, host.timeline
        if host.restore != timeline.begins:
            self.fail(
                f"{host.name} begins with {host.restore or 'nothing'}, another server of generation "
                f"{timeline.generation} with {timeline.begins or 'nothing'}"
            )
        newest = world.generations.rewound[timeline.generation - 1] if timeline.generation else ""
        if newest and (world.disk is None or not host.restore or host.restore < newest):
            self.fail(f"{host.name} begins with {host.restore or 'nothing'}, though there is {newest}")


class NoPlaceStaysEmpty(Invariant):
    """No server or standby is missing while a node waits for a place."""

    def over(self) -> None:
        """In a cluster that runs, once nothing happens any more."""
        coordinator = self.world.coordinator
        if not coordinator.alive or coordinator.machine.stage != "running":
            return
        waiting = [one for one in coordinator.machine.state.phases.values() if isinstance(one, Spare)]
        taken = {(one.role, one.index) for one in coordinator.book.view().members}
        roles = ("server", "standby")[: 1 + self.world.replicas]
        empty = [(role, index) for role in roles for index in range(self.world.servers)]
        empty = [place for place in empty if place not in taken]
        if waiting and empty:
            self.fail(f"{len(waiting)} nodes wait for a place, and nobody is {empty}")


ENLISTED: tuple[type[Invariant], ...] = (NoPlaceStaysEmpty,)
"""What holds where servers come by themselves."""

REWOUND: tuple[type[Invariant], ...] = (NewestCheckpoint,)
"""What holds where everything may begin anew."""
