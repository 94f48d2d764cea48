"""A follower that others follow: threads and channels around `headwater.machines.fan_out`."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ClosedError, ConnectionLostError, FinishedError, HeadwaterError, StalledError
from headwater.follower.keeper import Keeper, Wish
from headwater.follower.statistics_of import FollowerStatistics, statistics_of
from headwater.kernels.slabs import PRIVATE, ChunkMemory
from headwater.loggers import logger
from headwater.machines.actions import Conn
from headwater.machines.fan_out import AskNewest, FanOutMachine, Offer, ReaderCut, Released
from headwater.machines.follower import FollowerMachine, Slot
from headwater.runtime.dialling import machine
from headwater.runtime.pump import Pump
from headwater.runtime.threads import ConnectionThreads
from headwater.shard.shared_version import Sharing
from headwater.shard.version_copy import VersionCopy
from headwater.wire.arena import Arena
from headwater.wire.channel import Channel
from headwater.wire.endpoint import Endpoint
from headwater.wire.shared_memory import windows_possible

_log = logger("headwater.follower")

_PINS = 2
_SILENT_S = 60.0


class ServedStatistics(msgspec.Struct, frozen=True):
    """What a served follower is at and what it has done; a snapshot.

    Attributes:
        follower: of what it follows itself.
        readers: that are joined now.
        kept: versions in its memory that somebody reads or is sent, the current one included.
        sent: versions that readers were sent; lent: that they were given the memory of.
        given_up: versions whose memory is its readers', since they ended without letting go of it.
        slow: readers that took too long, and were cut off so that others could be served.
    """

    follower: FollowerStatistics
    readers: int
    kept: int
    sent: int
    lent: int
    given_up: int
    slow: int


class FollowerNode:
    """Follows as `wish` says, and listens for readers as `reach` says, once its first version is there.

    Attributes:
        addresses: where readers follow it, the nearest first; address: the last, which leads here from the
            farthest.

    Raises:
        ConfigurationError: what is followed does not exist, or it cannot listen there.
        ConnectionLostError: nobody answers at the address of the wish.
        RefusedError: one side does not admit the other.
        StalledError: there was no version within `deadline` seconds; says why.
    """

    def __init__(self, wish: Wish, reach: Endpoint, *, deadline: float) -> None:
        self._machine = FollowerMachine(_PINS, elastic=True)
        self._lends = reach.local and windows_possible()
        self._keeper = Keeper(wish, self._machine, self._memory)
        self._keeper.listeners.append(self._note_touched)
        self._touched: dict[int, NDArray[np.int64] | None] = {}
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
        self._sharing: weakref.WeakKeyDictionary[VersionCopy, Sharing] = weakref.WeakKeyDictionary()
        self._threads = ConnectionThreads("headwater-follower")
        self._closed, self._over = False, threading.Event()
        self._keeper.begin(deadline)
        try:
            self._wait_for_first(deadline)
            # It must be known where it is before anybody can be told.
            self._ready = threading.Event()
            self.addresses = self._threads.listen(reach, self._serve, towards=wish.address)
        except BaseException:
            self._keeper.close()
            self._threads.close_channels()
            raise
        self.address = self.addresses[-1]
        own = m.Member(0, "server", 0, os.getpid(), socket.gethostname(), self.addresses, machine())
        self._fan_out = FanOutMachine(own, self._keeper.cluster, wish.address, wish.dtype, self._shares)
        self._pump = Pump(self._fan_out, self, self._threads, log=_log, keep_alive=_SILENT_S)
        self._pump.begin()
        self._threads.start(self._offer_versions, "versions")

    def wait(self, seconds: float | None = None) -> HeadwaterError | None:
        """Block until nothing newer can come, for at most so long; returns why, None while something can."""
        return self._keeper.failure if self._over.wait(seconds) else None

    def close(self) -> None:
        """End every connection and thread; idempotent. What readers were lent stays readable."""
        with self._keeper.changed:
            self._closed = True
            self._keeper.changed.notify_all()
        self._keeper.close()
        self._ready.set()
        self._end(self._keeper.failure)
        self._pump.flush()
        self._pump.stop()
        self._threads.close_channels()
        self._threads.join()
        for arena in self._arenas:
            arena.close_descriptors()
        self._over.set()

    def statistics(self) -> ServedStatistics:
        """A snapshot; does not block for long."""
        fan_out = self._fan_out
        counts = self._pump.look(
            lambda: (
                fan_out.readers,
                fan_out.kept,
                fan_out.sent,
                fan_out.lent,
                fan_out.given_up,
                fan_out.slow,
            )
        )
        return ServedStatistics(statistics_of(self._keeper), *counts)

    # ── versions ────────────────────────────────────────────────────────────────────────────────

    def _memory(self) -> ChunkMemory:
        if not self._lends:
            return PRIVATE
        arena = Arena()
        self._arenas.add(arena)
        return arena

    def _wait_for_first(self, deadline: float) -> None:
        keeper, until = self._keeper, time.monotonic() + deadline
        with keeper.changed:
            while self._machine.current is None:
                if keeper.failure is not None:
                    raise keeper.failure
                left = until - time.monotonic()
                if left <= 0:
                    raise StalledError(f"a first version did not come within {deadline:g} s: {keeper.reason}")
                keeper.changed.wait(left)

    def _note_touched(self, slot: Slot) -> None:
        """Holding the keeper's lock: which rows differ from the version that was offered last."""
        for id, ids in slot.copy.touched.items():
            before = self._touched.get(id, np.empty(0, np.int64))
            self._touched[id] = None if ids is None or before is None else np.concatenate([before, ids])

    def _offer_versions(self) -> None:
        """Tell the machine of every version that is shown, and of what the newest one is."""
        keeper = self._keeper
        before: Slot | None = None
        told = -1, 0.0
        while True:
            with keeper.changed:
                while (
                    self._machine.current is before
                    and told == (self._machine.newest, keeper.heard)
                    and keeper.failure is None
                    and not self._closed
                ):
                    keeper.changed.wait()
                if self._closed:
                    return
                failure = keeper.failure
                newest, heard = told = self._machine.newest, keeper.heard
                fresh = None if self._machine.current is before else self._machine.pin()
                if fresh is not None:
                    touched, self._touched = self._touched, {}
            if fresh is not None:
                before = fresh
                self._pump.do(partial(self._fan_out.shown, self._offer(fresh, touched)))
                self._ready.set()
            self._pump.do(partial(self._fan_out.heard, newest, heard))
            if failure is not None:
                self._end(failure)
                self._pump.flush()
                self._over.set()
                return

    def _end(self, failure: HeadwaterError | None) -> None:
        self._pump.do(lambda now: self._fan_out.ended(_word(failure)))

    def _offer(self, slot: Slot, touched: dict[int, NDArray[np.int64] | None]) -> Offer:
        copy = slot.copy
        assert isinstance(copy, VersionCopy)
        assert slot.version is not None
        numbers = {id: number for number, id in enumerate(copy.tables)}
        models = tuple(m.ModelInfo(id, spec) for id, spec in copy.model_specs.items())
        told = m.Description(0, 0, models, tuple(copy.table_specs.values()))
        offer = Offer(slot, slot.version, tuple(copy.tables), told, touched)
        if isinstance(copy.memory, Arena):
            sharing = self._sharing.get(copy)
            if sharing is None:
                sharing = self._sharing[copy] = Sharing(copy.memory)
            offer.shared, offer.memory = sharing.share(copy, numbers), copy.memory
        return offer

    # ── what the machine asks for ───────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        self._ready.wait()
        self._pump.serve(channel)

    def _shares(self, conn: Conn) -> bool:
        channel = self._pump.channel(conn)
        return channel is not None and channel.can_pass_descriptors

    def tell(self, event: Any) -> None:
        """A reader wants to know something, or has let go of a version."""
        keeper = self._keeper
        with keeper.changed:
            if isinstance(event, AskNewest):
                keeper.asked = time.monotonic()
            elif isinstance(event, Released):
                if not event.reusable:
                    self._machine.give_up(event.slot)
                self._machine.unpin(event.slot)
            keeper.changed.notify_all()

    def perform(self, task: Any) -> Any:
        """Make what a reader is sent."""
        assert isinstance(task, ReaderCut)
        return task.make()

    def dial(self, member: m.Member | str) -> Channel:
        """Nobody is dialled."""
        raise ConnectionLostError(f"a follower does not dial {member}")

    def persist(self, record: Any) -> None:
        """A follower keeps nothing on disk."""
        raise AssertionError(record)

    def failed(self, error: HeadwaterError) -> None:
        """Nothing more is decided."""
        _log.error("the follower ends: %s", error)
        self._over.set()


def _word(failure: HeadwaterError | None) -> m.Refused | m.Finished:
    """What readers are told when nothing newer will come."""
    if isinstance(failure, FinishedError):
        return m.Finished()
    if failure is None or isinstance(failure, ClosedError):
        return m.Refused("ConnectionLostError", "the follower has ended")
    return m.Refused(type(failure).__name__, str(failure))
