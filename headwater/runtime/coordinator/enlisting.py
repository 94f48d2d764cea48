"""Servers that come by themselves: they ask what is missing, and wait as spares where nothing is.

Each conversation is in the thread of its connection, which looks now and then whether that still stands.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.runtime.coordinator.places import Reservation, SlotAllocator
from headwater.runtime.coordinator.registry import LOOK_S, MemberRegistry
from headwater.runtime.coordinator.settings import ClusterSettings
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater.coordinator")


class SlotRequests:
    """Gives places to those who ask.

    Args:
        restore: returns the path of the checkpoint with which a generation begins; called once in each, may
            block; it is told whether training may have begun before, and the first generation.

    Attributes:
        spares: how many wait for a place.
    """

    def __init__(
        self, settings: ClusterSettings, company: MemberRegistry, restore: Callable[[bool, int], str]
    ) -> None:
        self.spares = 0
        self._settings = settings
        self._company = company
        self._restore = restore
        self._places = SlotAllocator(settings.servers, settings.replicas)
        self._choosing = threading.Lock()
        self._chosen: tuple[int, str] | None = None

    @contextmanager
    def promised(self, enlist: m.RequestSlot, channel: Channel) -> Iterator[Reservation | None]:
        """A place for whoever enlists, which `release` or the end of the block gives up; blocks until one is
        free. None when its connection has ended before.

        Raises:
            ConfigurationError: there can be no such place.
            HeadwaterError: the cluster has ended, and why.
        """
        promise = self._wait(enlist, channel)
        try:
            yield promise
        finally:
            if promise is not None:
                self.release(promise)

    def _wait(self, enlist: m.RequestSlot, channel: Channel) -> Reservation | None:
        company = self._company
        with company.changed:
            self._places.check(enlist)
            promise = company.free(enlist, self._places)
            if promise is not None:
                return promise
            self.spares += 1
        try:
            channel.send(m.NoSlot(_reason(enlist)))
            with company.waiting(channel):
                while (promise := company.free(enlist, self._places)) is None and not channel.hung_up():
                    company.changed.wait(LOOK_S)
            return promise
        finally:
            with company.changed:
                self.spares -= 1

    def invite(self, promise: Reservation, channel: Channel) -> m.Join | None:
        """Tell whoever enlisted what it is to be; blocks until it joins, None when it does not.

        Raises:
            CheckpointError, ConfigurationError: there is nothing to begin with.
            TimeoutError: it has not joined for the deadline of the cluster.
        """
        settings = self._settings
        channel.send(
            m.Assignment(
                promise.role,
                promise.index,
                settings.servers,
                settings.sync,
                settings.replicas,
                settings.min_workers,
                settings.patience,
                self._begins_with() if promise.role == "server" else "",
            )
        )
        received = channel.receive(timeout=settings.deadline)
        if received is None:
            _log.info("%s %d was promised to %s, which is gone", promise.role, promise.index, channel.peer)
            return None
        join = received.message
        if not isinstance(join, m.Join) or (join.role, join.index) != (promise.role, promise.index):
            raise ProtocolError(f"{type(join).__name__} came after Terms, expected Join as {promise}")
        return join

    def release(self, promise: Reservation) -> None:
        """It is a member's now, or anybody's; idempotent."""
        with self._company.changed:
            self._places.release(promise)
            self._company.changed.notify_all()

    def _begins_with(self) -> str:
        """The checkpoint of this generation; the first that asks has it chosen."""
        with self._choosing:
            generation, begun, first = self._company.beginning()
            if self._chosen is None or self._chosen[0] != generation:
                self._chosen = generation, self._restore(begun, first)
            return self._chosen[1]


def _reason(enlist: m.RequestSlot) -> str:
    wanted = "server or standby" if enlist.role is None else enlist.role
    which = "" if enlist.index is None else f" {enlist.index}"
    return f"no {wanted}{which} is missing: it waits as a spare"
