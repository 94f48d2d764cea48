"""Traces of a simulated cluster: what its processes say they do, and who collects that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headwater import messages as m
from headwater.testing.processes import coordinator
from headwater.testing.processes.network import End, Frame, Network, Process

_FLUSH_S = 0.03
"""How often what was recorded is told."""


class ToldEvents:
    """Of one process, which does one thing between two times that it tells; each has a number."""

    def __init__(self, process: Process, tell: Callable[[m.AnyMessage], None]) -> None:
        self._process = process
        self._tell = tell
        self._number = 0
        self._until = 0.0
        self._on = False

    def obey(self, asked: m.RecordTrace) -> None:
        """Record for so long, or no longer; answer at once."""
        if asked.seconds <= 0:
            self._end()
            return
        self._tell(m.TraceEvents(self._clock, echo=asked.clock))
        self._until = self._process.network.agenda.now + asked.seconds
        if not self._on:
            self._on = True
            self._process.after(_FLUSH_S, self._again)

    @property
    def _clock(self) -> int:
        return round(self._process.network.agenda.now * 1e9)

    def _again(self) -> None:
        if not self._on:
            return
        if self._process.network.agenda.now > self._until:
            self._end()
        else:
            self._say(last=False)
            self._process.after(_FLUSH_S, self._again)

    def _end(self) -> None:
        if self._on:
            self._on = False
            self._say(last=True)

    def _say(self, *, last: bool) -> None:
        self._number += 1
        event = m.TraceEvent("simulated", str(self._number), self._clock, -1)
        self._tell(m.TraceEvents(self._clock, (event,), last=last))


class World(Protocol):
    """What a collector tells the world."""

    def collected(self, collector: TraceCollector, chunk: m.TraceChunk) -> None:
        """It has a part of its trace."""


class TraceCollector(Process):
    """Collects a trace for so many seconds. `whole`: it has all."""

    def __init__(self, network: Network, world: World, name: str, seconds: float) -> None:
        super().__init__(network, name)
        self.whole = False
        self._world = world
        self._seconds = seconds

    def start(self) -> None:
        """Ask for it; without a coordinator there is none."""
        end = self.network.dial(self, coordinator.NAME)
        if end is None:
            self.exit()
            return
        end.send(m.CollectTrace(self._seconds))
        end.listen(lambda frame: self._take(end, frame), self.exit)

    def accept(self, end: End) -> None:
        """Nobody connects to it."""
        raise AssertionError(end.label)

    def _take(self, end: End, frame: Frame) -> None:
        if isinstance(frame.message, m.TraceChunk):
            self._world.collected(self, frame.message)
            end.send(m.Acknowledged())
        else:
            self.whole = isinstance(frame.message, m.Acknowledged)
            self.exit()
