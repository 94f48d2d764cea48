"""Which versions a follower keeps, which one it shows, and what it asks the servers for next.

Theory of operation. A follower has `pins` + 1 copies of what it follows. Each is in one of these states:

    empty or stale ──begin──▶ filling ──installed──▶ complete ──shown──▶ current ──another is shown──▶ stale
                                 └──failed──▶ empty

One copy at most is filling, and one is current: what a reader pins. A copy that is pinned stays as it is
until its last pin is gone. What is stale and not pinned is filled next, from the version that it has: a
request says which that is, so what comes applies to it and to nothing else. An empty copy is filled from
the current one first, where there is one.

At most `pins` versions are readable. While so many are pinned nothing is filled, and a complete copy is not
shown yet. So a reader that keeps its pins makes its follower older, and disturbs nobody else.

A version is shown once it is complete: all servers' parts are there and of one version, newer than the
current one. After a rewind, versions are of a later generation, and copies of the former one are empty.

Pure: no thread, clock or connection. The caller holds one lock around each method; what fills a copy, and
what reads a pinned one, needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError, named
from headwater.shard.shared_version import SharedCopy
from headwater.shard.version_copy import VersionCopy
from headwater.spec.version import Version

AnyCopy: TypeAlias = VersionCopy | SharedCopy
"""A version in this process's memory, or in that of a follower that has lent it."""


@dataclass(slots=True, eq=False)
class Slot:
    """One copy.

    Attributes:
        version: of `copy`; None while it is of none.
        pins: how many views read it.
        as_of: when the servers last said that this is the newest version, in seconds.
        retired: it is of another kind than what is filled now, and goes when nobody reads it.
    """

    copy: AnyCopy
    version: Version | None = None
    pins: int = 0
    as_of: float = 0.0
    retired: bool = False


class Fill(NamedTuple):
    """Ask for a newer version for `slot`; `source`: the copy that it is to become first."""

    slot: Slot
    source: Slot | None

    def request(
        self, server: int, number: int, dtype: m.ReadType, at: int, *, shared: bool = False
    ) -> m.Publish:
        """What a server is asked, perhaps again, once the slot is what `source` says."""
        self.slot.copy.expect(server)
        models, tables = self.slot.copy.wanted()
        return m.Publish(number, models, tables, dtype, at, shared)

    def begin(self) -> None:
        """Before it is asked: start from `source`. Blocks to copy that; needs no lock."""
        if self.source is not None:
            self.slot.copy.become(self.source.copy)

    def install(self, parts: Sequence[m.Publication]) -> int:
        """All servers' parts have arrived: become what they say, and return the version. Needs no lock.

        Raises:
            ProtocolError: they are not of one version, or do not apply to what is there.
            HeadwaterError: what a server refused it with.
        """
        for part in parts:
            if part.failure is not None:
                raise named(part.failure.error, part.failure.reason, default=RefusedError)
        return self.slot.copy.install(parts)


class FollowerMachine:
    """Keeps at most `pins` versions readable, ≥ 1. `elastic`: has memory for one more whenever all is pinned,
    so nothing holds it up.

    Attributes:
        generation: of the training that is followed.
        current: what readers pin; None before the first version.
        newest: number of the newest version that is known to exist.
        installed: versions shown so far.
    """

    def __init__(self, pins: int, *, elastic: bool = False) -> None:
        self.pins = pins
        self.elastic = elastic
        self.generation = 0
        self.current: Slot | None = None
        self.newest = -1
        self.installed = 0
        self._slots: list[Slot] = []
        self._filling: Slot | None = None
        self._complete: Slot | None = None
        self._make: Callable[[], AnyCopy] | None = None

    # ── the cluster ─────────────────────────────────────────────────────────────────────────────

    def joined(self, generation: int, make: Callable[[], AnyCopy], *, anew: bool = False) -> None:
        """A cluster is followed from now on, perhaps again; `make`: an empty copy of what is followed there.
        `anew`: copies of before are of another kind, and are not filled any more.

        Raises:
            ProtocolError: it is an older generation than was seen.
        """
        if self.current is not None and generation < self.generation:
            raise ProtocolError(f"a cluster of generation {generation} after one of {self.generation}")
        self.failed()
        self._make = make
        if generation == self.generation and self._slots and not anew:
            return
        if generation != self.generation:
            self.newest = -1
        self.generation = generation
        keep = [slot for slot in self._slots if slot.pins or slot is self.current]
        for slot in keep:
            slot.retired = True
        self._complete = None
        free = [Slot(make()) for _ in range(self.pins + 1)]
        self._slots = keep + free

    # ── one publication ─────────────────────────────────────────────────────────────────────────

    @property
    def held_up(self) -> bool:
        """Whether nothing can be filled before a pin is gone."""
        return not self.elastic and (self._complete is not None or self.pinned >= self.pins)

    @property
    def pinned(self) -> int:
        """How many versions readers hold."""
        return sum(1 for slot in self._slots if slot.pins)

    def begin(self) -> Fill | None:
        """What to fill next; None while pins hold it up."""
        assert self._filling is None, "one at a time"
        if self.held_up:
            return None
        of_now = [slot for slot in self._slots if self._may_fill(slot)]
        if not of_now:
            assert self._make is not None
            of_now = [Slot(self._make())]
            self._slots += of_now
        # One that was shown before needs only what has changed since.
        slot = max(of_now, key=lambda one: one.version or Version(-1, -1))
        current = self.current
        source = None
        if slot.version is None and current is not None and self._is_of_now(current):
            source = current
        slot.version = None
        self._filling = slot
        return Fill(slot, source)

    def _is_of_now(self, slot: Slot) -> bool:
        return slot.version is not None and slot.version.generation == self.generation

    def _may_fill(self, slot: Slot) -> bool:
        if slot.pins or slot.retired or slot is self.current or slot is self._complete:
            return False
        return slot.version is None or self._is_of_now(slot)

    def arrived(self, number: int, now: float) -> Version | None:
        """What was to be filled is version `number`, on all servers, and installed.

        Returns the version where it is newer than the current one; it is shown unless pins hold that up.
        """
        slot, self._filling = self._filling, None
        assert slot is not None
        version = Version(self.generation, number)
        self.newest = max(self.newest, number)
        slot.version, slot.as_of = version, now
        current = self.current
        if current is not None and current.version is not None and version <= current.version:
            if version == current.version:
                current.as_of = max(current.as_of, now)
            return None
        self._complete = slot
        self._show()
        return version

    def failed(self) -> None:
        """What was asked for does not come, or not whole: the former versions stay as they are."""
        slot, self._filling = self._filling, None
        if slot is not None:
            slot.version = None
            slot.copy.spoil()

    def heard(self, number: int, now: float) -> None:
        """The servers have said that version `number` of this generation is the newest."""
        self.newest = max(self.newest, number)
        current = self.current
        if current is not None and current.version == Version(self.generation, number):
            current.as_of = max(current.as_of, now)

    # ── readers ─────────────────────────────────────────────────────────────────────────────────

    def _show(self) -> None:
        if self._complete is None or (not self.elastic and self.pinned >= self.pins):
            return
        former, self.current, self._complete = self.current, self._complete, None
        self.installed += 1
        self._let_go(former)

    def _let_go(self, slot: Slot | None) -> None:
        """A slot of a former generation goes once nobody reads it; so does one more than are needed."""
        if slot is None or slot is self.current or slot.pins or slot not in self._slots:
            return
        if slot.retired or (self.elastic and len(self._slots) > self.pins + 1):
            self._slots.remove(slot)

    def give_up(self, slot: Slot) -> None:
        """Others may read this slot's memory for ever: it is not filled again."""
        if slot in self._slots:
            self._slots.remove(slot)

    def readable(self) -> list[int]:
        """Numbers of the versions of this generation that somebody reads or may pin."""
        held = [slot for slot in self._slots if slot.pins or slot in (self.current, self._complete)]
        return [slot.version.number for slot in held if slot.version is not None and self._is_of_now(slot)]

    @property
    def shown(self) -> Version:
        """Of the current copy, which there must be."""
        assert self.current is not None
        assert self.current.version is not None
        return self.current.version

    def pin(self) -> Slot:
        """Have the current version stay as it is until `unpin`."""
        assert self.current is not None, "there is no version yet"
        self.current.pins += 1
        return self.current

    def unpin(self, slot: Slot) -> None:
        """A view of this slot has ended."""
        assert slot.pins > 0
        slot.pins -= 1
        self._let_go(slot)
        self._show()

    def behind(self, version: Version) -> int:
        """How many versions newer than this one are known; all of this generation where it is of a former."""
        if version.generation < self.generation:
            return max(self.newest, 0)
        return max(self.newest - version.number, 0)
