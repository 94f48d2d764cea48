"""What a person sees of a cluster."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message, Role
from headwater.messages.observed import CheckpointCounts, MemberCounts, Traffic, WorkerTotals
from headwater.messages.reading import DataProgress, Unvisited
from headwater.messages.roster import Progress


class Ask(Message, frozen=True):
    """Ask the coordinator or a server for its statistics."""


class ModelStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one server.

    Attributes:
        name: of the model.
        rule: its rule, as text.
        tensors: how many it has.
        elements: of all tensors together.
        updates: that were applied to it.
        resident: bytes that it takes in this server's memory.
    """

    name: str
    rule: str
    tensors: int
    elements: int
    updates: int
    resident: int


class TableStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table on one server, since it exists.

    `rows`: that exist now, expired ones that were not swept yet included. `resident`: bytes. `refused`: ids
    whose gradient admission dropped; `expired`: rows that expiry ended; `pulled`: ids that were pulled,
    `hits` of them had a row. `begun`: rows that came into being
    with a gradient that admission let in.
    """

    name: str
    dim: int
    rule: str
    rows: int
    resident: int
    updates: int
    refused: int
    expired: int
    pulled: int
    hits: int
    begun: int = 0

    @property
    def hit_ratio(self) -> float:
        """Share of pulled ids that had a row; 1 before the first pull."""
        return self.hits / self.pulled if self.pulled else 1.0


class ServerStatistics(Message, frozen=True):
    """One server or standby. `waits` maps a member to whom its exchange waits for (server 0 only).

    `recorded`: where every rank is in its data, as of `position`. `traffic`: what the node has sent and
    received. `enrolled`: the workers that may still take steps after `position`, by id.
    """

    member: int
    role: Role
    index: int
    version: int
    position: int
    term: int
    exchanges: int
    models: tuple[ModelStatistics, ...]
    tables: tuple[TableStatistics, ...]
    waits: dict[int, str]
    recorded: DataProgress = DataProgress()
    traffic: Traffic = Traffic()
    enrolled: tuple[int, ...] = ()


class NodeStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One node in the coordinator's answer; exactly one of `index` and `rank` is set.

    `silence`: seconds since the coordinator heard of it; members say that they live three times a lease.
    """

    role: str
    pid: int
    address: str
    term: int
    version: int
    waits_for: str | None
    index: int | msgspec.UnsetType = msgspec.UNSET
    rank: int | msgspec.UnsetType = msgspec.UNSET
    silence: float = 0.0


class FollowerProgress(Message, frozen=True):
    """From a follower to the coordinator, now and then: what it shows.

    Attributes:
        member: its number.
        version: what its readers see.
        age: seconds since it was known that this is the newest version.
        installed: versions that it has shown.
        received: bytes of parameters and rows.
        reason: why it is not up to date, in words; "" while it is.
    """

    member: int
    version: int
    age: float
    installed: int
    received: int
    reason: str = ""


class ClusterStatistics(Message, frozen=True):
    """The coordinator's answer to Ask: the state of a cluster at one moment.

    Attributes:
        term: number of the roster's last change.
        generation: counts the times that training began anew from a checkpoint.
        version: the number of commits.
        workers: how many were declared.
        sync: the mode, as text.
        nodes: the coordinator and every member.
        models: each model, as server 0 has it.
        tables: each table, in all over the servers.
        progress: what each rank told last, also after it left.
        unreplicated: indices of servers that should have a caught-up standby and have none.
        unvisited: samples that a worker left, and nobody took over.
        spares: how many nodes wait to become a server or standby.
        servers: how many were declared.
        finished: ranks that have done all their work.
        joining: each node that waits to join, and whom it waits for, in words.
        reports: what each server and standby said of itself, without what is elsewhere in this.
        totals: what each rank has done over all its incarnations.
        members: who came, died and was taken over from.
        checkpoints: that were written.
        traffic: what the coordinator's process has sent and received.
        uptime: seconds since the coordinator's process began.
        followers: that are there, with the age that what they show has by now.
    """

    term: int
    generation: int
    version: int
    workers: int
    sync: str
    nodes: tuple[NodeStatistics, ...]
    models: tuple[ModelStatistics, ...]
    tables: tuple[TableStatistics, ...]
    progress: tuple[Progress, ...]
    unreplicated: tuple[int, ...] = ()
    unvisited: tuple[Unvisited, ...] = ()
    spares: int = 0
    servers: int = 1
    finished: tuple[int, ...] = ()
    joining: tuple[str, ...] = ()
    reports: tuple[ServerStatistics, ...] = ()
    totals: tuple[WorkerTotals, ...] = ()
    members: MemberCounts = MemberCounts()
    checkpoints: CheckpointCounts = CheckpointCounts()
    traffic: Traffic = Traffic()
    uptime: float = 0.0
    followers: tuple[FollowerProgress, ...] = ()


StatisticsMessage: TypeAlias = Ask | ServerStatistics | ClusterStatistics | FollowerProgress
"""What is said of statistics."""
