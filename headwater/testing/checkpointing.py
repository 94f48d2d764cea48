"""The checkpoints of a simulated cluster: who takes them regularly, and who takes one on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.errors import CheckpointError
from headwater.machines.checkpoint_plan import CheckpointPlan
from headwater.testing.processes.client import Client, Rest
from headwater.testing.processes.disk import DIRECTORY, CheckpointName, Disk
from headwater.testing.processes.member import Member

if TYPE_CHECKING:
    from headwater.testing.workload import Steps


class Checkpointing:
    """Of one cluster, every so many `versions`, to `disk`. One is written at a time."""

    def __init__(self, disk: Disk, versions: int) -> None:
        self.disk = disk
        self.plan = CheckpointPlan(versions)
        self._busy: Member | None = None

    def regularly(self, me: Client) -> Steps:
        """Take one after the other; never ends."""
        version = 0
        while True:
            try:
                version, _ = yield from self._take(me, self.plan.next(version))
            except CheckpointError:
                version += 1  # a server was lost between both exchanges: the next one makes up for it

    def now(self, me: Client) -> Steps:
        """Take one of now, unless that is written already, and leave; its path, or why there is none."""
        outcome: str | CheckpointError
        try:
            _, outcome = yield from self._take(me, 0)
        except CheckpointError as error:  # a server was lost between both exchanges
            outcome = error
        yield me.leave()
        return outcome

    def _take(self, me: Client, at: int) -> Steps:
        assert isinstance(me, Member)
        answer = yield me.checkpoint(at)
        written = CheckpointName(me.timeline.generation, answer.version)
        while self._busy is not None and self._busy.alive:
            yield Rest()
        self._busy = me
        try:
            if self.plan.wants(written.generation, written.version):
                self.disk.commit(written, (yield me.store(DIRECTORY, written.generation, written.version)))
                self.plan.wrote(written.generation, written.version)
        finally:
            self._busy = None
        return answer.version, self.disk.newest()
