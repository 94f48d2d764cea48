"""A process that has the cluster write a checkpoint, as `worker.checkpoint()` and the command line do."""

from __future__ import annotations

from collections.abc import Callable

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, RefusedError, named
from headwater.testing.processes import coordinator
from headwater.testing.processes.network import End, Frame, Network, Process


class Asker(Process):
    """Asks once; `then` is told the path, or what went wrong."""

    def __init__(self, network: Network, name: str, then: Callable[[str | HeadwaterError], None]) -> None:
        super().__init__(network, name)
        self._then = then
        self._end = network.dial(self, coordinator.NAME)
        if self._end is None:
            self.after(0.0, self._is_lost)
        else:
            self._end.send(m.TakeCheckpoint(name))
            self._end.listen(self._take, self._is_lost)

    def accept(self, end: End) -> None:
        """Nobody connects to it."""
        raise AssertionError(end.label)

    def _take(self, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, m.CheckpointTaken):
            self._is_over(message.path)
        elif isinstance(message, m.Refused):
            self._is_over(named(message.error, message.reason, default=RefusedError))
        else:
            self._is_over(ConnectionLostError(f"the coordinator answered {type(message).__name__}"))

    def _is_lost(self) -> None:
        self._is_over(ConnectionLostError("the coordinator is away"))

    def _is_over(self, outcome: str | HeadwaterError) -> None:
        self.exit()
        self._then(outcome)
