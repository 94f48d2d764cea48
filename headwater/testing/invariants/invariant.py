"""What every invariant is: told what happens in a world, it raises `Violation` at what must not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwater import messages as m
from headwater.shard import Shard
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.testing.processes.client import Call

if TYPE_CHECKING:
    from headwater.testing.processes.host import Host
    from headwater.testing.processes.member import Member
    from headwater.testing.processes.trace_recording import TraceCollector
    from headwater.testing.schedule import Schedule
    from headwater.testing.world import World


class Violation(AssertionError):
    """An invariant did not hold.

    Attributes:
        invariant: its name, or that of an error which nobody expected; `reason`: what was seen.
        schedule: of the run; `run(schedule)` is the same run again.
        trace: what happened when, in virtual seconds, where the run was traced.
        seed: of the random schedule that this one was shrunk from.
    """

    schedule: Schedule | None = None
    trace: tuple[tuple[float, str], ...] = ()
    seed: int | None = None

    def __init__(self, invariant: str, reason: str) -> None:
        super().__init__(invariant, reason)
        self.invariant = invariant
        self.reason = reason

    def __str__(self) -> str:
        found = "" if self.seed is None else f"\n  found with seed={self.seed}, and shrunk"
        again = "" if self.schedule is None else f"\n  the same again: run({self.schedule}, trace=True)"
        return f"{self.invariant}: {self.reason}{found}{again}"


class Invariant:
    """Told what happens in `world`; overrides what it wants to hear. Its docstring says what must hold."""

    def __init__(self, world: World) -> None:
        self.world = world

    def fail(self, reason: str) -> None:
        """It does not hold. Raises Violation."""
        raise Violation(type(self).__name__, reason)

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """A server or standby has processed the next entry."""

    def sends(self, member: Member, call: Call) -> None:
        """A member begins an exchange."""

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """A member has the answer of all servers; what it knew before is still in `member.version`."""

    def wakes(self, member: Member) -> None:
        """A member's program goes on."""

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A server took its part of a checkpoint."""

    def prepared(self, host: Host, shard: Shard, resolved: MaterializedEntry) -> None:
        """A server has collected what its standby must follow."""

    def begins(self, host: Host) -> None:
        """A server has joined, with what it begins with."""

    def read_ahead(self, member: Member, table: int, ids: Sequence[int]) -> None:
        """A member reads rows that came before it asked for them, as of its last answer."""

    def collected(self, collector: TraceCollector, chunk: m.TraceChunk) -> None:
        """A part of a trace is there."""

    def took_checkpoint(self, member: Member, path: str) -> None:
        """A member had one written, and it is on disk."""

    def happened(self) -> None:
        """Something happened, anywhere; called after each."""

    def over(self) -> None:
        """Nothing happens any more."""


def explained(error: BaseException, schedule: Schedule, trace: tuple[tuple[float, str], ...]) -> Violation:
    """The violation that an error in a run of `schedule` is, also one that nobody expected."""
    violation = (
        error if isinstance(error, Violation) else Violation(type(error).__name__, str(error) or repr(error))
    )
    violation.schedule, violation.trace = schedule, trace
    return violation
