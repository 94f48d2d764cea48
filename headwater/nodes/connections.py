"""A member's connections to all servers, made together: to wherever the coordinator says that they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from headwater import messages as m
from headwater.errors import ConnectionLostError, StalledError
from headwater.nodes.membership import Membership
from headwater.wire.channel import Channel, Outgoing
from headwater.wire.listener import dial

_DIAL_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5


class Connections:
    """One generation of connections after the other; each is an attempt that servers tell apart."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._attempt = -1
        self._channels: list[Channel] = []

    def make(
        self, until: float, offers: Callable[[int], Iterable[Outgoing]] = lambda server: ()
    ) -> list[Channel]:
        """Connect to every server; blocks, with growing pauses, until that works.

        `offers(server)`: frames that every server is sent first. `until`: in monotonic seconds.

        Raises:
            StalledError: `until` has passed.
            HeadwaterError: as the coordinator named it, when it has ended this membership.
            ConnectionLostError: the coordinator is gone too.
        """
        welcome = self._membership.welcome
        servers, term = welcome.servers, welcome.term
        pause = _FIRST_PAUSE_S
        while True:
            if self._attempt >= 0:
                whereabouts = self._membership.locate()
                servers, term = whereabouts.servers, whereabouts.term
            self._attempt += 1
            if len(servers) == len(welcome.servers):
                try:
                    return self._connect(servers, term, offers)
                except ConnectionLostError:
                    self.drop()  # a server is gone and the coordinator does not know it yet
            if time.monotonic() > until:
                raise StalledError("a server cannot be reached")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _connect(
        self, servers: Sequence[m.Member], term: int, offers: Callable[[int], Iterable[Outgoing]]
    ) -> list[Channel]:
        member = self._membership.welcome.member
        assert member.role in ("worker", "observer")
        for index, server in enumerate(servers):
            channel = dial(server.addresses[0], timeout=_DIAL_S)
            self._channels.append(channel)
            channel.send(m.Hello(member.id, member.role, term, self._attempt), timeout=_DIAL_S)
            for frame in offers(index):
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
