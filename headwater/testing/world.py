"""A whole cluster under virtual time: coordinator, servers, standbys and members, and what must hold in it.

Every node's decisions are the machines that run in production; processes, connections, time and memory are
simulated. A world is a function of its arguments and of what is done to it between two steps.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.machines.log_link import Policy
from headwater.machines.roster import Departure
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.spec.cluster import ClusterConfig
from headwater.spec.sync import Mode, parse_sync
from headwater.testing.faults import Fault
from headwater.testing.following import Following
from headwater.testing.invariants import ALWAYS, COUNTED, FOLLOWED, Invariant
from headwater.testing.invariants.accounts import Accounts
from headwater.testing.processes.agenda import Agenda
from headwater.testing.processes.client import Call, Program
from headwater.testing.processes.coordinator import Coordinator
from headwater.testing.processes.host import Host
from headwater.testing.processes.member import Member
from headwater.testing.processes.network import SPEEDS_S, Network, Process
from headwater.testing.processes.shard import WatchedShard
from headwater.testing.processes.times import (
    BEGIN_S,
    DEADLINE_S,
    LEASE_S,
    NO_LEASE_S,
    PATIENCE_S,
    QUIET_S,
    SETTLED_S,
    START_S,
)
from headwater.testing.workload import Workload


class World:
    """`workers` declared workers and `servers` servers, with a standby each where `replicas` is 1.

    Args:
        sync: a mode, as text or as an object.
        shares: whether members share windows with servers, or send values as payload.
        beats: whether processes send heartbeats; needed only where they are stopped or parted.
        restarts: the program of a worker that died is run again with this, in a new process of the same rank.
        readers, followers: join, each for itself, when the first model is there.
        workload: what the members do; what holds of it is checked besides, and `invariants`.

    Attributes:
        log, versions: every entry that was processed, and the version after it.
        members, hosts: all workers and readers, and all servers and standbys, there ever were.
        coordinator: the one of now; coordinators: how many there were.
        progress_s: when somebody was started, joined, was answered or died last.
        faults: that were done to it.
        snapshots: by member and exchange, what each server took for a checkpoint.
        accounts: what the log says of the workload.
        trace: what happened, as (time, text), where somebody wants to know.
    """

    def __init__(
        self,
        sync: str | Mode,
        *,
        workers: int,
        servers: int,
        replicas: int = 0,
        seed: int = 0,
        shares: bool = True,
        min_workers: int = 1,
        beats: bool = False,
        thinks_s: float = 0.008,
        speeds: Sequence[float] = SPEEDS_S,
        restarts: Program | None = None,
        readers: Sequence[Program] = (),
        followers: Sequence[Following] = (),
        workload: Workload | None = None,
        invariants: Iterable[type[Invariant]] = (),
        digest_every: int = 1,
        trace: bool = False,
    ) -> None:
        self.sync: Mode = parse_sync(sync) if isinstance(sync, str) else sync
        self.mode = str(self.sync)
        self.policy = Policy(self.sync, min_workers, replicas > 0)
        self.workers, self.servers, self.replicas, self.shares = workers, servers, replicas, shares
        self.digest_every = digest_every
        self.seed = seed
        self.log: list[m.AnyEntry] = []
        self.versions: list[int] = []
        self.members: list[Member] = []
        self.hosts: list[Host] = []
        self.faults: list[Fault] = []
        self.snapshots: dict[tuple[int, int], dict[int, ShardSnapshot]] = defaultdict(dict)
        self.progress_s = 0.0
        self._starting = 0
        self.followers = followers
        self._readers = [*readers, *(follower.program for follower in followers)]
        self.trace: list[tuple[float, str]] | None = [] if trace else None
        self.agenda = Agenda()
        self.network = Network(self.agenda, seed, speeds)
        self.random = random.Random(f"{seed} world")
        self._thinks_s, self._beats, self._restarts = thinks_s, beats, restarts
        self._ids: dict[int, Member] = {}
        self._names: dict[str, int] = defaultdict(int)
        self.accounts = None if workload is None else Accounts(self, workload)
        kinds = (*ALWAYS, *(COUNTED if workload is not None else ()), *(FOLLOWED if followers else ()))
        checked = [kind(self) for kind in (*kinds, *invariants)]
        self._told = {name: _who_hears(checked, name) for name in _EVENTS}
        self._settings = ClusterConfig(
            workers=workers,
            servers=servers,
            sync=self.sync,  # type: ignore[arg-type]  # one that nobody registered is explored too
            patience=PATIENCE_S,
            deadline=DEADLINE_S,
            lease=LEASE_S if beats else NO_LEASE_S,
            replicas=replicas,
            min_workers=min_workers,
        )
        self.coordinator = Coordinator(self.network, self, self._settings)
        self.coordinators = 1
        for role in ("server", "standby")[: 1 + replicas]:
            for index in range(servers):
                self._start_host(index, "server" if role == "server" else "standby")

    # ── who is there ────────────────────────────────────────────────────────────────────────────

    def join(self, program: Program, role: m.Role = "worker", rank: int | None = None) -> Member:
        """A new member, which runs `program`; without a rank it is the next of the declared workers'."""
        if role == "worker" and rank is None:
            ranks = {member.wanted for member in self.members if member.role == "worker"}
            rank = next((rank for rank in range(self.workers) if rank not in ranks), None)
        name = self._name(f"worker {'?' if rank is None else rank}" if role == "worker" else "reader")
        member = Member(
            self.network,
            self,
            name,
            program,
            random.Random(f"{self.seed} {name}"),
            role=role,
            wanted=rank,
            shares=self.shares,
            thinks_s=self._thinks_s,
        )
        self.members.append(member)
        self.progress_s = self.agenda.now
        self._begin(member)
        return member

    def _rejoin(self, program: Program, rank: int) -> None:
        self._starting -= 1
        self.join(program, rank=rank)

    def _start_host(self, index: int, role: m.Role) -> None:
        name = self._name(f"server {index}")
        host = Host(self.network, self, name, index, role)
        self.hosts.append(host)
        self._begin(host)

    def _begin(self, process: Member | Host) -> None:
        """It is under way; how long that takes nobody knows."""
        chance = random.Random(f"{self.seed} {process.name} start")
        process.after(chance.expovariate(1.0 / BEGIN_S), process.start)

    def _name(self, name: str) -> str:
        """The second process in one place is called b, the third c."""
        self._names[name] += 1
        again = self._names[name] - 1
        return name + ("" if not again else chr(ord("a") + again) if again < 26 else f" no. {again + 1}")

    @property
    def serving(self) -> list[Host]:
        """The server of each index, as the coordinator has it."""
        return [self._host(server) for server in self.coordinator.book.of("server")]

    def standby(self, index: int) -> Host | None:
        """The standby of a server, as the coordinator has it."""
        return next(
            (self._host(one) for one in self.coordinator.book.of("standby") if one.index == index), None
        )

    def _host(self, member: m.Member) -> Host:
        host = self.network.processes[member.addresses[0]]
        assert isinstance(host, Host)
        return host

    @property
    def shards(self) -> list[WatchedShard]:
        """Of the servers."""
        return [host.shard for host in self.serving]

    def member(self, id: int) -> Member:
        """The member with this id, dead or alive."""
        return self._ids[id]

    def living(self) -> list[Member]:
        """Those whose programs are not over."""
        return [member for member in self.members if member.alive and not member.ended]

    def waits(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom, as the sequencer says."""
        serving = self.serving
        return serving[0].waits() if serving else {}

    def is_replicated(self, index: int) -> bool:
        """Whether a server can be lost: its standby lives and has all that it has."""
        standby = self.standby(index)
        return standby is not None and standby.alive and index not in self.coordinator.book.unreplicated()

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def run(self, *programs: Program, until: Callable[[], bool] = lambda: False) -> list[Any]:
        """Let the programs (and those joined before) run to their ends; what each returned, by join.

        With `until` stop as soon as that holds.

        Raises:
            Violation: an invariant does not hold.
        """
        for program in programs:
            self.join(program)
        while not until() and not self.is_over() and self.step():
            pass
        if not until():
            self._tell("over")
        return [member.value for member in self.members]

    def is_over(self) -> bool:
        """Whether all are at their ends, and what they said last has arrived; or nothing follows any more."""
        if self.coordinator.lost:
            return True
        quiet = self.agenda.now - self.progress_s
        if quiet < SETTLED_S:
            return False
        if not self.coordinator.alive or self.coordinator.machine.state.away():
            return quiet > QUIET_S
        return quiet > QUIET_S or not (self._starting or any(map(self._is_missed, self.members)))

    def _is_missed(self, member: Member) -> bool:
        """Whether something follows of it: it goes on, or its death has not been noticed."""
        if member.alive and not member.ended:
            return True
        return member.dead and self.coordinator.book.member(member.id) is not None

    def step(self) -> bool:
        """Let one thing happen; False where nothing will ever happen."""
        if not self.agenda.step():
            return False
        for hears in self._told["happened"]:
            hears()
        return True

    def kill(self, process: Process) -> None:
        """It dies: of what it sent last, a part may still arrive."""
        self.note(f"{process.name} dies")
        self.progress_s = self.agenda.now
        if isinstance(process, Member):
            process.dead = True
        process.kill(self.random)
        if process is self.coordinator:
            self.agenda.at(self.agenda.now + START_S, self._restart_coordinator)

    def note(self, text: str) -> None:
        """Put it into the trace."""
        if self.trace is not None:
            self.trace.append((self.agenda.now, text))

    # ── as the coordinator sees it ──────────────────────────────────────────────────────────────

    def coordinator_dies(self) -> None:
        """Its process ends, and another one goes on with its record."""
        self.kill(self.coordinator)

    def _restart_coordinator(self) -> None:
        self.coordinators += 1
        self.coordinator = Coordinator(self.network, self, self._settings, self.coordinator.record)

    def departed(self, departure: Departure) -> None:
        """A member ended without leaving: an engine starts another in its place."""
        member = departure.member
        self.note(f"{member.role} {member.index} (member {member.id}) is struck off")
        if member.role == "worker" and self._restarts is not None:
            self._starting += 1
            self.agenda.at(self.agenda.now + START_S, self._rejoin, self._restarts, member.index)
        elif member.role in ("server", "standby"):
            self.agenda.at(self.agenda.now + START_S, self._start_host, member.index, "standby")

    # ── as its processes see it ─────────────────────────────────────────────────────────────────

    def joined(self, member: Member) -> None:
        """It knows its id now."""
        self._ids[member.id] = member
        self.progress_s = self.agenda.now
        self.note(f"{member.name} is member {member.id}")

    def sends(self, member: Member, call: Call) -> None:
        """It begins an exchange."""
        if self.trace is not None:
            self.note(f"{member.name}: {call}")
        for hears in self._told["sends"]:
            hears(member, call)

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """Its exchange is over."""
        if self.trace is not None:
            what = answer.result or f"version {answer.version}"
            self.note(f"{member.name}: {call} is answered: {what}")
        self.progress_s = self.agenda.now
        for hears in self._told["answered"]:
            hears(member, call, answer)
        if isinstance(call.request, m.Register):
            readers, self._readers = self._readers, []
            for program in readers:
                self.join(program, role="observer")

    def published(self, member: Member) -> None:
        """A publication has arrived."""
        self.note(f"{member.name} has all parts of a publication")
        self.progress_s = self.agenda.now

    def wakes(self, member: Member) -> None:
        """Its program goes on."""
        for hears in self._told["wakes"]:
            hears(member)

    def failed(self, member: Member, error: HeadwaterError) -> None:
        """Its program ended with an error: that is right where it was, or will be, declared dead."""
        self.note(f"{member.name} ends with {type(error).__name__}: {error}")
        known = self.coordinator.book.member(member.id) is not None and not member.is_cut_off()
        if known and not self.coordinator.lost:
            raise error

    def processed(self, host: Host, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """An entry was processed."""
        if self.trace is not None:
            self.note(f"{host.name} processes {entry}")
        for hears in self._told["processed"]:
            hears(host, shard, entry)

    def prepared(self, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """What a standby must follow was collected."""
        for hears in self._told["prepared"]:
            hears(shard, resolved)

    def broke_protocol(self, member: int, connection_epoch: int, error: ProtocolError) -> None:
        """A member's connection ended with this: that is right only for one that nobody has any more."""
        sender = self._ids[member]
        if sender.alive and not sender.ended and sender.connection_epoch == connection_epoch:
            raise error

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken."""
        self.snapshots[member, number][snapshot.index] = snapshot
        for hears in self._told["took_snapshot"]:
            hears(member, number, snapshot)

    def _tell(self, event: str) -> None:
        for hears in self._told[event]:
            hears()


_EVENTS = ("processed", "prepared", "sends", "answered", "wakes", "took_snapshot", "happened", "over")


def _who_hears(invariants: list[Invariant], event: str) -> list[Callable[..., None]]:
    """Only those that do something then."""
    return [
        getattr(invariant, event)
        for invariant in invariants
        if getattr(type(invariant), event) is not getattr(Invariant, event)
    ]
