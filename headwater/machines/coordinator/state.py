"""What all parts of the coordinator share: the roster, the connections, the stage, and what the driver is
to do.

Invariant: whatever could show a change of the roster is asked for after the `Persist` of that change.
`emit` is the only way to ask for anything, and sees to it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from headwater.errors import HeadwaterError
from headwater.machines.actions import Action, Actions, Close, Conn, Note, Persist, Send
from headwater.machines.coordinator.identity import Identity
from headwater.machines.coordinator.phases import Invited, Joining, Phase
from headwater.machines.own_time import OwnTime
from headwater.machines.roster import RosterBook, RosterRecord
from headwater.machines.slots import SlotAllocator
from headwater.messages import AnyMessage, Finished, Member, Refused
from headwater.spec.cluster import ClusterConfig

Stage: TypeAlias = Literal["forming", "running", "finishing", "ended"]


class CoordinatorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a coordinator outlives its process. `ended`: why nothing is to be gone on with, if so."""

    roster: RosterRecord
    ended: str = ""


class State:
    """Of one coordinator.

    Attributes:
        book: the roster; stage: of the cluster; begun: whether training may have begun, in any generation.
        own: the coordinator's own time.
        phases: of every connection that was not hung up; conns: of every member that is here, by its id.
        met: process and host of every member so far, but for servers that ended before all were there.
        last_word: what everybody is told once the cluster has ended.
    """

    def __init__(
        self,
        settings: ClusterConfig,
        identity: Identity,
        now: float,
        record: CoordinatorRecord | None,
        generation: int,
    ) -> None:
        self.settings, self.identity = settings, identity
        self.own = OwnTime(settings.lease / 4, now)
        self.book = RosterBook(
            settings.workers,
            settings.servers,
            lease_s=settings.lease,
            generation=generation,
            record=record.roster if record is not None else None,
            cluster=identity.cluster,
        )
        self.begun = record is not None
        self.stage: Stage = "running" if self.book.view().members else "forming"
        self.slots = SlotAllocator(settings.servers, settings.replicas)
        self.phases: dict[Conn, Phase] = {}
        self.conns: dict[int, Conn] = {}
        self.met: set[tuple[int, str]] = set()
        self.last_word: Refused | Finished = Finished()
        self._out: Actions = []
        self._kept = 0

    @property
    def now(self) -> float:
        """The coordinator's own time, in seconds."""
        return self.own.now

    def phase_of(self, member: int) -> Phase | None:
        """The phase of the connection that counts as this member's."""
        return self.phases.get(self.conns.get(member, 0))

    def away(self) -> list[Member]:
        """Members that have not come back to this coordinator; observers may be of the one before."""
        members = self.book.view().members
        return [one for one in members if one.id not in self.conns and one.role != "observer"]

    # ── what the driver is to do ────────────────────────────────────────────────────────────────

    def emit(self, action: Action) -> None:
        """Ask for this. What it may depend on is persisted before."""
        self.keep()
        self._out.append(action)

    def send(self, conn: Conn, message: AnyMessage) -> None:
        """Send this over a connection."""
        self.emit(Send(conn, message))

    def refuse(self, conn: Conn, error: HeadwaterError) -> None:
        """Say why not, as the last thing."""
        self.send(conn, Refused(type(error).__name__, str(error)))
        self.hang_up(conn)

    def say_last(self, conn: Conn) -> None:
        """Say that the cluster has ended."""
        self.send(conn, self.last_word)
        self.hang_up(conn)

    def hang_up(self, conn: Conn) -> None:
        """Nothing that comes over this connection counts any more."""
        self.forget(conn)
        self.emit(Close(conn))

    def forget(self, conn: Conn) -> Phase | None:
        """This connection has ended, or is ended; a slot that was kept for its node is free."""
        phase = self.phases.pop(conn, None)
        if isinstance(phase, Invited | Joining) and phase.slot is not None:
            self.slots.release(phase.slot)
        return phase

    def note(self, text: str) -> None:
        """For the log."""
        self.emit(Note(text))

    def warn(self, text: str) -> None:
        """For the log, where it should be seen."""
        self.emit(Note(text, "warning"))

    def keep(self) -> None:
        """Persist the roster if it has changed. Until all servers are there nobody has been welcomed, so a
        coordinator that dies before begins with nobody, as do the nodes that waited for it."""
        if self.book.changes != self._kept and self.stage in ("running", "finishing"):
            self._kept = self.book.changes
            self._out.append(Persist(CoordinatorRecord(self.book.record())))

    def keep_end(self, why: str) -> None:
        """Persist that nothing is to be gone on with."""
        self._out.append(Persist(CoordinatorRecord(self.book.record(), why)))

    def taken(self) -> Actions:
        """What was asked for since the last call."""
        self.keep()
        out, self._out = self._out, []
        return out
