"""Faults, done to the processes of a world when their time has come."""

from __future__ import annotations

import random
from collections.abc import Iterable

from headwater.testing.faults import SHORT_S, Crash, Cut, Fault, Partition, Stop
from headwater.testing.processes.coordinator import Coordinator
from headwater.testing.processes.host import Host
from headwater.testing.processes.member import Member
from headwater.testing.processes.network import Process
from headwater.testing.world import World

_TRIES, _LATER_S = 8, 0.02
"""A death that would lose a shard is tried again a little later, when it may not."""


def inject(world: World, faults: Iterable[Fault]) -> None:
    """Have these happen in `world`, each at its time."""
    for number, fault in enumerate(faults):
        chance = random.Random(f"{world.seed} fault {number} {fault}")
        world.agenda.at(fault.at, _happen, world, fault, chance)


def _happen(world: World, fault: Fault, chance: random.Random, tries: int = _TRIES) -> None:
    names = fault.nodes if isinstance(fault, Partition) else (fault.node,)
    found = [process for name in names if (process := _find(world, name)) is not None]
    if len(found) < len(names) or any(not _may_fail(world, process, fault) for process in found):
        if tries and isinstance(fault, Crash | Stop) and not world.is_over():
            world.agenda.at(world.agenda.now + _LATER_S, _happen, world, fault, chance, tries - 1, idle=True)
        else:
            world.note(f"(not done: {fault})")
        return
    world.note(f"FAULT: {fault}")
    world.faults.append(fault)
    if isinstance(fault, Crash) and isinstance(found[0], Coordinator) and chance.random() < 0.5:
        found[0].driver.dies_after = chance.randint(0, 4)
    elif isinstance(fault, Crash):
        world.kill(found[0])
    elif isinstance(fault, Partition):
        others = [process for name in fault.others if (process := _find(world, name)) is not None]
        world.network.part(found, fault.seconds, others)
    elif isinstance(fault, Cut):
        _cut(world, found[0], fault.other, chance)
    elif fault.in_pass and isinstance(found[0], Host):
        found[0].stops_in_pass = fault.seconds
    else:
        found[0].freeze(fault.seconds)


def _find(world: World, name: str) -> Process | None:
    """Who is in this place now."""
    role, _, number = name.partition(" ")
    if role == "coordinator":
        return world.coordinator
    if role == "follower":
        return world.followers[int(number)].member if int(number) < len(world.followers) else None
    if role == "reader":
        readers = [member for member in world.living() if member.name.startswith("reader")]
        return readers[int(number)] if int(number) < len(readers) else None
    if role == "worker":
        return next((member for member in reversed(world.living()) if member.rank == int(number)), None)
    known = world.standby(int(number)) if role == "standby" else None
    if role == "server":
        known = next((host for host in world.serving if host.index == int(number)), None)
    return known or next((host for host in world.hosts if _is_coming(host, role, int(number))), None)


def _is_coming(host: Host, role: str, index: int) -> bool:
    """Whether this host will be in that place, and is not yet."""
    return host.alive and not host.id and (host.role, host.index) == (role, index)


def _cut(world: World, process: Process, other: str, chance: random.Random) -> None:
    target = _find(world, other)
    for end in sorted(process.ends, key=lambda end: end.label):
        if end.peer.process is target:
            end.break_off(chance)


def _may_fail(world: World, process: Process, fault: Fault) -> bool:
    """Whether this leaves a copy of every shard: one of a pair may be lost only while the other is well."""
    if isinstance(process, Member | Coordinator):
        return process.alive
    if isinstance(fault, Cut) and fault.other != "coordinator":
        return True
    if isinstance(fault, Stop | Partition) and fault.seconds <= SHORT_S:
        return True
    assert isinstance(process, Host)
    if not world.coordinator.alive:
        return False  # what is known of the pair may be of before
    if world.coordinator.machine.stage == "forming" and isinstance(fault, Stop | Partition):
        return True  # nobody has anything yet
    if world.disk is not None and isinstance(fault, Crash):
        return world.coordinator.machine.stage == "running"  # from a checkpoint
    pair = [world.standby(process.index), *(host for host in world.serving if host.index == process.index)]
    names = {f"server {process.index}", f"standby {process.index}"}
    if isinstance(fault, Partition) and names <= set(fault.nodes):
        return False
    return world.is_replicated(process.index) and all(_is_well(world, one) for one in pair)


def _is_well(world: World, host: Host | None) -> bool:
    now = world.agenda.now
    if host is None or not host.alive or host.stopped_until > now or host.stops_in_pass is not None:
        return False
    if not world.coordinator.has_back(host.id):
        return False
    return world.network.parted_until(host, world.coordinator) <= now
