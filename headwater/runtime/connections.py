"""A member's connections to all servers, made together: to wherever the coordinator says that they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from headwater import messages as m
from headwater.errors import ConnectionLostError, StalledError
from headwater.runtime.coordinator_client import CoordinatorClient
from headwater.runtime.dialling import dial_member
from headwater.wire.channel import Channel, Outgoing

_log = logging.getLogger("headwater.worker")

_DIAL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5


class Connections:
    """One generation of connections after the other; each is a connection epoch that servers tell apart."""

    def __init__(self, membership: CoordinatorClient) -> None:
        welcome = membership.welcome
        self._membership = membership
        self._servers, self._term = welcome.servers, welcome.term
        self._connection_epoch = -1
        self._channels: list[Channel] = []
        membership.watch(lambda: list(self._channels))

    def make(
        self, until: float, offers: Callable[[int, Channel], Iterable[Outgoing]] = lambda server, channel: ()
    ) -> list[Channel]:
        """Connect to every server; blocks, with growing pauses, until that works.

        While the coordinator is away the servers are looked for where they were last, and it says now and
        then that it waits. `offers(server, channel)`: frames that every server is sent first. `until`: in
        monotonic seconds.

        Raises:
            StalledError: `until` has passed; says which server is missing.
            HeadwaterError: as the coordinator named it, when it has ended this membership.
            ConnectionLostError: the coordinator is gone too.
        """
        welcome = self._membership.welcome
        pause, told = _FIRST_PAUSE_S, time.monotonic()
        while True:
            if self._connection_epoch >= 0:
                whereabouts = self._membership.locate()
                if whereabouts is not None:
                    self._servers, self._term = whereabouts.servers, whereabouts.term
            self._connection_epoch += 1
            reason = "a server is gone, and nobody has taken over yet"
            if len(self._servers) == len(welcome.servers):
                try:
                    return self._connect(self._servers, self._term, offers)
                except ConnectionLostError as error:
                    self.drop()  # a server is gone and the coordinator does not know it yet
                    reason = str(error)
            now = time.monotonic()
            if now > until:
                raise StalledError(reason)
            if now - told > welcome.patience:
                told = now
                why = self._membership.beside(reason)
                _log.warning("%s %d: %s", welcome.member.role, welcome.member.index, why)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _connect(
        self, servers: Sequence[m.Member], term: int, offers: Callable[[int, Channel], Iterable[Outgoing]]
    ) -> list[Channel]:
        member = self._membership.welcome.member
        assert member.role in ("worker", "observer")
        for index, server in enumerate(servers):
            channel = dial_member(server, timeout=_DIAL_S, security=self._membership.security)
            self._channels.append(channel)
            channel.send(m.Hello(member.id, member.role, term, self._connection_epoch), timeout=_DIAL_S)
            for frame in offers(index, channel):
                channel.send(frame.message, descriptors=frame.descriptors, timeout=_DIAL_S)
        self._membership.expect(servers, self._hang_up)
        return list(self._channels)

    def _hang_up(self) -> None:
        """The servers are others now: whoever waits for those of before need not."""
        for channel in list(self._channels):
            channel.close()

    def drop(self) -> None:
        """Close all; idempotent."""
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
