"""What can go wrong in a simulated run, and how often: a schedule of faults follows from a seed.

Nodes are named by role and place: `worker 1`, `server 0`, `standby 2`, `reader 0`; a fault hits whoever is in
that place then. Server 0 hosts the sequencer. Times are in virtual seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

from headwater.testing.processes.times import LEASE_S


@dataclass(frozen=True)
class Crash:
    """A process dies. Of what it sent last a part may still arrive."""

    at: float
    node: str

    def __str__(self) -> str:
        return f"{self.node} dies"


@dataclass(frozen=True)
class Stop:
    """A process stands still for `seconds`, as with SIGSTOP, and then goes on as if nothing had been.

    Longer than a lease (0.3 s), it is declared dead meanwhile. `in_pass`: a server stops in the middle of its
    next pass over windows, and writes the rest of it when it goes on.
    """

    at: float
    node: str
    seconds: float
    in_pass: bool = False

    def __str__(self) -> str:
        where = " in the middle of its next pass over windows" if self.in_pass else ""
        return f"{self.node} stops{where}, for {self.seconds:g} s"


@dataclass(frozen=True)
class Cut:
    """The connections between two nodes break; the last of what is on its way is lost, both ways."""

    at: float
    node: str
    other: str

    def __str__(self) -> str:
        return f"the connection of {self.node} and {self.other} breaks"


@dataclass(frozen=True)
class Partition:
    """Nothing passes between `nodes` and all others for `seconds`; it all arrives afterwards.

    `others`: only between them and these.
    """

    at: float
    nodes: tuple[str, ...]
    seconds: float
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        by = f" by {', '.join(self.others)}" if self.others else ""
        return f"{' and '.join(self.nodes)} cannot be reached{by}, for {self.seconds:g} s"


SHORT_S = LEASE_S / 4
"""What lasts for this long is no reason to declare anybody dead."""

JOINING_S = 0.015
"""About how long it takes until all have joined."""

Fault: TypeAlias = Crash | Stop | Cut | Partition


@dataclass(frozen=True)
class Faults:
    """At most how many of each kind a run has; chance says how many, when and whom.

    Servers and standbys die, stop for longer than a lease and are parted only where there are standbys, and
    only while the other of the pair is well, or while they join: a shard that is lost with all its copies is
    not simulated. `coordinator`: deaths of the coordinator, after which the next one goes on with what it has
    persisted; it dies between any two of its actions.
    """

    crashes: int = 3
    stops: int = 2
    cuts: int = 3
    partitions: int = 1
    coordinator: int = 1

    def plan(
        self,
        chance: random.Random,
        *,
        workers: int,
        servers: int,
        replicas: int,
        until: float,
        rewinds: bool = False,
    ) -> tuple[Fault, ...]:
        """The faults of one run, which without any would be over at about `until`."""
        nodes = [f"worker {rank}" for rank in range(workers)]
        hosts = [f"server {index}" for index in range(servers)]
        if replicas:
            hosts += [f"standby {index}" for index in range(servers)]
        faults: list[Fault] = []
        for _ in range(chance.randint(0, self.crashes)):
            # Servers have most to lose.
            whom = [*nodes, *hosts, *3 * hosts[:servers]] if replicas or rewinds else nodes
            faults.append(Crash(_moment(chance, until), chance.choice(whom)))
        for _ in range(chance.randint(0, self.stops)):
            faults.append(_stop(chance, until, nodes, [*hosts, *3 * hosts[:servers]], replicas))
        for _ in range(chance.randint(0, self.cuts)):
            faults.append(_cut(chance, until, nodes, hosts))
        for _ in range(chance.randint(0, self.partitions)):
            group = chance.sample(nodes + hosts, chance.randint(1, 2))
            faults.append(
                Partition(_moment(chance, until), tuple(sorted(group)), _while(chance, replicas > 0))
            )
        if rewinds and self.crashes:  # late, so that there is a checkpoint to begin anew from
            faults.append(
                Crash(round(chance.uniform(0.6, 1.1) * until, 5), f"server {chance.randrange(servers)}")
            )
        for _ in range(chance.randint(0, self.coordinator)):
            faults.append(Crash(_moment(chance, until), "coordinator"))
        if replicas and self.partitions and chance.random() < 0.3:
            faults.append(_deposed(chance, until, hosts))
        return tuple(sorted(faults, key=lambda fault: fault.at))

    def of_followers(
        self, chance: random.Random, *, followers: int, servers: int, until: float
    ) -> tuple[Fault, ...]:
        """What goes wrong with followers in such a run: at most one thing each."""
        faults: list[Fault] = []
        for number in range(followers):
            node, at = f"follower {number}", round(chance.uniform(0.0, until), 3)
            kind = chance.choice(("none", "crash", "stop", "cut", "cut"))
            if kind == "crash" and self.crashes:
                faults.append(Crash(at, node))
            elif kind == "stop" and self.stops:
                faults.append(Stop(at, node, round(chance.uniform(0.1, 2.0) * LEASE_S, 3)))
            elif kind == "cut" and self.cuts:
                faults.append(Cut(at, node, f"server {chance.randrange(servers)}"))
        return tuple(faults)


def _deposed(chance: random.Random, until: float, hosts: list[str]) -> Partition:
    """A server that members still reach, while all others do not, and its standby takes over."""
    server = chance.choice([host for host in hosts if host.startswith("server")])
    others = tuple(host for host in hosts if host != server)
    return Partition(_moment(chance, until), (server,), _while(chance, True), ("coordinator", *others))


def _while(chance: random.Random, long: bool) -> float:
    """How long something lasts: where that is allowed, for longer than a lease as often as not."""
    if long and chance.random() < 0.6:
        return round(chance.uniform(1.1, 2.5) * LEASE_S, 3)
    return round(chance.uniform(0.1, 1.0) * SHORT_S, 3)


def _moment(chance: random.Random, until: float) -> float:
    """Now and then while all join, where much is decided in little time."""
    return round(chance.uniform(0.0, JOINING_S if chance.random() < 0.25 else until), 5)


def _stop(chance: random.Random, until: float, nodes: list[str], hosts: list[str], replicas: int) -> Stop:
    node = chance.choice([*nodes, *hosts, "coordinator"])
    seconds = _while(chance, replicas > 0 or node not in hosts)
    in_pass = node.startswith("server") and chance.random() < 0.6
    return Stop(_moment(chance, until), node, seconds, in_pass)


def _cut(chance: random.Random, until: float, nodes: list[str], hosts: list[str]) -> Cut:
    node = chance.choice(nodes + hosts)
    others = [host for host in hosts if host != node] or nodes
    return Cut(_moment(chance, until), node, chance.choice([*others, "coordinator"]))
