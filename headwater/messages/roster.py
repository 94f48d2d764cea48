"""Members and their coordinator: who is one, joining and leaving, where everybody is."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message, Role, ServerRole
from headwater.messages.observed import Histogram, LoggedPoint, Nanoseconds, TurnBlock
from headwater.messages.publication import ReadType
from headwater.messages.reading import Position


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One incarnation of a node. `index` is that of a server or standby, a worker's rank, or -1.

    `addresses`: where it listens, the nearest first. `machine`: equal where Unix sockets connect.
    """

    id: int
    role: Role
    index: int
    pid: int
    host: str
    addresses: tuple[str, ...] = ()
    machine: str = ""


class RequestSlot(Message, frozen=True):
    """A node that holds nothing yet asks the coordinator which server or standby is missing.

    `role` and `index` None: whichever. `cluster`: of which this node was a member before; "" for none.
    """

    role: ServerRole | None
    index: int | None
    cluster: str = ""


class NoSlot(Message, frozen=True):
    """Not an answer to RequestSlot yet: no such slot is free, as `reason` says. An Assignment follows."""

    reason: str


class Assignment(Message, frozen=True):
    """What a server or standby is to be: what an engine starts it with, and the answer to RequestSlot, whose
    slot is kept for the Join that follows on this connection.

    `index`: which of the `servers` equal ranges it holds. `replicas`: of every server. `min_workers`: with
    fewer nothing is committed. `patience`: seconds after which it reports a wait. `restore`: path of the
    checkpoint that a server begins with, "" for none. `cluster`: what the node is of, once it is told.
    """

    index: int
    servers: int
    sync: str
    role: ServerRole = "server"
    replicas: int = 0
    min_workers: int = 1
    patience: float = 10.0
    restore: str = ""
    cluster: str = ""


class Join(Message, frozen=True):
    """A node asks the coordinator to become a member; `index` None takes the next free one.

    `cluster`: of which this node was a member before; "" for none.
    """

    role: Role
    index: int | None
    pid: int
    host: str
    addresses: tuple[str, ...] = ()
    machine: str = ""
    cluster: str = ""


class JoinWaits(Message, frozen=True):
    """Not an answer to Join yet, and whom the coordinator waits for before it can take this node in.

    The coordinator sends it at once when a Join has to wait, and again when `reason` changes. `patience`
    and `deadline`: of the cluster, in seconds; a join that has waited for `deadline` is refused.
    """

    reason: str
    patience: float
    deadline: float


class Welcome(Message, frozen=True):
    """The coordinator's answer to Join, once every server knows the new member, and to Rejoin.

    `settings`: the user's own, as `spec.user_settings` packs them. `position`: what the log last recorded of
    this rank's reading; None where it recorded nothing, and after Rejoin. `key`: what this member must show
    to Rejoin. `returns`: whether a coordinator that is gone may come back, on its journal. `cluster`: the
    identity of this cluster, which its coordinator drew at random. `keeps`: who welcomes is a follower, to
    whom others come to read; it has parameters in this type and is the one server there.
    """

    member: Member
    term: int
    servers: tuple[Member, ...]
    workers: int
    sync: str
    settings: bytes
    patience: float
    deadline: float
    heartbeat: float = 5.0
    generation: int = 0
    position: Position | None = None
    key: str = ""
    returns: bool = False
    cluster: str = ""
    keeps: ReadType | None = None


class Rejoin(Message, frozen=True):
    """A member comes back to a coordinator that was gone, or that it lost the connection to.

    `key`, `generation` and `cluster` as it was welcomed with.
    """

    member: int
    key: str
    generation: int
    cluster: str = ""


class Roster(Message, frozen=True):
    """Who is a member in this term; from the coordinator to every server and standby.

    `since`: the term in which the servers became those of now, and their sequencer began. `caught_up`: ids
    of standbys that have all that their servers have. `generation` counts the times that everything began
    anew from a checkpoint.
    """

    term: int
    workers: int
    members: tuple[Member, ...]
    since: int = 0
    caught_up: tuple[int, ...] = ()
    generation: int = 0
    cluster: str = ""


class Heartbeat(Message, frozen=True):
    """From a member to the coordinator, now and then: it lives."""


class GetServers(Message, frozen=True):
    """From a member that lost a connection to the coordinator: where are the servers now?"""


class ServerAddresses(Message, frozen=True):
    """The answer to GetServers; `servers` by index, fewer than all while one has nobody to take over."""

    term: int
    servers: tuple[Member, ...]


class CaughtUp(Message, frozen=True):
    """From a server to the coordinator: this standby has all that it has, and will from now on."""

    standby: int


class StandbyLost(Message, frozen=True):
    """From a server to the coordinator: it lost the connection to this standby."""

    standby: int


class Progress(Message, frozen=True):
    """A worker's own statistics, as it last told the coordinator.

    Attributes:
        member: the incarnation of this rank that told them.
        rank: which worker it is.
        steps: that it has finished.
        version: of its last answer, in commits.
        samples: that its `batches` have handed out.
        planned: samples that the `batches` begun so far have for it, 0 where there were none; an estimate
            while it reads dynamic splits: its share so far of all that there is.
        waiting: seconds spent in exchanges with the servers.
        elapsed: seconds since it joined.
        staleness: commits between the version that a gradient was computed on and its own → number of steps.
        metrics: what `Worker.log` was last told, by name.
        results: finished steps by what became of them: "applied", "late", "carried", "skipped".
        stages: seconds that a turn took, by stage: data, compute, push, wait, pull.
        norms: gradient norm of the last commit by model, where the servers measure it.
        dropped: names of metrics that `log` was told and that are not kept, since there are too many.
        turns: stages of the turns since the report before.
        clock: the worker's monotonic clock as it sent this.
        points: what `log` was told since the report before; of very many, every second one.
    """

    member: int
    rank: int
    steps: int
    version: int
    samples: int
    planned: int
    waiting: float
    elapsed: float
    staleness: dict[int, int]
    metrics: dict[str, float]
    results: dict[str, int] = msgspec.field(default_factory=dict)
    stages: dict[str, Histogram] = msgspec.field(default_factory=dict)
    norms: dict[str, float] = msgspec.field(default_factory=dict)
    dropped: int = 0
    turns: tuple[TurnBlock, ...] = ()
    clock: Nanoseconds = 0
    points: tuple[LoggedPoint, ...] = ()


class Departed(Message, frozen=True):
    """A member has left the log and will close; its connection's end is not a death.

    `finished`: a worker did all that it was to do, so nobody need take its place.
    """

    member: int
    finished: bool = True


class Finished(Message, frozen=True):
    """Nothing is left to do.

    From a worker: it has left the log, having done all that it was to do. It stays a member until all others
    have, since a rewind would need it again. From the coordinator, as the last that a member or a newcomer
    hears: training has finished.
    """

    member: int = 0


class EndCluster(Message, frozen=True):
    """Somebody asks the coordinator to end the whole cluster in order; `by`: who, in words for its log."""

    by: str


class TakeCheckpoint(Message, frozen=True):
    """Somebody asks the coordinator for a checkpoint of now; `by`: who, in words for its log.

    The answer is CheckpointTaken, or Refused.
    """

    by: str


class CheckpointTaken(Message, frozen=True):
    """A checkpoint of now is on disk, at `path`."""

    path: str


ToCoordinator: TypeAlias = (
    RequestSlot
    | Join
    | Rejoin
    | Heartbeat
    | GetServers
    | CaughtUp
    | StandbyLost
    | Progress
    | Departed
    | Finished
    | EndCluster
    | TakeCheckpoint
)
"""What a node says on its connection to the coordinator."""

FromCoordinator: TypeAlias = (
    NoSlot | Assignment | JoinWaits | Welcome | Roster | ServerAddresses | Finished | CheckpointTaken
)
"""What the coordinator says on a node's connection."""
