"""A shard that tells of every entry it processes, and that can be stopped in the middle of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.shard import Shard
from headwater.shard.replica import MaterializedEntry, Room, own_memory
from headwater.shard.snapshot import ShardSnapshot
from headwater.shard.state import Answers
from headwater.shard.tables import StagedRows
from headwater.spec.sync import Reduce

Floats: TypeAlias = NDArray[np.float32]
Done = TypeVar("Done")

Write = Callable[[], None]
"""The rest of a pass: what a stopped process writes first when it goes on."""


class Watcher(Protocol):
    """Whoever is told."""

    def processed(self, shard: WatchedShard, entry: m.AnyEntry) -> None:
        """`shard` has processed this entry."""

    def prepared(self, shard: WatchedShard, resolved: MaterializedEntry) -> None:
        """`shard` has collected what its standby must follow."""

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A member's exchange asked for `snapshot`."""

    def interrupts(self, shard: WatchedShard) -> bool:
        """Whether the pass that begins now is to be interrupted."""

    def interrupted(self, shard: WatchedShard, rest: list[Write]) -> None:
        """It was, and this is what remains."""


class WatchedShard(Shard):
    """The real shard; `watcher` None: nobody is told."""

    watcher: Watcher | None = None

    def prepare(self, entry: m.AnyEntry, room: Room = own_memory) -> MaterializedEntry | None:
        """As a shard does."""
        resolved = super().prepare(entry, room)
        if resolved is not None and self.watcher is not None:
            self.watcher.prepared(self, resolved)
        return resolved

    def attach_standby(self, room: Room = own_memory) -> tuple[ShardSnapshot, list[MaterializedEntry]]:
        """As a shard does."""
        snapshot, missing = super().attach_standby(room)
        if self.watcher is not None:
            for resolved in missing:
                self.watcher.prepared(self, resolved)
        return snapshot, missing

    def take_snapshot(self, member: int) -> ShardSnapshot | None:
        """As a shard does."""
        snapshot = super().take_snapshot(member)
        if snapshot is not None and self.watcher is not None:
            self.watcher.took_snapshot(member, self.standings.members[member].answered, snapshot)
        return snapshot

    def process(self, entry: m.AnyEntry) -> Answers:
        """As a shard does."""
        return self._watched(entry, lambda: super(WatchedShard, self).process(entry))

    def commit(self, position: int) -> Answers:
        """As a shard does, entry by entry."""
        answers: Answers = []
        while self.position < position and self._closed:
            entry = self._closed[0].entry
            answers += self._watched(entry, self._commit_one)
        return answers if self.position >= position else answers + super().commit(position)

    def _commit_one(self) -> Answers:
        return super().commit(self.position + 1)

    def read(
        self, member: int, request: m.Read, rows: Sequence[StagedRows] = (), connection_epoch: int = 0
    ) -> m.Answer:
        """As a shard does."""
        answer = partial(super().read, member, request, rows, connection_epoch)
        return self._interruptible(answer, [one.rows for one in rows])

    def _watched(self, entry: m.AnyEntry, action: Callable[[], Answers]) -> Answers:
        answers = self._interruptible(action)
        if self.watcher is not None:
            self.watcher.processed(self, entry)
        return answers

    def _interruptible(self, action: Callable[[], Done], rows: Sequence[Floats] = ()) -> Done:
        """Do it, and be stopped in the middle where that is due; `rows` besides what is held."""
        watcher = self.watcher
        if watcher is None or not watcher.interrupts(self):
            return action()
        windows = self._windows(rows)
        before = [window.copy() for window in windows]
        done = action()
        rest = [
            _half_write(window, old)
            for window, old in zip(windows, before, strict=True)
            if not np.array_equal(window, old, equal_nan=True)
        ]
        if rest:
            watcher.interrupted(self, rest)
        return done

    def _windows(self, read: Sequence[Floats]) -> list[Floats]:
        """The members' memory as this server has it mapped: parameters, and rows that they wait for."""
        mapped = [
            (member, staging.parameters)
            for member in self.standings.members
            for staging in self.stagings(member).values()
            if staging.parameters is not staging.gradients
        ]
        sharing = {member for member, _ in mapped}
        held = [one for one in self._members.all_held() if one.member in sharing]
        exchanges = [self._members.of(m.ExchangeId(one.member, one.number)) for one in held]
        rows = [staged.rows for exchange in exchanges for staged in exchange.pulled()]
        return [parameters for _, parameters in mapped] + rows + (list(read) if sharing else [])

    @classmethod
    def restore(cls, snapshot: ShardSnapshot, reduce: Reduce) -> WatchedShard:
        """As a shard does; nobody watches it yet."""
        shard = super().restore(snapshot, reduce)
        assert isinstance(shard, WatchedShard)
        return shard


def _half_write(window: NDArray[np.float32], old: NDArray[np.float32]) -> Write:
    """Undo every second element of a pass, whichever a real one would leave; returns what makes up for it."""
    rest = window[::2].copy()
    window[::2] = old[::2]

    def write() -> None:
        window[::2] = rest

    return write
