"""A simulated server or standby: the machines of a server node, in a process that can fail."""

from __future__ import annotations

from typing import Any, Protocol

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError
from headwater.machines.actions import Conn
from headwater.machines.enlistment import Enlistment
from headwater.machines.log_host import SequencerMachine
from headwater.machines.log_link import Policy, joined
from headwater.machines.membership import (
    COORDINATOR,
    Ended,
    Heard,
    Joined,
    Membership,
    Returned,
    TraceAsked,
)
from headwater.machines.server import CannotGoOn, ServerMachine, ServerPlan
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.testing.processes import coordinator
from headwater.testing.processes.disk import Disk
from headwater.testing.processes.machine_driver import MachineDriver, Node
from headwater.testing.processes.memory import SharedArrays
from headwater.testing.processes.network import End, Network
from headwater.testing.processes.shard import WatchedShard, Write
from headwater.testing.processes.times import PATIENCE_S, STANDBY_S, START_S
from headwater.testing.processes.trace_recording import ToldEvents
from headwater.testing.timeline import Timeline


class World(Protocol):
    """What a server tells the world."""

    servers: int
    policy: Policy
    shares: bool
    disk: Disk | None

    def timeline_of(self, generation: int, begins: str | None = None) -> Timeline:
        """A generation of the log, which began with this checkpoint."""

    def host_joined(self, host: Host) -> None:
        """It is a member now."""

    def host_parted(self, host: Host, error: HeadwaterError) -> None:
        """It is no member any more, and its process has ended."""

    def processed(self, host: Host, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """An entry was processed here."""

    def prepared(self, host: Host, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """What a standby must follow was collected here."""

    def broke_protocol(self, member: int, connection_epoch: int, error: ProtocolError) -> None:
        """A member's connection ended with this."""

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken."""

    def note(self, text: str) -> None:
        """For the trace."""


class Host(Node):
    """Server or standby `index`.

    Attributes:
        machine: its decisions; sequencer: those of the sequencer beside it, on server 0.
        stops_in_pass: seconds that it will stop in the middle of the next pass over windows, once.
        restore: path of the checkpoint that it began with; "" for none.
        enlistment: by which it got its place, where it came by itself.
        timeline: the generation that it is of.
    """

    def __init__(
        self,
        network: Network,
        world: World,
        name: str,
        index: int,
        role: m.Role,
        restore: str = "",
        enlistment: Enlistment | None = None,
    ) -> None:
        super().__init__(network, name)
        self.index = index
        self.restore = restore
        self.enlistment = enlistment
        self.timeline = world.timeline_of(0)
        self._recorder = ToldEvents(self, self._tell_coordinator)
        self.stops_in_pass: float | None = None
        self._world = world
        self._join = m.Join(role, index, self.pid, "here", (name,))
        plan = ServerPlan(
            index,
            world.servers,
            role,
            replicated=world.policy.replicated,
            patience=PATIENCE_S,
            standby_limit=STANDBY_S,
        )
        reduce = world.policy.sync.reduce
        shard = WatchedShard(index, world.servers, reduce)
        if restore and world.disk is not None:
            shard = WatchedShard.restore(world.disk.restored(restore, index), reduce)
        self.machine = ServerMachine(
            plan,
            self._watched(shard),
            SharedArrays(world.shares, world.disk),
            lambda snapshot: self._watched(WatchedShard.restore(snapshot, reduce)),
        )
        self.sequencer: SequencerMachine | None = None
        beside = None
        if index == 0:
            self.sequencer = SequencerMachine(world.servers, world.policy, patience=PATIENCE_S)
            beside = MachineDriver(self, self.sequencer, join=joined)
        self.driver = MachineDriver(self, self.machine, self.machine, beside, join=joined)

    def _watched(self, shard: WatchedShard) -> WatchedShard:
        """A shard of this server, whose entries the world is told of."""
        shard.watcher = self
        return shard

    @property
    def shard(self) -> WatchedShard:
        """Its shard of now."""
        assert isinstance(self.machine.shard, WatchedShard)
        return self.machine.shard

    @property
    def role(self) -> m.Role:
        """Changes when this standby takes over."""
        return self.machine.role

    @property
    def id(self) -> int:
        """Of its membership; 0 before it has one."""
        return self.machine.id

    # ── its membership ──────────────────────────────────────────────────────────────────────────

    def start(self, over: End | None = None) -> None:
        """Join the coordinator; `over`: the connection over which it got its place."""
        membership = self._membership = Membership(coordinator.NAME, self._join)
        self._line = MachineDriver(self, membership, waits=lambda: membership.phase != "member")
        self._line.do(lambda now: membership.join(now, dial=over is None))
        if over is not None:
            self._line.connect(over, COORDINATOR)

    def _parted(self, error: HeadwaterError) -> None:
        """It is no member any more. One whose join ended with the coordinator joins the next one."""
        if not self.id and isinstance(error, ConnectionLostError) and self.enlistment is None:
            self.after(START_S, self.start)
        else:
            self._world.note(f"{self.name} hears that it has lost its place, and ends: {error}")
            self.exit()
            self._world.host_parted(self, error)

    def accept(self, end: End) -> None:
        """Whoever it is says so first."""
        self.driver.connect(end)

    # ── as its drivers see it ───────────────────────────────────────────────────────────────────

    def tell(self, event: Any) -> None:
        """What the coordinator is to know, what comes of the membership, or that this node cannot go on."""
        if isinstance(event, CannotGoOn):
            raise AssertionError(f"{self.name} ends: {event.why}")
        if isinstance(event, Joined):
            begins = self.restore if self.role == "server" else None
            self.timeline = self._world.timeline_of(event.welcome.generation, begins)
            self._world.host_joined(self)
            self.driver.do(lambda now: self.machine.joined(event.welcome, now))
        elif isinstance(event, TraceAsked):
            self._recorder.obey(event.asked)
        elif isinstance(event, Returned):
            self.driver.do(self.machine.coordinator_returned)
        elif isinstance(event, Ended):
            self._parted(event.error)
        elif not isinstance(event, Heard):
            self._tell_coordinator(event)

    def _tell_coordinator(self, message: m.AnyMessage) -> None:
        self._line.do(lambda now: self._membership.tell(message))

    def note(self, text: str) -> None:
        """For the trace."""
        self._world.note(text)

    def broke_protocol(self, driver: MachineDriver, conn: Conn, error: HeadwaterError) -> None:
        """A connection ends with this; a member's protocol is not broken by one that is what it should be."""
        served = self.machine.served(conn) if driver is self.driver else None
        if served is not None and isinstance(error, ProtocolError):
            self._world.broke_protocol(served.member.id, served.connection_epoch, error)

    def waits(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom, as the sequencer here says."""
        return self.sequencer.reasons().waits if self.sequencer is not None else {}

    # ── as its shard sees it ────────────────────────────────────────────────────────────────────

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken here."""
        self._world.took_snapshot(member, number, snapshot)

    def processed(self, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """The shard has processed this entry."""
        self._world.processed(self, shard, entry)

    def prepared(self, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """The shard has collected what the standby must follow."""
        self._world.prepared(self, shard, resolved)

    def interrupts(self, shard: WatchedShard) -> bool:
        """Whether the pass that begins now is to be interrupted."""
        return self.stops_in_pass is not None

    def interrupted(self, shard: WatchedShard, rest: list[Write]) -> None:
        """Stop here, and write the rest when it goes on."""
        seconds, self.stops_in_pass = self.stops_in_pass, None
        self._world.note(f"{self.name} stops in the middle of a pass over windows")
        self.freeze(seconds or 0.0, rest)
