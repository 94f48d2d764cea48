"""How a metric went in one run: over time, samples and versions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.comparison.target import Target
from headwater.comparison.trials import TrialRun

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """float64[n] each, in the order of time.

    Attributes:
        time: seconds since the first step of a worker was answered.
        samples: that all workers together had read; steps where the script does not use `batches`.
        version: commits, as the logging worker saw them.
        value: mean of the last `smooth` logged values, of whichever ranks; NaN where one was not finite.
    """

    time: Floats
    samples: Floats
    version: Floats
    value: Floats

    @staticmethod
    def of(run: TrialRun, smooth: int) -> Curve:
        """Of one run; empty where the metric was never logged."""
        begin = began(run)
        counts = "samples" if any(one.samples for notes in run.notes for one in notes.steps) else "steps"
        logged = sorted(
            ((one.time - begin, notes.rank, one) for notes in run.notes for one in notes.logged),
            key=lambda entry: entry[:2],
        )
        read: dict[int, int] = {}
        samples = []
        for _, rank, one in logged:
            read[rank] = getattr(one, counts)
            samples.append(sum(read.values()))
        values = np.array([np.nan if one.value is None else one.value for _, _, one in logged], np.float64)
        return Curve(
            np.array([entry[0] for entry in logged], np.float64),
            np.array(samples, np.float64),
            np.maximum.accumulate(np.array([one.version for *_, one in logged], np.float64)),
            running_mean(values, smooth),
        )

    def reaches(self, target: Target, smooth: int) -> int | None:
        """Index of the first value that has reached the target; None: none has.

        Before `smooth` values there is no mean of as many, so none counts.
        """
        for index in range(min(smooth, len(self.value)) - 1, len(self.value)):
            if index >= 0 and target.is_reached(float(self.value[index])):
                return index
        return None

    def at_samples(self, samples: float) -> float:
        """The value once so many samples were read; NaN before the first."""
        index = int(np.searchsorted(self.samples, samples, side="right")) - 1
        return float(self.value[index]) if index >= 0 else float("nan")


def began(run: TrialRun) -> float:
    """When the first step of a worker was answered, on this machine's monotonic clock."""
    return min((notes.steps[0].ended for notes in run.notes if notes.steps), default=0.0)


def ended(run: TrialRun) -> float:
    """When the last step of a worker was answered."""
    return max((notes.steps[-1].ended for notes in run.notes if notes.steps), default=0.0)


def running_mean(values: Floats, count: int) -> Floats:
    """The mean of the last `count` values at each place; of fewer at the first ones."""
    if not len(values):
        return values
    windows = [values[max(0, place - count + 1) : place + 1] for place in range(len(values))]
    return np.array([window.mean() for window in windows], np.float64)
