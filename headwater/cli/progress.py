"""What a line about a worker says, computed from two of its `Progress` messages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headwater.messages import ClusterStatistics, Progress


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker now.

    Attributes:
        rate: steps a second, since its last report.
        staleness: mean over the steps since its last report; None where there were none.
        waiting: share of the time since its last report, from 0 to 1.
        left: seconds until its batches end at the pace so far; None where that cannot be known.
        waits_for: whom it has been waiting for, in the sequencer's words; None when it is not.
    """

    rank: int
    steps: int
    rate: float
    version: int
    staleness: float | None
    waiting: float
    metrics: dict[str, float]
    left: float | None
    waits_for: str | None


class ProgressLines:
    """Remembers what each rank last reported, so that lines tell of the time since."""

    def __init__(self) -> None:
        self._reports: dict[int, Progress] = {}
        self._lines: dict[int, WorkerLine] = {}

    def update(self, statistics: ClusterStatistics) -> list[WorkerLine]:
        """A line for each rank that has ever joined, in order of rank."""
        reports = {report.rank: report for report in statistics.progress}
        waits = {
            n.rank: n.waits_for for n in statistics.nodes if n.role == "worker" and isinstance(n.rank, int)
        }
        for rank in reports.keys() | waits.keys():
            before, now = self._reports.get(rank), reports.get(rank)
            if now is not None and now != before:
                self._reports[rank] = now
                self._lines[rank] = _line(before, now)
            else:  # it has not moved since the last look, so what it waits for is worth saying
                line = self._lines.get(rank, _NOTHING_YET)
                self._lines[rank] = replace(line, rank=rank, waits_for=waits.get(rank))
        return [self._lines[rank] for rank in sorted(self._lines)]


_NOTHING_YET = WorkerLine(
    rank=-1,
    steps=0,
    rate=0.0,
    version=0,
    staleness=None,
    waiting=0.0,
    metrics={},
    left=None,
    waits_for=None,
)


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
        left=(now.planned - now.samples) * now.elapsed / now.samples if now.samples else None,
        waits_for=None,
    )
