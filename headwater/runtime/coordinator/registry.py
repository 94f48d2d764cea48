"""Who is a member now, and over which connection: the roster, the connections and the end, under one lock."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from headwater import messages as m
from headwater.errors import ConnectionLostError, RefusedError, named
from headwater.machines.roster import Departure
from headwater.runtime.coordinator.journaled import JournaledBook
from headwater.runtime.coordinator.places import Reservation, SlotAllocator
from headwater.wire.channel import Channel

LOOK_S = 0.2
"""How often somebody who waits is looked at, who may be gone, in seconds."""


class MemberRegistry:
    """The members of a cluster.

    Attributes:
        changed: guards everything here; notified with every change of the roster.
        ended: what everybody is refused with; None while the cluster goes on.
        closing: whether the coordinator ends.
    """

    def __init__(self, book: JournaledBook) -> None:
        self.changed = threading.Condition()
        self.ended: m.Refused | None = None
        self.closing = threading.Event()
        self._book = book
        self._channels: dict[int, Channel] = {}
        self._waiting: set[Channel] = set()
        self._met: set[tuple[int, str]] = set()

    # ── coming ──────────────────────────────────────────────────────────────────────────────────

    def enter(self, join: m.Join, channel: Channel, *, entered: Callable[[], None]) -> m.Member:
        """Enter a node into the roster; blocks until all servers are there. `entered` is called before that.

        A server that ends meanwhile has lost nothing: its place is free again.

        Raises:
            RefusedError: as `RosterBook.join`.
            ConnectionLostError: it has ended meanwhile, or the coordinator is gone.
        """
        with self.changed:
            if join.role != "server":
                self.wait_for_servers(channel)
            self.check()
            # It sends heartbeats only once it is welcomed, so its lease begins then.
            member = self._book.join(join, math.inf)
            self._channels[member.id] = channel
            self._met.add((member.pid, member.host))
            entered()
            self.changed.notify_all()
            if join.role == "server":
                try:
                    self.wait_for_servers(channel)
                except ConnectionLostError:
                    if self._channels.pop(member.id, None) is not None:
                        self._book.remove(member.id)
                        self._met.discard((member.pid, member.host))
                    raise
            return member

    def wait_for_servers(self, channel: Channel) -> None:
        """Block until there is a server of every index; `channel`: of whoever waits. Raises as `enter`."""
        with self.waiting(channel):
            while not self.changed.wait_for(
                lambda: self._book.complete() or self.ended or self.closing.is_set(), LOOK_S
            ):
                if channel.hung_up():
                    raise ConnectionLostError(f"{channel.peer} has ended while it waited for servers")
            self.check()

    @contextmanager
    def waiting(self, channel: Channel) -> Iterator[None]:
        """Holds `changed`; whoever waits at the other end of `channel` is told when the cluster ends."""
        with self.changed:
            self._waiting.add(channel)
            try:
                yield
            finally:
                self._waiting.discard(channel)

    def check(self) -> None:
        """Raise what whoever comes now is refused with, if anything."""
        if self.closing.is_set() and self.ended is None:
            raise ConnectionLostError("this coordinator is gone")
        if self.ended is not None:
            raise named(self.ended.error, self.ended.reason, default=RefusedError)

    def take_back(self, rejoin: m.Rejoin, channel: Channel) -> m.Member:
        """A member connects again; of two connections of one the later one counts, the other is closed.

        Raises:
            RefusedError, RewoundError: as `RosterBook.take_back`.
        """
        with self.changed:
            self.check()
            member = self._book.take_back(rejoin.member, rejoin.generation, time.monotonic())
            former = self._channels.get(member.id)
            self._channels[member.id] = channel
            self.changed.notify_all()
        if former is not None:
            former.close()
        return member

    def heard(self, member: m.Member) -> None:
        """It showed that it lives."""
        with self.changed:
            self._book.heard(member.id, time.monotonic())

    # ── going ───────────────────────────────────────────────────────────────────────────────────

    def remove(
        self, member: m.Member, verdict: str, through: Channel | None
    ) -> tuple[Departure, Channel | None] | None:
        """It is no member any more; `verdict` says why it was declared dead, "" where it left.

        `through`: nor is this so where it has another connection than that. Returns its connection too; None
        where nothing follows from it.
        """
        with self.changed:
            replaced = through is not None and self._channels.get(member.id, through) is not through
            if replaced or self.closing.is_set():
                return None
            channel = self._channels.pop(member.id, None)
            departure = self._book.remove(member.id, verdict)
            self.changed.notify_all()
            return None if departure is None or self.ended is not None else (departure, channel)

    def finish(self, member: m.Member) -> None:
        """A worker has done its work."""
        with self.changed:
            self._book.finish(member.id)

    def begin_anew(self) -> list[Channel]:
        """The next generation begins, without anybody; returns the connections of those of before."""
        with self.changed:
            self._book.begin_anew()
            channels, self._channels = list(self._channels.values()), {}
            self.changed.notify_all()
            return channels

    def end(self, refusal: m.Refused) -> list[Channel] | None:
        """Refuse everybody from now on; returns the connections of all who are to be told, None where it has
        ended before."""
        with self.changed:
            if self.ended is not None or self.closing.is_set():
                return None
            self.ended = refusal
            channels, self._channels = list({*self._channels.values(), *self._waiting}), {}
            self._book.end(refusal)
            self.changed.notify_all()
            return channels

    def close(self) -> None:
        """The coordinator ends; idempotent."""
        with self.changed:
            self.closing.set()
            self.changed.notify_all()

    # ── views ───────────────────────────────────────────────────────────────────────────────────

    def __contains__(self, member: m.Member) -> bool:
        with self.changed:
            return member.id in self._channels

    def view(self) -> m.Roster:
        """What every server is told."""
        with self.changed:
            return self._book.view()

    def of(self, role: m.Role) -> Sequence[m.Member]:
        """The members of one role, by index."""
        with self.changed:
            return self._book.of(role)

    def has_met(self, process: tuple[int, str]) -> bool:
        """Whether that process is or was a member; not one that ended before all servers were there."""
        with self.changed:
            return process in self._met

    def complete(self) -> bool:
        """Whether there is a server of every index."""
        with self.changed:
            return self._book.complete()

    def finished(self) -> bool:
        """Whether every declared worker has done its work, and the cluster has not ended yet."""
        with self.changed:
            return self._book.all_finished() and self.ended is None

    def free(self, enlist: m.RequestSlot, places: SlotAllocator) -> Reservation | None:
        """A place that whoever enlists can have now.

        A server's only while the generation forms: later, a lost one takes its shard along, and what is to
        become of that is decided first.
        """
        with self.changed:
            self.check()
            return places.promise(enlist, self._book.view().members, forming=self._book.forming)

    def beginning(self) -> tuple[int, bool, int]:
        """The generation, whether training may have begun before, in this one or another, and the first."""
        with self.changed:
            return self._book.generation, self._book.begun, self._book.first

    def absent(self) -> set[int]:
        """Members that have not come back since this coordinator was started on its journal."""
        with self.changed:
            return {member.id for member in self._book.view().members} - self._channels.keys()

    def wait_for_absent(self, seconds: float) -> None:
        """Block until there are none but observers, perhaps of the one before, or the coordinator ends."""

        def nobody() -> bool:
            absent = self.absent()
            return not any(one.id in absent and one.role != "observer" for one in self._book.view().members)

        with self.changed:
            self.changed.wait_for(lambda: nobody() or self.closing.is_set(), seconds)

    def silence(self) -> dict[int, float]:
        """Seconds since each member was heard of."""
        now = time.monotonic()
        with self.changed:
            return {one.id: self._book.silence(one.id, now) for one in self._book.view().members}

    def expired(self) -> list[m.Member]:
        """Those whose lease has ended."""
        with self.changed:
            return self._book.expired(time.monotonic())

    def caught_up(self, standby: int) -> bool:
        """Note that a standby has all that its server has; False where that is no news."""
        with self.changed:
            return self._book.caught_up(standby)

    def unreplicated(self) -> list[int]:
        """Indices of servers without a caught-up standby."""
        with self.changed:
            return self._book.unreplicated()
