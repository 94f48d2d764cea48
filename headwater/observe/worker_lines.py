"""What a line about a worker says, computed from two of its `Progress` messages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from headwater.messages import ClusterStatistics, Progress


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker now.

    Attributes:
        steps: that it has finished; before the first one `phase` says what it does.
        rate: steps a second, since its last report.
        staleness: mean over the steps since its last report; None where there were none.
        waiting: share of the time since its last report, from 0 to 1.
        left: seconds until its batches end at the pace so far; None where that cannot be known.
        waits_for: whom it has been waiting for, in the sequencer's words; None when it is not.
    """

    rank: int
    phase: str = ""
    steps: int = 0
    rate: float = 0.0
    version: int = 0
    staleness: float | None = None
    waiting: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    left: float | None = None
    waits_for: str | None = None


class ProgressLines:
    """Remembers what each rank last reported, so that lines tell of the time since.

    Args:
        workers: how many are declared: each has a line from the beginning.
        script: what they run.
    """

    def __init__(self, workers: int, script: str) -> None:
        self._imports = f"imports {os.path.basename(script)}"
        self._reports: dict[int, Progress] = {}
        self._lines = {rank: WorkerLine(rank, "starts") for rank in range(workers)}

    def starting(self) -> list[WorkerLine]:
        """A line for each declared rank before anything is known of it."""
        return [self._lines[rank] for rank in sorted(self._lines)]

    def update(self, statistics: ClusterStatistics) -> list[WorkerLine]:
        """A line for each declared rank, and each other that has ever joined, in order of rank."""
        reports = {report.rank: report for report in statistics.progress}
        waits = {
            n.rank: n.waits_for for n in statistics.nodes if n.role == "worker" and isinstance(n.rank, int)
        }
        for rank in self._lines.keys() | reports.keys() | waits.keys():
            before, now = self._reports.get(rank), reports.get(rank)
            if now is not None and now != before and now.steps:
                self._reports[rank] = now
                self._lines[rank] = _line(before, now)
                continue
            line = self._lines.get(rank, WorkerLine(rank))
            if line.steps:  # it has not moved since the last look, so what it waits for is worth saying
                self._lines[rank] = replace(line, waits_for=waits.get(rank))
            else:
                self._lines[rank] = replace(line, phase=self._phase(rank, waits, statistics.joining))
        return self.starting()

    def _phase(self, rank: int, waits: Mapping[int, str | None], joining: Sequence[str]) -> str:
        """What a worker that has made no step does."""
        if rank in waits:
            return waits[rank] or "has joined, works towards its first step"
        waiting = (text for text in joining if text.startswith(f"worker {rank} "))
        return next((text.partition(") ")[2] for text in waiting), self._imports)


def _line(before: Progress | None, now: Progress) -> WorkerLine:
    if before is None or before.member != now.member:
        before = Progress(now.member, now.rank, 0, 0, 0, 0, 0.0, 0.0, {}, {})
    steps, elapsed = now.steps - before.steps, now.elapsed - before.elapsed
    stale = sum(value * (count - before.staleness.get(value, 0)) for value, count in now.staleness.items())
    return WorkerLine(
        rank=now.rank,
        steps=now.steps,
        rate=steps / elapsed if elapsed else 0.0,
        version=now.version,
        staleness=stale / steps if steps else None,
        waiting=min(1.0, (now.waiting - before.waiting) / elapsed) if elapsed else 0.0,
        metrics=now.metrics,
        left=max(0, now.planned - now.samples) * now.elapsed / now.samples if now.samples else None,
        waits_for=None,
    )
