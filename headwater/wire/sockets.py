"""What the kernel is told about a socket, and asked about its other end."""

from __future__ import annotations

import socket
import struct
import sys

from headwater.wire.stream import ByteStream

_TIMEVAL = struct.Struct("ll")
_SILENCE_S = 60
_PROBES = 3
_TCP_INFO_SIZE = 60  # bytes, as far as `life` reads it
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def timeval(timeout: float | None) -> bytes:
    """Return `timeout` seconds as SO_RCVTIMEO and SO_SNDTIMEO take them; None waits for ever."""
    whole, part = divmod(0.0 if timeout is None else max(timeout, 1e-6), 1.0)
    return _TIMEVAL.pack(int(whole), int(part * 1e6))


def tune_tcp(connection: ByteStream) -> None:
    """Send small frames at once, and notice within about a minute that the peer's machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    keep_alive(connection, _SILENCE_S)


def keep_alive(connection: ByteStream, seconds: float) -> None:
    """Notice within about so many seconds, in which nothing is sent, that the peer's machine is gone."""
    times = {"TCP_KEEPIDLE": seconds / 2, "TCP_KEEPINTVL": seconds / 2 / _PROBES, "TCP_KEEPCNT": _PROBES}
    for name, value in times.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), min(max(1, int(value)), 32767))


def tcp_info(connection: ByteStream) -> bytes:
    """What Linux tells of a TCP connection; b"" where it tells nothing."""
    if not sys.platform.startswith("linux"):
        return b""
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    except OSError:
        return b""  # it was closed just now


def peer_credentials(connection: socket.socket) -> tuple[int, int] | None:
    """Return (pid, uid) of the process that connected or listened, None where the system cannot tell."""
    if connection.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(answer)
    return pid, uid


def peer_name(connection: ByteStream) -> str:
    """Return who is at the other end, for people: "tcp:127.0.0.1:4000" or "unix pid 123"."""
    if isinstance(connection, socket.socket) and connection.family == socket.AF_UNIX:
        credentials = peer_credentials(connection)
        return f"unix pid {credentials[0]}" if credentials is not None else "unix"
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return "tcp, already gone"
    return tcp_address(host, port)


def tcp_address(host: str, port: int) -> str:
    """Return "tcp:host:port", with an IPv6 address in brackets."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
