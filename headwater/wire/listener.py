"""Where connections come from: listening and dialling, on Unix sockets or TCP (see `addresses`).

Every connection is admitted on both sides before a frame is read: on a Unix socket by the user that
the kernel names, as an abstract name may have been taken by somebody else; over TCP by a handshake.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from headwater.errors import ConnectionLostError, ProtocolError, RefusedError
from headwater.wire.addresses import connect, fresh_name, listen_tcp, listen_unix, split_tcp
from headwater.wire.channel import Channel
from headwater.wire.encryption import load
from headwater.wire.fork import close_in_child
from headwater.wire.frames import Limits
from headwater.wire.greeting import refusal
from headwater.wire.handshake import Handshake
from headwater.wire.handshake_pool import Capacity, HandshakePool, hang_up
from headwater.wire.refusals import RefusalLog
from headwater.wire.security import Security
from headwater.wire.sockets import peer_name
from headwater.wire.stream import ByteStream

_GONE = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED, errno.EPROTO, errno.EINTR)
_PAUSE_MS = 100  # where the system cannot give a connection


class Listener:
    """Accepts connections on one address until it is closed.

    Args:
        kind: "unix" for this machine; "tcp" for `host` and `port`.
        place: of a Unix socket, a path or an abstract name after "@"; "" takes a fresh random name.
        host: "" or "0.0.0.0" for every IPv4 address, "::" for every address.
        port: 0 takes a free one.
        security: who may connect.
        limits: of frames.
        capacity: how many connections.
        on_refused: told in words about each connection that is refused; logged without.

    Attributes:
        address: what it is bound to; others `dial` it, or what `advertised` makes of it.
        refused: how many connections were refused, by reason: "handshake" (wrong token or certificate, no
            Headwater node, too slow), "user" (of another user), "full", "descriptors", "gone", "system".

    Raises:
        ConfigurationError: `security` forbids that host or its files cannot be used, or the address
            cannot be had.
    """

    def __init__(
        self,
        kind: Literal["unix", "tcp"],
        *,
        place: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        security: Security | None = None,
        limits: Limits | None = None,
        capacity: Capacity | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        self._security = security = security or Security()
        self._limits = limits
        self._capacity = capacity or Capacity()
        self._on_refused = on_refused or RefusalLog()
        self.refused: Counter[str] = Counter()
        self._directory = ""
        if kind == "tcp":
            security.check_bind(host)
            identity = load(security.tls, listening=True) if security.tls is not None else None
            self._socket, self.address = listen_tcp(host, port)
        else:
            identity = None
            if not place and not sys.platform.startswith("linux"):
                self._directory = tempfile.mkdtemp(prefix="headwater-")  # only this user can enter it
            self._socket, self.address = listen_unix(place or fresh_name(self._directory))
        self._socket.setblocking(False)
        self._waking, self._wake = socket.socketpair()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN)
        self._poller.register(self._waking, select.POLLIN)
        self._reception = HandshakePool(
            self._poller, lambda: Handshake(security.token, identity, None), self._capacity, self._refuse
        )
        self._admitted: deque[Channel] = deque()
        self._known: weakref.WeakSet[Channel] = weakref.WeakSet()  # admitted, some of them closed by now
        self._accepting = threading.RLock()  # may be closed from `on_refused`
        self._closed = False
        close_in_child(self)

    def accept(self) -> Channel | None:
        """Return the next admitted connection; blocks. None once closed. For one thread at a time.

        Handshakes go on only while a thread is in here.
        """
        with self._accepting:
            while not self._closed and not self._admitted:
                left = self._reception.expire()
                if self._closed:
                    break
                for descriptor, _ in self._poller.poll(None if left is None else 1000 * left + 1):
                    if not self._closed:
                        self._attend(descriptor)
            if self._closed:
                self.close_descriptors()
                return None
            return self._admitted.popleft()

    def close(self) -> None:
        """Stop listening; a blocked `accept` returns None. May be called twice."""
        self._closed = True
        try:
            self._wake.send(b"\0")
        except OSError:
            pass  # closed before
        with self._accepting:
            self.close_descriptors()
        shutil.rmtree(self._directory, ignore_errors=True)

    def close_descriptors(self) -> None:
        """Stop listening, without taking locks; in a forked child this ends nothing for the parent."""
        self._closed = True
        for owned in (self._socket, self._waking, self._wake):
            owned.close()
        self._reception.close()
        while self._admitted:
            self._admitted.popleft().close_descriptors()
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)

    def _attend(self, descriptor: int) -> None:
        """Do what poll says can be done."""
        if descriptor == self._socket.fileno():
            self._accept_ready()
        elif (arrived := self._reception.ready(descriptor)) is not None:
            self._take_in(*arrived)

    def _accept_ready(self) -> None:
        """Accept one connection if one is there and may be."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno not in _GONE:  # else it was gone before we came to it
                self._cannot_accept(error)
            return
        if connection.family != socket.AF_UNIX:
            if self._is_full():
                self._turn_away(connection, f"{self._capacity.connections} connections are open already")
            else:
                self._reception.enter(connection)
            return
        try:
            self._security.admit(connection)
        except RefusedError as refused:
            connection.close()
            self._refuse(str(refused), "user")
        else:
            self._take_in(connection, connection)

    def _take_in(self, connection: socket.socket, stream: ByteStream) -> None:
        if self._is_full():  # by others whose handshakes were under way at the same time
            self._turn_away(connection, f"{self._capacity.connections} connections are open already")
            return
        try:
            channel = Channel(stream, self._limits)
        except OSError as error:
            connection.close()
            self._refuse(f"gone once it was admitted: {error}", "gone")
            return
        self._known.add(channel)
        self._admitted.append(channel)

    def _is_full(self) -> bool:
        if len(self._known) < self._capacity.connections:
            return False
        for channel in list(self._known):
            if channel.fileno() < 0:
                self._known.discard(channel)
        return len(self._known) >= self._capacity.connections

    def _turn_away(self, connection: socket.socket, reason: str) -> None:
        """Refuse a connection whatever it is."""
        peer = peer_name(connection)
        try:
            connection.setblocking(False)
            connection.send(refusal(reason))
        except OSError:
            pass  # it is gone
        hang_up(connection)
        self._refuse(f"{peer}: {reason}", "full")

    def _cannot_accept(self, error: OSError) -> None:
        """Keep going when the system cannot give a connection, and get rid of one that waits."""
        if error.errno in (errno.EMFILE, errno.ENFILE) and self._spare >= 0:
            os.close(self._spare)
            try:
                self._socket.accept()[0].close()
            except OSError:
                pass  # it was gone before we came to it, or another thread took the descriptor
            try:
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._spare = -1  # the next time waits instead
            self._refuse(
                f"no descriptors left for it ({error}): raise the limit, see `ulimit -n`", "descriptors"
            )
            return
        self._refuse(f"cannot accept: {error}", "system")
        waiting = select.poll()
        waiting.register(self._waking, select.POLLIN)
        waiting.poll(_PAUSE_MS)

    def _refuse(self, reason: str, kind: str = "handshake") -> None:
        self.refused[kind] += 1
        self._on_refused(f"{self.address}: {reason}")


def dial(
    address: str, *, timeout: float, security: Security | None = None, limits: Limits | None = None
) -> Channel:
    """Connect to a listener; blocks for at most `timeout` seconds, finding the address of a name aside.

    Raises:
        ConfigurationError: `address` is not one, or the files of `security` cannot be used.
        ConnectionLostError: nobody answers there, or not in time.
        RefusedError: one side does not admit the other; trying again will not help.
        ProtocolError: what answers is no Headwater node, or one of another version.
    """
    security = security or Security()
    handshake = None
    if not address.startswith("unix:"):
        host, _ = split_tcp(address)
        identity = load(security.tls, listening=False) if security.tls is not None else None
        handshake = Handshake(security.token, identity, host.partition("%")[0])
    until = time.monotonic() + timeout
    try:
        with ExitStack() as undo:
            connection = undo.enter_context(connect(address, timeout))
            if handshake is None:
                security.admit(connection)
                channel = Channel(connection, limits)
            else:
                channel = Channel(_shake_hands(connection, handshake, until), limits)
            undo.pop_all()
            return channel
    except (RefusedError, ProtocolError) as error:
        raise type(error)(f"cannot connect to {address}: {error}") from error
    except OSError as error:
        raise ConnectionLostError(f"cannot connect to {address}: {error}") from error


def _shake_hands(connection: socket.socket, handshake: Handshake, until: float) -> ByteStream:
    """Make the caller's side of a handshake."""
    while True:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connection.sendall(handshake.take())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the listener has refused already, and what it said can be read
        if handshake.done:
            return handshake.stream(connection)
        try:
            data = connection.recv(handshake.wanted)
        except TimeoutError as error:
            raise TimeoutError("no answer to the handshake in time: is it a Headwater node?") from error
        if not data:
            raise ConnectionLostError("it closed the connection during the handshake; its log says why")
        handshake.receive(data)
