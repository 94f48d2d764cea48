"""A comparison as lines of text for a terminal of 80 columns: a table with bars for each straggler."""

from __future__ import annotations

import math
from collections.abc import Iterator

from headwater.comparison.comparison import Comparison, mean_of, mean_staleness
from headwater.comparison.verdict import under

_BAR = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"


def lines(comparison: Comparison) -> Iterator[str]:
    """Seconds to the target with their interval, and means over the seeds; `predicted` where asked for.

    A bar is as long as its time is, of the longest one under the same straggler.
    """
    target = str(comparison.experiment.target)
    predicted = {
        (one.mode, one.straggler): f"{one.steps_per_s:.1f}"
        for one in comparison.predictions
        if one.workers == comparison.workers
    }
    for straggler in map(str, comparison.experiment.stragglers):
        yield under(straggler)
        yield f"{'mode':12} {'seconds to ' + target:36} {'steps/s':>8} {'predicted':>9} waits stale"
        times = {mode: comparison.time_to_target(mode, straggler) for mode in comparison.experiment.modes}
        longest = max((one.mean for one in times.values() if one.count), default=math.nan)
        for mode, time in times.items():
            runs = comparison.of(mode, straggler)
            said = "    not reached"
            if time.count:
                said = f"{time.mean:7.2f} {_interval(time.low, time.high):16} {_bar(time.mean / longest)}"
            steps, waits = mean_of([one.steps_per_s for one in runs]), mean_of([one.waiting for one in runs])
            stale = mean_of([mean_staleness(one) for one in runs])
            yield (
                f"{mode:12.12} {said:36} {steps:8.1f} "
                f"{predicted.get((mode, straggler), '–'):>9} {waits:5.0%} {stale:5.2f}"
            )
        yield ""


def _interval(low: float, high: float) -> str:
    return f"({max(0.0, low):.2f} to {high:.2f})" if math.isfinite(low) else ""


def _bar(share: float) -> str:
    whole, rest = divmod(round(8 * _BAR * share), 8)
    return "█" * whole + _EIGHTHS[rest].strip()
