"""How long the stages of a worker's turns take: see `headwater.spec.stages`.

A turn begins where the one before ended, so every nanosecond of a worker belongs to one stage of one turn.
What is measured is when a stage ends; computing is what is left. A turn costs a few readings of the clock and
a row of integers: they are counted together, when the coordinator is told.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headwater.messages import Histogram, TurnBlock
from headwater.runtime.tracing import TraceRecorder
from headwater.spec.stages import SECONDS, STAGES

_BOUNDS = np.array([round(bound * 1e9) for bound in SECONDS], np.int64)
_COLUMNS = 2 + len(STAGES)
_KEPT = 4096
"""Turns after which they are counted even if nobody was told meanwhile."""
_BLOCKS = 64
"""Rows of turns in one report at most: then each gets twice as many rounds."""


class StageClock:
    """Of one worker, for the thread that uses it.

    Attributes:
        now: reads the clock, in nanoseconds.
        sent, answered: when the last exchange was sent, and when the last server began to answer it.
        data, push, wait: nanoseconds in these stages since the last turn ended, apart from its own exchange.
        trace: is told of every stage while it is on.
        exchange: (member, number) of the step that was made last, for traces.
    """

    __slots__ = (
        "_blocks",
        "_closed",
        "_counted",
        "_counts",
        "_records",
        "_size",
        "_step_began",
        "_sums",
        "_turns",
        "_waiting",
        "answered",
        "data",
        "exchange",
        "now",
        "push",
        "sent",
        "trace",
        "wait",
    )

    def __init__(self, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.now = now
        self.sent = self.answered = 0
        self.trace = TraceRecorder(lambda told: None)
        self.exchange: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.data = self.push = self.wait = 0
        self._turns = 0
        self._closed = self._step_began = now()
        self._waiting = 0.0  # seconds in exchanges, as of the end of the last turn
        self._counted = 0.0  # of the seconds since: those that belong to data or to meetings
        self._records = array("q")
        self._counts = np.zeros((len(STAGES), len(SECONDS) + 1), np.int64)
        self._sums = [0] * len(STAGES)
        self._blocks: list[TurnBlock] = []
        self._size = 0

    def begin(self, waiting: float) -> None:
        """The worker has what it needs for its first turn; `waiting`: seconds in exchanges so far.

        Without effect after the first turn.
        """
        if not self._turns:
            self._start(self.now(), waiting)

    def read(self, began: int, waited: float) -> None:
        """Data were read since `began`; `waited` of these were seconds in exchanges."""
        now = self.now()
        self.data += now - began
        self._counted += waited
        if self.trace.on:
            self.trace.slice("data", began, now)

    def met(self, began: int, waited: float) -> None:
        """A meeting, as `read`."""
        now = self.now()
        self.wait += now - began
        self._counted += waited
        if self.trace.on:
            self.trace.slice("meeting", began, now)

    def pushed(self, began: int) -> None:
        """Gradients were staged since `began`."""
        now = self.now()
        self.push += now - began
        if self.trace.on:
            self.trace.slice("stage gradients", began, now)

    def step(self) -> None:
        """The worker ends its turn: what follows is its push."""
        self._step_began = self.now()

    def sent_off(self) -> None:
        """The push is over, and the worker goes on computing before it waits."""
        self.push += self.now() - self._step_began

    def arrived(self, key: int, waiting: float) -> None:
        """The answer to what was sent off: only waiting for it counts."""
        now = self.now()
        apart = waiting - self._waiting - self._counted
        self.wait += min(max(0, round(apart * 1e9)), now - self._closed - self.data - self.push - self.wait)
        self._close(key, now, 0, waiting)

    def end(self, key: int, before: float, waiting: float) -> None:
        """The turn is over. `key`: its round, or step; `before`, `waiting`: seconds in exchanges so far,
        before its own one and now."""
        now, began = self.now(), self._step_began
        sent = self.sent if self.sent > began else began
        answered = self.answered if self.answered > sent else sent
        pulled = round((before - self._waiting - self._counted) * 1e9)  # exchanges of their own
        self.push += sent - began
        self.wait += answered - sent
        if self.trace.on:
            self._draw(key, began, sent, answered, now)
        self._close(key, now, now - answered + (pulled if pulled > 0 else 0), waiting)

    def _draw(self, key: int, began: int, sent: int, answered: int, now: int) -> None:
        """The turn in a trace: an outer slice, its exchange in it, and the exchange's three parts in that."""
        draw, flow = self.trace.slice, (self.exchange(),)
        draw("turn", self._closed, now, row=key)
        draw("step", began, now, row=key)
        draw("push", began, sent, flow, "begin")
        draw("wait", sent, answered)
        draw("pull", answered, now, flow, "end")

    def _close(self, key: int, now: int, pull: int, waiting: float) -> None:
        data, push, wait = self.data, self.push, self.wait
        compute = now - self._closed - data - push - wait - pull
        if compute < 0:  # seconds are rounded, and two clocks are read one after the other
            pull = max(0, pull + compute)
            compute = now - self._closed - data - push - wait - pull
        self._records.extend((key, now, data, compute, push, wait, pull))
        self._turns += 1
        self._start(now, waiting)
        if len(self._records) >= _KEPT * _COLUMNS:
            self._count()

    def _start(self, now: int, waiting: float) -> None:
        self._closed, self._waiting, self._counted = now, waiting, 0.0
        self.data = self.push = self.wait = 0

    # ── what is told ────────────────────────────────────────────────────────────────────────────

    def stages(self) -> dict[str, Histogram]:
        """Seconds that a turn took, by stage, since the worker joined."""
        self._count()
        return {
            stage: Histogram(tuple(self._counts[i].tolist()), self._sums[i] / 1e9)
            for i, stage in enumerate(STAGES)
            if self._turns
        }

    def news(self) -> tuple[TurnBlock, ...]:
        """The turns since the last call, in rows."""
        self._count()
        blocks, self._blocks = self._blocks, []
        return tuple(blocks)

    def _count(self) -> None:
        if not self._records:
            return
        rows = np.frombuffer(self._records, np.int64).reshape(-1, _COLUMNS).copy()
        self._records = array("q")
        times = rows[:, 2:]
        for i in range(len(STAGES)):
            buckets = np.searchsorted(_BOUNDS, times[:, i])
            self._counts[i] += np.bincount(buckets, minlength=len(SECONDS) + 1)
            self._sums[i] += int(times[:, i].sum())
        new = self._in_blocks(rows)
        self._blocks = _coarser(self._blocks + new, self._size)
        while len(self._blocks) > _BLOCKS:
            self._size += 1
            self._blocks = _coarser(self._blocks, self._size)

    def _in_blocks(self, rows: NDArray[np.int64]) -> list[TurnBlock]:
        first, last = int(rows[0, 0]), int(rows[-1, 0])
        while (last >> self._size) - (first >> self._size) >= _BLOCKS:
            self._size += 1
        keys = rows[:, 0] >> self._size
        starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        ends = [*starts[1:].tolist(), len(keys)]
        sums = np.add.reduceat(rows[:, 2:], starts)
        return [
            TurnBlock(int(keys[start]), self._size, end - start, int(rows[end - 1, 1]), tuple(stages))
            for start, end, stages in zip(starts.tolist(), ends, sums.tolist(), strict=True)
        ]


def _coarser(blocks: list[TurnBlock], size: int) -> list[TurnBlock]:
    """The same turns in rows of 2 ** `size` rounds."""
    found: list[TurnBlock] = []
    for block in blocks:
        key = block.key >> (size - block.size)
        if found and found[-1].key == key:
            last = found.pop()
            stages = tuple(one + more for one, more in zip(last.stages, block.stages, strict=True))
            found.append(TurnBlock(key, size, last.turns + block.turns, block.ended, stages))
        else:
            found.append(TurnBlock(key, size, block.turns, block.ended, block.stages))
    return found
