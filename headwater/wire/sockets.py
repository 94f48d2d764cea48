"""What the kernel is told about a socket, and asked about its other end."""

from __future__ import annotations

import socket
import struct

_TIMEVAL = struct.Struct("ll")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def timeval(timeout: float | None) -> bytes:
    """Return `timeout` seconds as SO_RCVTIMEO and SO_SNDTIMEO take them; None waits for ever."""
    whole, part = divmod(0.0 if timeout is None else max(timeout, 1e-6), 1.0)
    return _TIMEVAL.pack(int(whole), int(part * 1e6))


def peer_credentials(connection: socket.socket) -> tuple[int, int] | None:
    """Return (pid, uid) of the process that connected or listened, None where the system cannot tell."""
    if connection.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(answer)
    return pid, uid


def peer_name(connection: socket.socket) -> str:
    """Return who is at the other end, for people: "tcp:127.0.0.1:4000" or "unix pid 123"."""
    if connection.family == socket.AF_UNIX:
        credentials = peer_credentials(connection)
        return f"unix pid {credentials[0]}" if credentials is not None else "unix"
    try:
        return tcp_address(connection.getpeername())
    except OSError:
        return "tcp, already gone"


def tcp_address(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return "tcp:host:port" for what `getsockname` gives, with IPv6 in brackets."""
    host, port = name[0], name[1]
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
