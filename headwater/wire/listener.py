"""Where connections come from: listening and dialling, on Unix sockets or TCP.

Addresses are text: "unix:@name" (Linux's abstract names, which no file system keeps), "unix:/path"
elsewhere, "tcp:host:port", "tcp:[host]:port" for IPv6. Every connection passes `Security` on both
sides before a byte of it is read: an abstract name may have been taken by somebody else.
"""

from __future__ import annotations

import logging
import secrets
import select
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Literal

from headwater.errors import ConfigurationError, ConnectionLostError, RefusedError
from headwater.wire.channel import Channel
from headwater.wire.fork import close_in_child
from headwater.wire.frames import Limits
from headwater.wire.security import Security
from headwater.wire.sockets import tcp_address, timeval

_BACKLOG = 1024
_log = logging.getLogger(__name__)


def _log_refused(reason: str) -> None:
    _log.warning("connection refused: %s", reason)


class Listener:
    """Accepts connections on one address until it is closed.

    Args:
        kind: "unix" for this machine, under a fresh random name; "tcp" for `host` and `port`.
        port: 0 takes a free one.
        security: who may connect.
        on_refused: told in words about each connection that `security` refused.

    Attributes:
        address: what others `dial`.

    Raises:
        ConfigurationError: `security` forbids that host, or the address cannot be had.
    """

    def __init__(
        self,
        kind: Literal["unix", "tcp"],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        security: Security | None = None,
        limits: Limits | None = None,
        on_refused: Callable[[str], None] = _log_refused,
    ) -> None:
        self._security = security or Security()
        self._limits = limits
        self._on_refused = on_refused
        self._directory = ""
        if kind == "tcp":
            self._security.check_bind(host)
            self._socket = _listen_tcp(host, port)
            self.address = tcp_address(self._socket.getsockname())
        else:
            if not sys.platform.startswith("linux"):
                self._directory = tempfile.mkdtemp(prefix="headwater-")  # only this user can enter it
            self._socket, self.address = _listen_unix(self._directory)
        self._socket.setblocking(False)
        self._waking, self._wake = socket.socketpair()
        self._accepting = threading.RLock()  # may be closed from `on_refused`
        self._closed = False
        close_in_child(self)

    def accept(self) -> Channel | None:
        """Return the next admitted connection; blocks. None once closed. For one thread at a time.

        Raises:
            ConnectionLostError: the system has no descriptors left for connections.
        """
        with self._accepting:
            if self._closed:
                return None
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            poller.register(self._waking, select.POLLIN)
            channel = None
            while channel is None and not self._closed:
                poller.poll()
                channel = self._accept_ready()
            return channel

    def close(self) -> None:
        """Stop listening; a blocked `accept` returns None. May be called twice."""
        self._closed = True
        try:
            self._wake.send(b"\0")
        except OSError:
            return  # closed before
        with self._accepting:
            self.close_descriptors()
        shutil.rmtree(self._directory, ignore_errors=True)

    def close_descriptors(self) -> None:
        """Stop listening in a forked child only."""
        self._closed = True
        for owned in (self._socket, self._waking, self._wake):
            owned.close()

    def _accept_ready(self) -> Channel | None:
        """Accept one connection if one is there and may be."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None  # it was gone before we came to it, or `close` woke us
        except OSError as error:
            raise ConnectionLostError(f"cannot accept connections on {self.address}: {error}") from error
        try:
            self._security.admit(connection)
        except RefusedError as refusal:
            connection.close()
            self._on_refused(f"{self.address}: {refusal}")
            return None
        return Channel(connection, self._limits)


def dial(
    address: str, *, timeout: float, security: Security | None = None, limits: Limits | None = None
) -> Channel:
    """Connect to a listener; blocks for at most `timeout` seconds, finding the address of a name aside.

    Raises:
        ConfigurationError: `address` is not one.
        ConnectionLostError: nobody answers there, or somebody whom `security` does not admit.
    """
    connection = None
    try:
        connection = _connect(address, timeout)
        (security or Security()).admit(connection)
    except (OSError, RefusedError) as error:
        if connection is not None:
            connection.close()
        raise ConnectionLostError(f"cannot connect to {address}: {error}") from error
    return Channel(connection, limits)


def _connect(address: str, timeout: float) -> socket.socket:
    kind, _, place = address.partition(":")
    if kind == "unix" and place:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A non-blocking connect fails at once where the listener's queue is full; this one waits.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(timeout))
            connection.connect("\0" + place[1:] if place.startswith("@") else place)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(None))
        except BaseException:
            connection.close()
            raise
        return connection
    host, _, port = place.rpartition(":")
    if kind != "tcp" or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"address {address!r} is not one of unix:@name, tcp:host:port, tcp:[host]:port"
        )
    return socket.create_connection((host.strip("[]"), int(port)), timeout)


def _listen_unix(directory: str) -> tuple[socket.socket, str]:
    """Listen under a new name, in `directory` where the system knows no abstract names."""
    name = f"headwater-{secrets.token_hex(16)}"
    path = f"{directory}/{name[:24]}"  # names of Unix sockets are short
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path if directory else f"\0{name}")
    listening.listen(_BACKLOG)
    return listening, f"unix:{path}" if directory else f"unix:@{name}"


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on tcp:{host}:{port}: {error}") from error
