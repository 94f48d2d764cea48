"""What must hold of traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater import messages as m
from headwater.testing.invariants.invariant import Invariant

if TYPE_CHECKING:
    from headwater.testing.processes.trace_recording import TraceCollector
    from headwater.testing.world import World


class TracesEnd(Invariant):
    """Whoever collects a trace is told each thing once, in each member's order, and the end."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._last: dict[tuple[TraceCollector, int], int] = {}

    def collected(self, collector: TraceCollector, chunk: m.TraceChunk) -> None:
        """What a member said while its coordinator was away is missing; nothing comes twice."""
        for event in chunk.events if chunk.member else ():
            place, number = (collector, chunk.member), int(event.name)
            if number <= self._last.get(place, 0):
                self.fail(f"{collector.name} is told number {number} of {chunk.role} {chunk.index} again")
            self._last[place] = number

    def over(self) -> None:
        """It has all, unless the coordinator died."""
        for collector in self.world.collectors:
            if not collector.whole and self.world.coordinators == 1 and not self.world.coordinator.lost:
                self.fail(f"{collector.name} has not been told the end")


TRACED: tuple[type[Invariant], ...] = (TracesEnd,)
"""What holds where traces are collected."""
