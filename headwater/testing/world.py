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
from headwater.machines.coordinator import ChooseCheckpoint, CoordinatorRecord
from headwater.machines.log_link import Policy
from headwater.machines.roster import Departure
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.spec.cluster import ClusterConfig
from headwater.spec.sync import Mode, parse_sync
from headwater.testing.faults import Fault
from headwater.testing.following import Following
from headwater.testing.generations import Generations
from headwater.testing.invariants import ALWAYS, COUNTED, ENLISTED, FOLLOWED, REWOUND, TRACED, Invariant
from headwater.testing.processes.agenda import Agenda
from headwater.testing.processes.client import Call, Program
from headwater.testing.processes.coordinator import Coordinator
from headwater.testing.processes.disk import DIRECTORY
from headwater.testing.processes.host import Host
from headwater.testing.processes.machine_driver import Later
from headwater.testing.processes.member import Member
from headwater.testing.processes.network import SPEEDS_S, Network, Process
from headwater.testing.processes.recruit import Recruit
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
from headwater.testing.processes.trace_recording import TraceCollector
from headwater.testing.replacements import Replacements
from headwater.testing.timeline import Timeline
from headwater.testing.workload import Workload


class World:
    """`workers` declared workers and `servers` servers, with a standby each where `replicas` is 1.

    Args:
        sync: a mode, as text or as an object.
        shares: whether members share windows with servers, or send values as payload.
        beats: whether processes send heartbeats; needed only where they are stopped or parted.
        restarts: the program of a worker that died is run again with this, in a new process of the same rank.
        readers, followers: join, each for itself, when the first model is there.
        spares: so many nodes more than are needed. rewinds: so many commits lie between two checkpoints, with
            the last of which everything begins anew when a shard is lost with all its copies; 0: nothing
            does. With either, servers come by themselves, and ask what they are to be.
        traces: for how long each of those collects a trace who do.
        workload: what the members do; what holds of it is checked besides, and `invariants`.

    Attributes:
        generations: of the log; disk: has the checkpoints that lie between them, if there are any.
        replacements: starts all processes. collectors: of traces.
        members, hosts: all workers and readers, and all servers and standbys, there ever were.
        coordinator: the one of now; coordinators: how many there were.
        progress_s: when somebody was started, joined, was answered or died last.
        faults: that were done to it.
        snapshots: by member and exchange, what each server took for a checkpoint.
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
        spares: int = 0,
        rewinds: int = 0,
        traces: Sequence[float] = (),
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
        self.generations = Generations(self, workload, servers, rewinds)
        self.disk = self.generations.disk
        self.replacements = Replacements(self, bool(spares or rewinds), restarts)
        self.members: list[Member] = []
        self.hosts: list[Host] = []
        self.faults: list[Fault] = []
        self.snapshots: dict[tuple[int, int], dict[int, ShardSnapshot]] = defaultdict(dict)
        self.progress_s = 0.0
        self.followers = followers
        self._readers = [*readers, *(follower.program for follower in followers)]
        self.trace: list[tuple[float, str]] | None = [] if trace else None
        self.agenda = Agenda()
        self.network = Network(self.agenda, seed, speeds)
        self.random = random.Random(f"{seed} world")
        self._thinks_s, self._beats = thinks_s, beats
        self._ids: dict[int, Member] = {}
        self._names: dict[str, int] = defaultdict(int)
        kinds = (*ALWAYS, *(COUNTED if workload is not None else ()), *(FOLLOWED if followers else ()))
        kinds += (*(ENLISTED if spares or rewinds else ()), *(REWOUND if rewinds else ()))
        kinds += TRACED if traces else ()
        self.collectors = [TraceCollector(self.network, self, self.name("collector"), one) for one in traces]
        for number, collector in enumerate(self.collectors, 1):
            self.agenda.at(0.02 * number, collector.start)
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
            checkpoint=DIRECTORY if rewinds else "",
        )
        self.coordinator = self._coordinator(None)
        self.coordinators = 1
        self.replacements.start_hosts(servers, replicas, spares)
        self.generations.take()

    def _coordinator(self, record: CoordinatorRecord | None) -> Coordinator:
        return Coordinator(self.network, self, self._settings, record, self.replacements.enlists)

    # ── who is there ────────────────────────────────────────────────────────────────────────────

    def join(
        self,
        program: Program,
        role: m.Role = "worker",
        rank: int | None = None,
        *,
        waited_for: bool = True,
        named: str = "reader",
    ) -> Member:
        """A new member, which runs `program`; without a rank it is the next of the declared workers'."""
        if role == "worker" and rank is None:
            ranks = {member.wanted for member in self.members if member.role == "worker"}
            rank = next((rank for rank in range(self.workers) if rank not in ranks), None)
        name = self.name(f"worker {'?' if rank is None else rank}" if role == "worker" else named)
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
            waited_for=waited_for,
        )
        self.members.append(member)
        self.progress_s = self.agenda.now
        self.launch(member)
        return member

    def launch(self, process: Member | Host | Recruit) -> None:
        """It is under way; how long that takes nobody knows."""
        chance = random.Random(f"{self.seed} {process.name} start")
        process.after(chance.expovariate(1.0 / BEGIN_S), process.start)

    def name(self, name: str) -> str:
        """The second process in one place is called b, the third c."""
        self._names[name] += 1
        again = self._names[name] - 1
        return name + ("" if not again else chr(ord("a") + again) if again < 26 else f" no. {again + 1}")

    @property
    def log(self) -> list[m.AnyEntry]:
        """Every entry that was processed in this generation."""
        return self.generations.now.log

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
        if self.disk is not None and not (self.coordinator.machine.complete and self._all_serve()):
            return quiet > QUIET_S
        if any(collector.alive for collector in self.collectors):
            return quiet > QUIET_S
        return quiet > QUIET_S or not (self.replacements.starting or any(map(self._is_missed, self.members)))

    def _all_serve(self) -> bool:
        return all(host.alive for host in self.serving)

    def _is_missed(self, member: Member) -> bool:
        """Whether something follows of it: it goes on, or its death has not been noticed."""
        if not member.waited_for:
            return False
        if member.alive and not member.ended:
            return True
        return member.dead and self.coordinator.book.member(member.id) is not None

    def step(self) -> bool:
        """Let one thing happen; False where nothing will ever happen."""
        if not self.agenda.step():
            return False
        if self.generations.begins_anew():
            self.progress_s = self.agenda.now
            self.replacements.begin_anew()
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
        else:
            self.replacements.killed(process)

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
        self.coordinator = self._coordinator(self.coordinator.record)

    def departed(self, departure: Departure) -> None:
        """A member ended without leaving: an engine starts another in its place."""
        member = departure.member
        self.note(f"{member.role} {member.index} (member {member.id}) is struck off")
        self.replacements.departed(departure)

    def chosen(self, task: ChooseCheckpoint) -> str:
        """With which checkpoint a generation begins."""
        return self.generations.chosen(task)

    def write_checkpoint(self) -> Later:
        """Somebody wants a checkpoint of now."""
        return self.generations.write()

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
            member.timeline.declared = True
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

    def read_ahead(self, member: Member, table: int, ids: Sequence[int]) -> None:
        """It reads rows that came ahead."""
        self.note(f"{member.name} reads rows {ids} that came ahead")
        for hears in self._told["read_ahead"]:
            hears(member, table, ids)

    def collected(self, collector: TraceCollector, chunk: m.TraceChunk) -> None:
        """A part of a trace is there."""
        for hears in self._told["collected"]:
            hears(collector, chunk)

    def took_checkpoint(self, member: Member, path: str) -> None:
        """It had one written."""
        self.note(f"{member.name} is told of {path}")
        for hears in self._told["took_checkpoint"]:
            hears(member, path)

    def failed(self, member: Member, error: HeadwaterError) -> None:
        """Its program ended with an error: that is right where it was, or will be, declared dead."""
        self.note(f"{member.name} ends with {type(error).__name__}: {error}")
        known = self.coordinator.book.member(member.id) is not None and not member.is_cut_off()
        if known and not self.coordinator.lost:
            raise error
        if self.generations.failed(member, error):
            self.agenda.at(self.agenda.now + START_S, self.generations.take)
        elif not self.coordinator.lost:
            self.replacements.ended(member)

    def timeline_of(self, generation: int, begins: str | None = None) -> Timeline:
        """A generation of the log."""
        return self.generations.of(generation, begins)

    def host_joined(self, host: Host) -> None:
        """A server or standby is a member."""
        if host.role == "server":
            host.timeline.declared |= bool(host.shard.vectors)
            for hears in self._told["begins"]:
                hears(host)

    def host_parted(self, host: Host, error: HeadwaterError) -> None:
        """It has lost its place."""
        self.replacements.parted(host, error)

    def processed(self, host: Host, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """An entry was processed."""
        if self.trace is not None:
            self.note(f"{host.name} processes {entry}")
        for hears in self._told["processed"]:
            hears(host, shard, entry)

    def prepared(self, host: Host, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """What a standby must follow was collected."""
        for hears in self._told["prepared"]:
            hears(host, shard, resolved)

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


_EVENTS = (
    *("processed", "prepared", "sends", "answered", "wakes", "took_snapshot"),
    *("collected", "read_ahead", "took_checkpoint", "begins", "happened", "over"),
)


def _who_hears(invariants: list[Invariant], event: str) -> list[Callable[..., None]]:
    """Only those that do something then."""
    return [
        getattr(invariant, event)
        for invariant in invariants
        if getattr(type(invariant), event) is not getattr(Invariant, event)
    ]
