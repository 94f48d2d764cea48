"""The coordinator of a simulated cluster: the machine that every coordinator runs, in a process that may
die."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headwater.machines.actions import Action, Tell
from headwater.machines.coordinator import (
    CheckAddresses,
    ChooseCheckpoint,
    CoordinatorMachine,
    CoordinatorRecord,
    Ended,
    Identity,
    WriteCheckpoint,
)
from headwater.machines.roster import Departure, RosterBook
from headwater.spec.cluster import ClusterConfig
from headwater.testing.processes.machine_driver import Later, MachineDriver, Node
from headwater.testing.processes.network import End, Network
from headwater.testing.processes.times import ANSWER_S

NAME = "coordinator"

IDENTITY = Identity("simulated", b"simulated", returns=True)


class Surroundings(Protocol):
    """What the coordinator tells the world."""

    def departed(self, departure: Departure) -> None:
        """A member ended without leaving."""

    def chosen(self, task: ChooseCheckpoint) -> str:
        """Path of the checkpoint that a generation begins with; "" for none."""

    def write_checkpoint(self) -> Later:
        """Begin to write a checkpoint of now; its path, later."""

    def coordinator_dies(self) -> None:
        """Its process ends here and now."""

    def note(self, text: str) -> None:
        """For the trace."""


class Coordinator(Node):
    """One process of it. `record`: what the one before has persisted.

    Attributes:
        record: what the next one will find.
        lost: why training cannot go on, once a shard is lost with all its copies.
    """

    def __init__(
        self,
        network: Network,
        world: Surroundings,
        settings: ClusterConfig,
        record: CoordinatorRecord | None = None,
        enlists: bool = False,
    ) -> None:
        self.machine = CoordinatorMachine(
            settings, IDENTITY, network.agenda.now, record=record, enlists=enlists, answer_s=ANSWER_S
        )
        super().__init__(network, NAME)
        self.driver = MachineDriver(self, self.machine, waits=self.machine.is_waited_for)
        self.record = record
        self.lost = ""
        self._world = world
        self.driver.do(self.machine.begin)

    @property
    def book(self) -> RosterBook:
        """The roster."""
        return self.machine.state.book

    def has_back(self, member: int) -> bool:
        """Whether this member is here, after it was started again."""
        return member in self.machine.state.conns

    def accept(self, end: End) -> None:
        """Whoever it is says so first."""
        self.driver.connect(end)

    def persist(self, record: CoordinatorRecord) -> None:
        """As a journal does."""
        self.record = record

    def tell(self, event: Any) -> None:
        """Departures lead to others that are started."""
        if isinstance(event, Departure):
            self._world.departed(event)
        elif isinstance(event, Ended):
            self.lost = event.refusal.reason if event.refusal is not None else "training has finished"

    def perform(self, task: Any) -> Any:
        """Everybody is reached; checkpoints are the world's."""
        if isinstance(task, ChooseCheckpoint):
            return self._world.chosen(task)
        if isinstance(task, WriteCheckpoint):
            return self._world.write_checkpoint()
        assert isinstance(task, CheckAddresses)
        return None

    def dies(self, undone: Sequence[Action]) -> None:
        """Between two actions. Whoever starts processes sees their ends without being told."""
        for action in undone:
            if isinstance(action, Tell) and isinstance(action.event, Departure):
                self._world.departed(action.event)
        self._world.coordinator_dies()

    def note(self, text: str) -> None:
        """For the trace."""
        self._world.note(f"coordinator: {text}")
