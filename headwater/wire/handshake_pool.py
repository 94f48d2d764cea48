"""The handshakes of a listener: many at a time in one thread, and none of them waits for another.

No thread per handshake, so that strangers who connect and say nothing, or a byte a second, cost a
descriptor and a few hundred bytes each, and only for a while. When there are too many, the oldest makes
room: an honest one is over within milliseconds, so those that stay are not honest.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.wire.handshake import Handshake
from headwater.wire.sockets import peer_name
from headwater.wire.stream import ByteStream


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many connections a listener takes.

    Attributes:
        connections: admitted and not closed.
        handshakes: under way at once.
        handshake_s: seconds that one may take.
    """

    connections: int = 1000
    handshakes: int = 200
    handshake_s: float = 10.0


class _PendingHandshake:
    """A connection whose handshake is under way."""

    __slots__ = ("began", "connection", "handshake", "peer", "unsent")

    def __init__(self, connection: socket.socket, handshake: Handshake) -> None:
        self.connection = connection
        self.handshake = handshake
        self.peer = peer_name(connection)
        self.began = time.monotonic()
        self.unsent = b""

    def go_on(self) -> None:
        """Move bytes until the handshake is over.

        Raises:
            BlockingIOError: it goes on when the socket is ready.
            HeadwaterError: the peer is not admitted, or is gone.
            OSError: the connection broke.
        """
        while True:
            self.flush()
            if self.handshake.done:
                return
            data = self.connection.recv(self.handshake.wanted)
            if not data:
                raise ConnectionLostError("it went away during the handshake")
            self.handshake.receive(data)

    def flush(self) -> None:
        """Send what must go to the peer; raises as `go_on`."""
        self.unsent += self.handshake.take()
        while self.unsent:
            self.unsent = self.unsent[self.connection.send(self.unsent) :]


class HandshakePool:
    """For one thread at a time, which polls `poller` and brings its events here.

    Args:
        begin: makes the listening side of a handshake.
        refused: told in words of each connection that is not admitted.
    """

    def __init__(
        self,
        poller: select.poll,
        begin: Callable[[], Handshake],
        capacity: Capacity,
        refused: Callable[[str], None],
    ) -> None:
        self._poller = poller
        self._begin = begin
        self._capacity = capacity
        self._refused = refused
        self._guests: dict[int, _PendingHandshake] = {}  # by descriptor; the oldest first

    def enter(self, connection: socket.socket) -> None:
        """Begin the handshake of a connection, which is the reception's own from now on."""
        if len(self._guests) >= self._capacity.handshakes:
            oldest = next(iter(self._guests.values()))
            took = time.monotonic() - oldest.began
            self._drop(oldest, f"{took:.1f} s of handshake, and others wait")
        connection.setblocking(False)
        guest = _PendingHandshake(connection, self._begin())
        self._guests[connection.fileno()] = guest
        self._poller.register(connection, select.POLLIN)

    def ready(self, descriptor: int) -> tuple[socket.socket, ByteStream] | None:
        """Go on with a handshake; return the socket and what it became once it is over."""
        guest = self._guests.get(descriptor)
        if guest is None:
            return None  # dropped by an event before this one
        try:
            guest.go_on()
        except BlockingIOError:
            self._poller.modify(descriptor, select.POLLOUT if guest.unsent else select.POLLIN)
            return None
        except (HeadwaterError, OSError) as error:
            self._drop(guest, str(error))
            return None
        self._forget(guest)
        return guest.connection, guest.handshake.stream(guest.connection)

    def expire(self) -> float | None:
        """Drop those that took too long; return seconds until the next one will have, None without any."""
        while self._guests:
            guest = next(iter(self._guests.values()))
            left = guest.began + self._capacity.handshake_s - time.monotonic()
            if left > 0:
                return left
            self._drop(guest, f"no whole handshake within {self._capacity.handshake_s:g} s")
        return None

    def close(self) -> None:
        """Close all connections. Also called in a forked child, where nothing else runs."""
        guests, self._guests = list(self._guests.values()), {}
        for guest in guests:
            guest.connection.close()

    def _forget(self, guest: _PendingHandshake) -> None:
        descriptor = guest.connection.fileno()
        del self._guests[descriptor]
        self._poller.unregister(descriptor)

    def _drop(self, guest: _PendingHandshake, reason: str) -> None:
        self._forget(guest)
        try:
            guest.flush()  # why, for an honest caller
        except OSError:
            pass  # it takes nothing more
        hang_up(guest.connection)
        self._refused(f"{guest.peer}: {reason}")


def hang_up(connection: socket.socket) -> None:
    """Close a connection so that what was sent last arrives: unread bytes would reset it."""
    try:
        connection.setblocking(False)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(64 << 10)
    except OSError:
        pass  # nothing there, or the peer was faster
    connection.close()
