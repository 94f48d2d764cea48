"""The generations of a simulated cluster: their logs, and the checkpoints that lie between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.errors import HeadwaterError
from headwater.machines.checkpoint_plan import own_since
from headwater.machines.coordinator import ChooseCheckpoint
from headwater.testing.checkpointing import Checkpointing
from headwater.testing.invariants.accounts import Accounts, Saved
from headwater.testing.processes.client import Client, Program
from headwater.testing.processes.disk import Disk
from headwater.testing.processes.machine_driver import Later
from headwater.testing.processes.member import Member
from headwater.testing.timeline import Timeline
from headwater.testing.workload import Steps, Workload

if TYPE_CHECKING:
    from headwater.testing.world import World


class Generations:
    """Of `world`, whose members do what `workload` says; a checkpoint every `versions` commits, 0: never.

    Attributes:
        timelines: by generation, what was processed in it and what it adds up to.
        disk: has the checkpoints; None without any.
        rewound: what the newest one was each time that everything began anew.
    """

    def __init__(self, world: World, workload: Workload | None, servers: int, versions: int) -> None:
        self.timelines: dict[int, Timeline] = {}
        self.disk = Disk(servers) if versions else None
        self.rewound: list[str] = []
        self._world = world
        self._workload = workload
        self._checkpointing = None if self.disk is None else Checkpointing(self.disk, versions)
        self._regular: Member | None = None
        self._writing: dict[Member, Later] = {}

    @property
    def now(self) -> Timeline:
        """That of the coordinator."""
        return self.of(self._world.coordinator.machine.generation)

    def of(self, generation: int, begins: str | None = None) -> Timeline:
        """A generation of the log; `begins`: the checkpoint that one of its servers began with."""
        known = self.timelines.get(generation)
        if known is not None:
            return known
        if begins is None:
            now = generation and self._world.coordinator.machine.generation == generation
            serving = self._world.serving if now else []
            begins = serving[0].restore if serving else ""
        workload = self._workload
        accounts = None if workload is None else Accounts(self._world, workload, self._saved(begins))
        self.timelines[generation] = Timeline(generation, begins, accounts)
        return self.timelines[generation]

    def _saved(self, path: str) -> Saved:
        """What the steps added up to at a checkpoint."""
        if not path or self.disk is None:
            return Saved()
        written = self.disk.complete[path]
        accounts = self.timelines[written.generation].accounts
        assert accounts is not None
        return accounts.saved[written.version]

    def begins_anew(self) -> bool:
        """Whether the coordinator has begun a generation since the last call."""
        if self.disk is None or len(self.rewound) >= self._world.coordinator.machine.generation:
            return False
        self.rewound.append(self.disk.newest())
        return True

    def chosen(self, task: ChooseCheckpoint) -> str:
        """With which checkpoint a generation begins; "" for none."""
        if self.disk is None or not task.begun:
            return ""
        return self.disk.newest(own_since(resumes=False, first=task.first))

    # ── who takes them ──────────────────────────────────────────────────────────────────────────

    def take(self) -> None:
        """Have checkpoints taken from now on."""
        if self._checkpointing is not None:
            self._regular = self._join(self._checkpointing.regularly, "checkpoints")

    def write(self) -> Later:
        """Somebody wants one of now: its path, or why there is none."""
        assert self._checkpointing is not None
        later, writes = Later(), self._checkpointing.now

        def program(me: Client) -> Steps:
            later.then((yield from writes(me)))

        self._writing[self._join(program, "checkpoint now")] = later
        return later

    def _join(self, program: Program, named: str) -> Member:
        return self._world.join(program, role="observer", waited_for=False, named=named)

    def failed(self, member: Member, error: HeadwaterError) -> bool:
        """A member has ended with this; whether checkpoints must be taken by another from now on."""
        if member in self._writing:
            self._writing.pop(member).then(error)
        return member is self._regular
