"""What simulated followers do: the production machine decides, a program asks, and readers pin what is shown.

A follower's program takes a version whenever it can, lets chance decide who pins what, and leaves. Training
pushes to, and deletes from, a table of its own meanwhile, some of whose rows expire.
"""

from __future__ import annotations

import random

import numpy as np

from headwater import messages as m
from headwater.errors import HeadwaterError, RefusedError
from headwater.machines.connections import Frame
from headwater.machines.follower import Fill, FollowerMachine, Slot
from headwater.shard.version_copy import VersionCopy
from headwater.spec.initializers import Uniform
from headwater.spec.lifetime import AfterSteps, LeastRecentlyUsed
from headwater.spec.placement import SLOTS, slots_of
from headwater.spec.rules import Accumulate
from headwater.spec.version import Version
from headwater.testing.processes.client import Call, Client, Rest
from headwater.testing.processes.member import Member
from headwater.testing.workload import LEDGER, ROWS, Steps, Workload

_DIM = 2
_PINS = 2


class FollowedRows:
    """The table that followers read besides the ledger, and what workers do to it.

    Attributes:
        spec: it has an expiry of either kind, or none, as `seed` says.
        ids: of few virtual slots, so that rows displace each other.
    """

    def __init__(self, seed: int) -> None:
        expiry = (None, AfterSteps(2), LeastRecentlyUsed(SLOTS))[seed % 3]
        self.spec = m.TableSpec(
            "followed",
            _DIM,
            Accumulate().to_spec(),
            Uniform(-1.0, 1.0).to_spec(),
            seed,
            None,
            None if expiry is None else expiry.to_spec(),
        )
        self.ids = _CROWDED
        self._seed = seed

    def pushed(self, rank: int, step: int) -> list[int]:
        """The ids that a step pushes to."""
        return sorted(random.Random(f"{self._seed} {rank} {step} rows").sample(self.ids, 2))

    def deleted(self, rank: int, step: int) -> list[int]:
        """The ids that are deleted after a step; mostly none."""
        chance = random.Random(f"{self._seed} {rank} {step} deleted")
        return chance.sample(self.ids, 1) if chance.random() < 0.3 else []


def _crowded() -> list[int]:
    """Six ids of each of two slots, one of them of the first server and one of the last."""
    found: dict[int, list[int]] = {0: [], SLOTS - 1: []}
    for start in range(0, 1 << 17, 1 << 14):
        ids = range(start, start + (1 << 14))
        for id, slot in zip(ids, slots_of(np.array(ids, np.int64)).tolist(), strict=True):
            if slot in found and len(found[slot]) < 6:
                found[slot].append(id)
    return [id for ids in found.values() for id in ids]


_CROWDED = _crowded()


class Following:
    """One follower: its machine, and the views that readers have of it.

    Attributes:
        member: whose program this is, once it has begun.
        views: slots that are pinned, each with the version that it was pinned at.
    """

    def __init__(self, workload: Workload, number: int) -> None:
        self.machine = FollowerMachine(_PINS)
        self.views: list[tuple[Slot, Version]] = []
        self._workload = workload
        self.member: Member | None = None
        self._chance = random.Random(f"{workload.seed} following {number}")

    def program(self, me: Client) -> Steps:
        """Take versions while training goes on, and leave."""
        assert isinstance(me, Member)
        self.member = me
        while not me.is_declared:
            yield Rest()
        machine, workload = self.machine, self._workload
        machine.joined(me.timeline.generation, self._copy)
        for _ in range(2 * workload.steps):
            fill = machine.begin()
            if fill is None:
                machine.unpin(self.views.pop(0)[0])
                continue
            fill.begin()
            try:
                parts = yield publish(me, fill)
            except HeadwaterError:
                machine.failed()
                raise
            try:
                number = fill.install(parts)
            except RefusedError:
                machine.failed()
            else:
                machine.arrived(number, 0.0)
            self._read()
            yield taken(me)
        yield me.leave()

    def _copy(self) -> VersionCopy:
        workload = self._workload
        assert workload.followed is not None
        models, tables = {LEDGER: workload.ledger()}, {ROWS: workload.followed.spec}
        return VersionCopy(models, tables, "float32", workload.servers)

    def _read(self) -> None:
        """Readers come and go."""
        if self.views and self._chance.random() < 0.5:
            self.machine.unpin(self.views.pop(self._chance.randrange(len(self.views)))[0])
        if self.machine.current is not None and self._chance.random() < 0.5:
            self.views.append((self.machine.pin(), self.machine.shown))


def publish(me: Client, fill: Fill) -> Call:
    """Ask every server for its part of a version."""

    def frame(server: int, number: int) -> Frame:
        return Frame(fill.request(server, number, "float32", 0))

    return Call(m.Publish(me.next_number()), frame, fill.slot.copy.place, expects=m.Publication)


def taken(me: Client) -> Call:
    """The last publication is here."""
    return Call(m.Taken(me.next_number()))
