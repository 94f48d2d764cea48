"""A process that is nothing yet: it asks the coordinator which server or standby it is to be."""

from __future__ import annotations

from typing import Protocol

from headwater import messages as m
from headwater.errors import FinishedError, HeadwaterError
from headwater.machines.enlistment import Enlistment
from headwater.testing.processes import coordinator
from headwater.testing.processes.network import End, Frame, Network, Process
from headwater.testing.processes.times import START_S


class World(Protocol):
    """What it tells the world."""

    def enlisted(self, recruit: Recruit, assignment: m.Assignment, end: End) -> None:
        """It is to be this, and joins over `end`."""

    def note(self, text: str) -> None:
        """For the trace."""


class Recruit(Process):
    """Asks until it is told what it is to be; `enlistment` decides."""

    def __init__(self, network: Network, world: World, name: str, enlistment: Enlistment) -> None:
        super().__init__(network, name)
        self.enlistment = enlistment
        self._world = world

    def start(self) -> None:
        """Ask; a coordinator that is away is asked again later."""
        end = self.network.dial(self, coordinator.NAME)
        if end is None:
            self._again()
            return
        end.send(self.enlistment.request)
        end.listen(lambda frame: self._take(end, frame), self._again)

    def accept(self, end: End) -> None:
        """Nobody connects to it."""
        raise AssertionError(end.label)

    def _again(self) -> None:
        self.after(START_S, self.start)

    def _take(self, end: End, frame: Frame) -> None:
        try:
            assignment = self.enlistment.heard(frame.message)
        except HeadwaterError as error:
            self._world.note(f"{self.name} is to be nothing: {error}")
            if isinstance(error, FinishedError):
                self.exit()
            return  # the coordinator ends the connection
        if assignment is not None:
            end.wait()
            self._world.enlisted(self, assignment, end)
