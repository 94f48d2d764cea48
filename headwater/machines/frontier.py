"""The frontier: which rank, in which stage of its turn, the cluster waited for.

Pure. Workers that train together are as fast as the slowest of them, and what that one does is *exposed*:
the others wait meanwhile. For every round and stage the frontier is the moment at which the last rank was
through with it. How far each stage moved it is that stage's exposed time, and belongs to the rank that was
last. Since these are differences of one sequence, they add up to the time of the step exactly, and each
second is counted once (the accounting of StageFrontier, arXiv 2606.06751).

Ranks report rows of turns that belong together: a round, or in modes without rounds the n-th step of each. A
row is accounted for when all who report have begun a later one. Times are whole nanoseconds on one clock:
whoever calls says how far a worker's clock is behind (`ClockOffsets`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from headwater.messages import TurnBlock
from headwater.spec.stages import STAGES

_OPEN = 256
"""Rows that wait for a rank at most; then the oldest is accounted for without it."""


@dataclass(slots=True)
class _Turns:
    """What one rank did in a row."""

    ended: int = 0
    stages: list[int] = field(default_factory=lambda: [0] * len(STAGES))

    def add(self, ended: int, stages: Iterable[int]) -> None:
        self.ended = max(self.ended, ended)
        self.stages = [own + more for own, more in zip(self.stages, stages, strict=True)]


class Frontier:
    """Of one cluster.

    Attributes:
        exposed: nanoseconds by rank and number of the stage.
        total: nanoseconds that the frontier has moved in all: the sum of `exposed`.
        rows: that were accounted for.
    """

    def __init__(self) -> None:
        self.exposed: dict[tuple[int, int], int] = {}
        self.total = 0
        self.rows = 0
        self._size = 0
        self._open: dict[int, dict[int, _Turns]] = {}
        self._reached: dict[int, int] = {}
        self._closed = -1  # the last row that was accounted for
        self._at: int | None = None
        self._leader = -1

    def joined(self, rank: int) -> None:
        """Reports of this rank are to come: rows wait for it."""
        self._reached[rank] = -1

    def take(self, rank: int, blocks: Iterable[TurnBlock], ahead: int = 0) -> None:
        """What a rank reports, in order; `ahead`: nanoseconds to add to its clock."""
        for block in blocks:
            if block.size > self._size:
                self._coarsen(block.size - self._size)
            key = block.key >> (self._size - block.size)
            self._reached[rank] = max(key, self._reached.get(rank, -1))
            if key > self._closed:
                row = self._open.setdefault(key, {})
                row.setdefault(rank, _Turns()).add(block.ended + ahead, block.stages)
        self._account()

    def gone(self, rank: int) -> None:
        """Nothing more comes from this rank, or a new incarnation of it is to come."""
        self._reached.pop(rank, None)
        self._account()

    def begin_anew(self) -> None:
        """Training begins anew: rounds are numbered anew too, and the time in between is nobody's."""
        self._reached.clear()
        self._account()
        self._closed, self._at, self._leader = -1, None, -1

    def _coarsen(self, by: int) -> None:
        """Rows are to have 2 ** `by` times as many rounds."""
        self._size += by
        rows, self._open = self._open, {}
        for key, row in rows.items():
            into = self._open.setdefault(key >> by, {})
            for rank, turns in row.items():
                into.setdefault(rank, _Turns()).add(turns.ended, turns.stages)
        self._reached = {rank: key >> by for rank, key in self._reached.items()}
        self._closed = (self._closed + 1 >> by) - 1

    def _account(self) -> None:
        """Account for the rows that nobody adds to any more."""
        begun = min(self._reached.values(), default=None)
        for key in sorted(self._open):
            if begun is not None and key >= begun and len(self._open) <= _OPEN:
                return
            self._move(self._open.pop(key))
            self._closed = key
            self.rows += 1

    def _move(self, row: dict[int, _Turns]) -> None:
        """Move the frontier through the stages of a row."""
        times = {rank: turns.ended - sum(turns.stages) for rank, turns in row.items()}
        if self._at is None:
            self._at = max(times.values())
        for stage in range(len(STAGES)):
            for rank, turns in row.items():
                times[rank] += turns.stages[stage]
            last = max(times, key=lambda rank: (times[rank], rank == self._leader, -rank))
            moved = times[last] - self._at
            if moved > 0:
                self._at, self._leader = times[last], last
                self.total += moved
                self.exposed[last, stage] = self.exposed.get((last, stage), 0) + moved


class ClockOffsets:
    """How far the clocks of workers are behind the coordinator's, from when their reports came.

    A report is under way for some time, so the least difference of the last ones counts. Workers of one
    machine have one clock, so all their reports tell of the same offset, and between them there is no error.
    """

    def __init__(self) -> None:
        self._seen: dict[str, deque[int]] = {}

    def heard(self, machine: str, clock: int, now: float) -> int:
        """A report that a worker of `machine` sent at `clock` came at `now` (seconds); nanoseconds to add."""
        seen = self._seen.setdefault(machine, deque(maxlen=64))
        seen.append(round(now * 1e9) - clock)
        return min(seen)
