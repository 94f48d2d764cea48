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
from headwater.testing.invariants import EachPortionOnce, explained
from headwater.testing.portion_program import PortionProgram
from headwater.testing.processes.client import Program
from headwater.testing.schedule import Schedule, with_faults
from headwater.testing.vector_program import VectorProgram
from headwater.testing.workload import Workload
from headwater.testing.world import World


@dataclass(frozen=True)
class Result:
    """What became of a run in which every invariant held.

    Attributes:
        log: the entries, in order, of one generation after the other; version: after the last.
        rewinds: how often everything began anew.
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
    rewinds: int = 0
    trace: tuple[tuple[float, str], ...] = ()


def run(schedule: Schedule, *, trace: bool = False) -> Result:
    """Run it; blocks until every worker is at its end. `trace`: note what happens.

    Raises:
        Violation: an invariant did not hold; its `schedule` and `trace` say how that came about.
    """
    world, program = _training(schedule, trace) if schedule.program == "steps" else _working(schedule, trace)
    inject(world, schedule.faults)
    collects = gc.isenabled()
    gc.disable()  # a world is one knot of references until it is dropped as a whole
    try:
        world.run(*[program] * schedule.workers)
    except Exception as error:
        raise explained(error, schedule, tuple(world.trace or ())) from error
    finally:
        if collects:
            gc.enable()
    timelines = [one for _, one in sorted(world.generations.timelines.items())]
    return Result(
        schedule,
        tuple(entry for one in timelines for entry in one.log),
        next((one.versions[-1] for one in reversed(timelines) if one.versions), 0),
        world.progress_s,
        world.agenda.happened,
        tuple(world.faults),
        len(world.generations.rewound),
        tuple(world.trace or ()),
    )


_SHARED = (
    *("seed", "rule", "clip_norm", "splits", "meets", "checkpoints", "weighted", "merge"),
    *("outer", "fragments", "codec", "rows", "keeps", "ahead", "verifies"),
)
"""What a schedule says of its workload."""


def _training(schedule: Schedule, trace: bool) -> tuple[World, Program]:
    """Workers take steps, whose values are known."""
    workload = Workload(
        schedule.workers,
        schedule.servers,
        schedule.steps,
        carries=schedule.mode.late == "carry",
        followed=FollowedRows(schedule.seed) if schedule.followers else None,
        asks=schedule.asks and schedule.rewinds > 0,
        **{name: getattr(schedule, name) for name in _SHARED},
    )
    world = _world(
        schedule,
        workload.program,
        trace,
        readers=[workload.reader] * schedule.readers,
        followers=[Following(workload, number) for number in range(schedule.followers)],
        rewinds=schedule.rewinds,
        workload=workload,
        invariants=schedule.invariants,
    )
    return world, workload.program


def _working(schedule: Schedule, trace: bool) -> tuple[World, Program]:
    """Workers have servers work on vectors, or compute portions of evaluations; they check what they get."""
    workers, servers, seed = schedule.workers, schedule.servers, schedule.seed
    if schedule.program == "vectors":
        program = VectorProgram(workers, servers, 2 * schedule.steps, seed).program
        return _world(schedule, program, trace, invariants=schedule.invariants), program
    program = PortionProgram(workers, servers, schedule.steps, 1 + seed % 5, seed, seed % 3 > 0).program
    return _world(schedule, program, trace, invariants=(EachPortionOnce, *schedule.invariants)), program


def _world(schedule: Schedule, program: Program, trace: bool, **more: Any) -> World:
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
        restarts=program,
        traces=(0.1, 0.2)[: schedule.traces],
        spares=schedule.spares,
        digest_every=8,
        trace=trace,
        **more,
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
