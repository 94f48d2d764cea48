"""The last lines of `headwater run`: what the run did, in numbers that compare across modes."""

from __future__ import annotations

from collections import Counter

from headwater.driver import RunResult
from headwater.observe.display import duration
from headwater.observe.exposure import exposures


def summarize(result: RunResult) -> list[str]:
    """Lines on the mode and its pace, waiting and staleness, what nobody read, and what `train` returned."""
    mode = result.statistics.sync
    lines = [
        f"{mode}: version {result.version} after {duration(result.seconds)}{_pace(result)}",
        f"{mode}: {_waiting(result):.0%} of the workers' time waiting, staleness {_staleness(result)}",
    ]
    slowest = exposures(result.statistics.totals)[:3]
    if len(result.statistics.totals) > 1 and slowest:
        parts = ", ".join(f"worker {one.rank} {one.stage} {one.share:.0%}" for one in slowest)
        lines.append(f"{mode}: exposed time: {parts}")
    for left in result.statistics.unvisited:
        whose = "all workers" if left.rank is None else f"worker {left.rank}"
        lines.append(
            f"{left.samples} samples of call {left.call} of batches, for {whose}, were read by nobody"
        )
    if result.checkpoint_error is not None:
        lines.append(f"no last checkpoint: {result.checkpoint_error}")
    for rank, value in enumerate(result.values):
        if value is not None:
            lines.append(f"worker {rank} returned {value!r}")
    return lines


def _pace(result: RunResult) -> str:
    """Samples and steps a second of all workers together, from the first join to the last end."""
    progress = result.statistics.progress
    elapsed = max((report.elapsed for report in progress), default=0.0)
    if not elapsed:
        return ""
    samples, steps = sum(report.samples for report in progress), sum(report.steps for report in progress)
    rates = [f"{samples / elapsed:.1f} samples/s"] if samples else []
    return f", {', '.join([*rates, f'{steps / elapsed:.1f} steps/s'])}"


def _waiting(result: RunResult) -> float:
    progress = result.statistics.progress
    elapsed = sum(report.elapsed for report in progress)
    return min(1.0, sum(report.waiting for report in progress) / elapsed) if elapsed else 0.0


def _staleness(result: RunResult) -> str:
    """Median and maximum over all steps of all workers."""
    counts: Counter[int] = Counter()
    for report in result.statistics.progress:
        counts.update(report.staleness)
    total = counts.total()
    if not total:
        return "unknown, as there were no steps"
    passed = 0
    for value in sorted(counts):
        passed += counts[value]
        if 2 * passed >= total:
            return f"median {value}, max {max(counts)}"
    raise AssertionError("the counts add up to their total")
