"""A schedule: all that a simulated run depends on, written down so that it can be run again."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from headwater.errors import ConfigurationError
from headwater.spec.rules import Adam, Rule
from headwater.spec.sync import Mode, parse_sync
from headwater.testing.faults import Fault, Faults
from headwater.testing.invariants import Invariant

_STEP_S, _REST_S = 0.03, 0.12
"""About how long a step, and all that is not one, takes in virtual time."""


@dataclass(frozen=True)
class Schedule:
    """All that a run depends on. Two runs of one schedule are the same, message by message.

    Attributes:
        sync: a mode as text, or an object that is one.
        readers: members that read while the others train. followers: that keep versions meanwhile.
        replicas: 1: every server has a standby. min_workers: with fewer present nothing is committed.
        seed: of delays, of gradients, and of what is lost with a fault.
        faults: what goes wrong, and when.
        shares: members share windows with servers; otherwise values travel as payload.
        splits: workers read splits that they lease, instead of parts of their own.
        meets, checkpoints: after this many steps there is a barrier, a checkpoint; 0: none.
        traces: so many collect a trace meanwhile, at most 2.
        program: what workers do: take "steps"; have servers work on "vectors"; or compute evaluations in
            "portions", which the last of them asks for. What follows is of those that take steps.
        rule: a second model is trained with it, and compared, bit by bit, with one process.
        clip_norm: the largest norm of a gradient of that model.
        merge: how gradients of that model become one; None: as the mode says.
        outer: they are changes after local steps.
        codec: how they are represented. fragments: steps are outer ones, of the two models in turn.
        weighted: steps have weights in the mean.
        spares: nodes more than are needed. rewinds: commits between two checkpoints, with the last of which
            everything begins anew when a shard is lost with all its copies; 0: no shard is lost so. With
            either, servers come by themselves and ask what they are to be.
        asks: rank 0 has a checkpoint written after its every second step; only with `rewinds`.
        rows: a table is trained besides; keeps: ranks keep something; ahead: steps are begun and waited for
            later; verifies: readers have standbys compared with their servers.
        invariants: what must hold besides what always must.
    """

    sync: str | Mode = "sync"
    workers: int = 2
    servers: int = 2
    replicas: int = 0
    readers: int = 0
    followers: int = 0
    steps: int = 5
    seed: int = 0
    faults: tuple[Fault, ...] = ()
    shares: bool = True
    splits: bool = False
    meets: int = 0
    checkpoints: int = 0
    min_workers: int = 1
    rule: Rule | None = None
    clip_norm: float | None = None
    merge: str | None = None
    outer: bool = False
    fragments: bool = False
    codec: str | None = None
    weighted: bool = False
    rows: bool = False
    keeps: bool = False
    ahead: bool = False
    verifies: bool = False
    spares: int = 0
    rewinds: int = 0
    asks: bool = False
    traces: int = 0
    program: str = "steps"
    invariants: tuple[type[Invariant], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        few = min(self.workers, self.servers, self.steps) < 1
        if few or self.replicas not in (0, 1) or not 1 <= self.min_workers <= self.workers:
            raise ConfigurationError(
                f"Schedule: got workers={self.workers}, servers={self.servers}, steps={self.steps}, "
                f"replicas={self.replicas}, min_workers={self.min_workers}: expected at least one of each of "
                f"the first three, 0 or 1 replicas, and min_workers from 1 to workers"
            )
        if self.program not in PROGRAMS:
            raise ConfigurationError(f"Schedule: program={self.program!r}: choose from {', '.join(PROGRAMS)}")

    @property
    def mode(self) -> Mode:
        """The mode as an object."""
        return parse_sync(self.sync) if isinstance(self.sync, str) else self.sync

    def __str__(self) -> str:
        """As text that makes the same schedule again, where its objects' texts do."""
        said = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ALWAYS_SAID or value != field.default:
                said.append(f"{field.name}={_text(value)}")
        return f"Schedule({', '.join(said)})"


PROGRAMS = "steps", "vectors", "portions"
_MERGES = ("mean", "sum", "rda", "rda", "median", "trimmed:1")
_OF_ANY = {"workers", "servers", "replicas", "steps", "shares", "min_workers", "spares", "traces", "program"}
_ALWAYS_SAID = ("sync", "workers", "servers", "steps", "seed")


def _text(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    inner = [one.__name__ if isinstance(one, type) else repr(one) for one in value]
    return f"({', '.join(inner)},)"


def random_schedule(sync: str | Mode, seed: int, faults: Faults, **fixed: Any) -> Schedule:
    """A small cluster, with something of everything, as `seed` says; `fixed`: fields of `Schedule`."""
    chance = random.Random(f"{seed} schedule")
    workers, servers, steps = chance.choice((1, 2, 2, 3)), chance.choice((1, 2, 2, 3)), chance.randint(2, 6)
    drawn: dict[str, Any] = {
        "workers": workers,
        "servers": servers,
        "replicas": int(chance.random() < 0.75),
        "readers": chance.choice((0, 0, 1, 2)),
        "steps": steps,
        "shares": chance.random() < 0.7,
        "splits": chance.random() < 0.25,
        "meets": chance.choice((0, 0, chance.randint(1, steps))),
        "checkpoints": chance.choice((0, chance.randint(1, steps))),
        "rule": chance.choice((None, None, Adam(lr=0.1))),
        "clip_norm": chance.choice((None, 1.0)),
        "merge": random.Random(f"{seed} merge").choice((None, None, *_MERGES)),
        "weighted": random.Random(f"{seed} weights").random() < 0.5,
        "outer": random.Random(f"{seed} outer").random() < 0.3,
        "fragments": random.Random(f"{seed} fragments").random() < 0.4,
        "codec": random.Random(f"{seed} codec").choice((None, None, None, "2bit:0.5", "q4")),
        "followers": random.Random(f"{seed} followers").choice((*[0] * 9, 1, 1, 2)),
        "rows": chance.random() < 0.2,
        "keeps": chance.random() < 0.3,
        "ahead": chance.random() < 0.3,
        "verifies": chance.random() < 0.5,
        "spares": random.Random(f"{seed} spares").choice((*[0] * 10, 1, 2)),
        "rewinds": random.Random(f"{seed} rewinds").choice((*[0] * 14, 2, 4)),
        "asks": random.Random(f"{seed} asks").random() < 0.5,
        "traces": random.Random(f"{seed} traces").choice((*[0] * 14, 1, 2)),
        "program": _program(seed, fixed),
        **fixed,
    }
    if Schedule(sync).mode.rounds and "splits" not in fixed:
        drawn["splits"] = False  # a round waits for who has nothing to read
    if drawn["rewinds"] and "steps" not in fixed:
        drawn["steps"] += 3  # there is something to begin anew from
    if drawn["program"] != "steps":
        drawn |= {"readers": 0, "followers": 0, "rewinds": 0}
    if drawn["program"] == "portions" and "workers" not in fixed:
        drawn["workers"] += 1  # who asks computes nothing
    return with_faults(Schedule(sync, seed=seed, **drawn), faults, chance)


def _program(seed: int, fixed: dict[str, Any]) -> str:
    """Mostly steps; always where something of them is asked for."""
    chance = random.Random(f"{seed} program").random()
    return "steps" if fixed.keys() - _OF_ANY or chance < 0.92 else "vectors" if chance < 0.96 else "portions"


def with_faults(schedule: Schedule, faults: Faults, chance: random.Random) -> Schedule:
    """The schedule with so many faults at most, over the time that it takes."""
    planned = faults.plan(
        chance,
        workers=schedule.workers,
        servers=schedule.servers,
        replicas=schedule.replicas,
        rewinds=schedule.rewinds > 0,
        until=schedule.steps * _STEP_S + _REST_S,
    )
    of_followers = faults.of_followers(
        random.Random(f"{schedule.seed} faults of followers"),
        followers=schedule.followers,
        servers=schedule.servers,
        until=schedule.steps * _STEP_S + _REST_S,
    )
    if schedule.program == "portions":  # who asks keeps what it asked for in its process
        asker = f"worker {schedule.workers - 1}"
        planned = tuple(one for one in planned if asker not in str(one))
    both = sorted((*planned, *of_followers), key=lambda fault: fault.at)
    return dataclasses.replace(schedule, faults=tuple(both))
