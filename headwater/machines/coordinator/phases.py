"""The phases of a connection to the coordinator, and the waits of nodes that are not members yet."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TypeAlias

from headwater.machines.slots import Reservation
from headwater.messages import Join, Member, Position, RequestSlot, ServerStatistics


@dataclass(slots=True)
class Wait:
    """A node waits to become a member. Times are the coordinator's own, in seconds.

    `since`: it came; `report`: when the wait is next worth a line in the log; `reason`: what it was told
    last.
    """

    since: float
    report: float
    reason: str = ""


@dataclass(slots=True)
class Stranger:
    """It has said nothing yet, and has until then."""

    until: float


@dataclass(slots=True)
class Survey:
    """It asked for statistics, and has them once these hosts have answered, or when their time is over.

    `ranks`: of the workers that were there when it asked.
    """

    unanswered: int
    ranks: Set[int]
    reports: list[ServerStatistics] = field(default_factory=list)


@dataclass(slots=True)
class Collecting:
    """It collects a trace.

    `until`: of the recording, and once that is `ending` of members' last words; `over`: it has been told the
    end, and closes. `unread`: chunks that it has not acknowledged; `dropped`: events that there was no room
    for since the last chunk.
    """

    until: float
    ending: bool = False
    over: bool = False
    unread: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Asking:
    """It asked for a checkpoint, and hears once that is written or cannot be. It says how long it waits."""


@dataclass(slots=True)
class Spare:
    """It waits for a slot, for as long as it likes."""

    request: RequestSlot


@dataclass(slots=True)
class Invited:
    """A slot is kept for it. `until`: it must have joined; None until it was told what it is to be."""

    slot: Reservation
    until: float | None = None


@dataclass(slots=True)
class Joining:
    """It wants to be a member. `reached`: others can connect to it."""

    join: Join
    wait: Wait
    slot: Reservation | None = None
    reached: bool = False


@dataclass(slots=True)
class Entered:
    """The roster of this term was the first to have it, and it was not welcomed yet.

    `known`: every server that answers knows that roster. `placed`: it is known where the log recorded its
    rank, which is at `position`.
    """

    member: Member
    wait: Wait
    term: int
    placed: bool
    known: bool = False
    position: Position | None = None


@dataclass(slots=True)
class Present:
    """A member that was welcomed."""

    member: Member


Phase: TypeAlias = Stranger | Survey | Collecting | Asking | Spare | Invited | Joining | Entered | Present


def servers_missing(missing: list[int], servers: int) -> str:
    """Whom a join waits for while the cluster forms."""
    names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    noun = "server" if len(missing) == 1 else "servers"
    return f"waits for {noun} {names}: {servers - len(missing)} of {servers} have joined"


def named(member: Member) -> str:
    """For logs and reasons."""
    return f"{member.role} {member.index} (pid {member.pid})"


def who(phase: Joining | Entered) -> str:
    """Who waits, for logs and status."""
    if isinstance(phase, Entered):
        return named(phase.member)
    join = phase.join
    index = "" if join.index is None or join.role == "observer" else f" {join.index}"
    return f"{join.role}{index} (pid {join.pid} on {join.host})"
