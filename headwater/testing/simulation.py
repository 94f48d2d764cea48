"""Runs of simulated clusters, one at a time: from a schedule, or from what it is to be made of."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwater.messages import AnyEntry
from headwater.spec.sync import Mode
from headwater.testing.faults import Fault, Faults, Partition, Stop
from headwater.testing.following import FollowedRows, Following
from headwater.testing.injection import inject
from headwater.testing.invariants import explained
from headwater.testing.schedule import Schedule, with_faults
from headwater.testing.workload import Workload
from headwater.testing.world import World


@dataclass(frozen=True)
class Result:
    """What became of a run in which every invariant held.

    Attributes:
        log: the entries, in order; version: after the last.
        seconds: of virtual time, until the last answer; messages: deliveries and other things that happened.
        faults: those that were done; one that would have lost a shard is not.
        trace: what happened when, in virtual seconds; empty unless it was asked for.
    """

    schedule: Schedule
    log: tuple[AnyEntry, ...]
    version: int
    seconds: float
    messages: int
    faults: tuple[Fault, ...]
    trace: tuple[tuple[float, str], ...] = ()


def run(schedule: Schedule, *, trace: bool = False) -> Result:
    """Run it; blocks until every worker is at its end. `trace`: note what happens.

    Raises:
        Violation: an invariant did not hold; its `schedule` and `trace` say how that came about.
    """
    workload = Workload(
        schedule.workers,
        schedule.servers,
        schedule.steps,
        carries=schedule.mode.late == "carry",
        followed=FollowedRows(schedule.seed) if schedule.followers else None,
        **{name: getattr(schedule, name) for name in _SHARED},
    )
    world = _world(schedule, workload, trace)
    inject(world, schedule.faults)
    collects = gc.isenabled()
    gc.disable()  # a world is one knot of references until it is dropped as a whole
    try:
        world.run(*[workload.program] * schedule.workers)
    except Exception as error:
        raise explained(error, schedule, tuple(world.trace or ())) from error
    finally:
        if collects:
            gc.enable()
    return Result(
        schedule,
        tuple(world.log),
        world.versions[-1] if world.versions else 0,
        world.progress_s,
        world.agenda.happened,
        tuple(world.faults),
        tuple(world.trace or ()),
    )


_SHARED = (
    *("seed", "rule", "clip_norm", "splits", "meets", "checkpoints", "weighted", "merge"),
    *("outer", "codec", "rows", "keeps", "ahead", "verifies"),
)
"""What a schedule says of its workload."""


def _world(schedule: Schedule, workload: Workload, trace: bool) -> World:
    silent = (isinstance(fault, Stop | Partition) or "coordinator" in str(fault) for fault in schedule.faults)
    return World(
        schedule.mode,
        workers=schedule.workers,
        servers=schedule.servers,
        replicas=schedule.replicas,
        seed=schedule.seed,
        shares=schedule.shares,
        min_workers=schedule.min_workers,
        beats=any(silent),
        restarts=workload.program,
        readers=[workload.reader] * schedule.readers,
        followers=[Following(workload, number) for number in range(schedule.followers)],
        workload=workload,
        invariants=schedule.invariants,
        digest_every=8,
        trace=trace,
    )


def simulate(
    sync: str | Mode = "sync", *, faults: Faults | Sequence[Fault] = (), trace: bool = False, **fields: Any
) -> Result:
    """Run one simulated cluster to its end; blocks, but reads no clock: what it takes is computing time.

    Args:
        sync: a training mode as text, or an object that is one (docs/testing.md).
        faults: which ones happen, or how many may: then `seed` says which.
        trace: note what happens.
        fields: of `Schedule`: workers, servers, replicas, steps, seed, rule, ….

    Raises:
        Violation: an invariant did not hold.
        ConfigurationError: an impossible argument.
    """
    planned = () if isinstance(faults, Faults) else tuple(faults)
    schedule = Schedule(sync, faults=planned, **fields)
    if isinstance(faults, Faults):
        schedule = with_faults(schedule, faults, random.Random(f"{schedule.seed} faults"))
    return run(schedule, trace=trace)
