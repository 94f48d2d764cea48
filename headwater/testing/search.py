"""Many random schedules, and, of one in which something did not hold, the shortest one like it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headwater.spec.sync import Mode
from headwater.testing.faults import Faults
from headwater.testing.invariants import Violation
from headwater.testing.schedule import Schedule, random_schedule
from headwater.testing.simulation import Result, run


@dataclass(frozen=True)
class Exploration:
    """What was run without a violation.

    Attributes:
        schedules: how many runs; faults: that were done in them; entries: that their logs have;
        messages: deliveries and other things that happened.
    """

    schedules: int
    faults: int
    entries: int
    messages: int


def explore(
    sync: str | Mode = "sync",
    schedules: int = 500,
    *,
    seed: int = 0,
    faults: Faults | None = None,
    **fixed: Any,
) -> Exploration:
    """Run so many random schedules, of the seeds from `seed` on; blocks, some 50 ms for each.

    Args:
        sync: a training mode as text, or an object that is one (docs/testing.md).
        faults: how many of each kind a run has at most.
        fixed: fields of `Schedule` that are not left to chance.

    Raises:
        Violation: an invariant did not hold. Its text names the seed, and a short schedule that shows it.
        ConfigurationError: an impossible argument.
    """
    done = entries = messages = 0
    for one in range(seed, seed + schedules):
        schedule = random_schedule(sync, one, faults or Faults(), **fixed)
        result = _outcome(schedule)
        if isinstance(result, Violation):
            raise shrink(result)
        done += len(result.faults)
        entries += len(result.log)
        messages += result.messages
    return Exploration(schedules, done, entries, messages)


def shrink(violation: Violation, runs: int = 200) -> Violation:
    """The same invariant's violation in as short a schedule as is found with so many runs, traced.

    Delays are drawn for each connection by itself, so what is left out changes little of what is left.
    """
    shortest = violation
    assert violation.schedule is not None
    untried = _shorter(violation.schedule)
    while runs and (schedule := next(untried, None)) is not None:
        runs -= 1
        found = _outcome(schedule)
        if isinstance(found, Violation) and found.invariant == violation.invariant:
            shortest = found
            untried = _shorter(schedule)
    assert shortest.schedule is not None
    traced = _outcome(shortest.schedule, trace=True)
    assert isinstance(traced, Violation), "a run is a function of its schedule"
    traced.seed = violation.schedule.seed
    return traced


def _outcome(schedule: Schedule, *, trace: bool = False) -> Result | Violation:
    try:
        return run(schedule, trace=trace)
    except Violation as violation:
        return violation


def _shorter(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules with a little less, those that leave out most first."""
    faults = schedule.faults
    half = len(faults) // 2
    if half:
        yield dataclasses.replace(schedule, faults=faults[:half])
        yield dataclasses.replace(schedule, faults=faults[half:])
    for left_out in range(len(faults)):
        yield dataclasses.replace(schedule, faults=faults[:left_out] + faults[left_out + 1 :])
    for name, least in _LEAST.items():
        value = getattr(schedule, name)
        if value not in (least, None):
            yield dataclasses.replace(schedule, **{name: least})
            if isinstance(value, int) and value - 1 > int(least or 0):
                fewer: Any = value - 1
                yield dataclasses.replace(schedule, **{name: fewer})


_LEAST: dict[str, Any] = {
    "rule": None,
    "clip_norm": None,
    "merge": None,
    "weighted": False,
    "outer": False,
    "rows": False,
    "keeps": False,
    "ahead": False,
    "verifies": False,
    "codec": None,
    "splits": False,
    "meets": 0,
    "checkpoints": 0,
    "readers": 0,
    "followers": 0,
    "program": "steps",
    "traces": 0,
    "asks": False,
    "spares": 0,
    "rewinds": 0,
    "replicas": 0,
    "min_workers": 1,
    "workers": 1,
    "servers": 1,
    "steps": 1,
}
"""Fields of which a schedule may need less. Steps last: with fewer a fault may come when all is over."""
