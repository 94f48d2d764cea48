"""What a channel needs of a connection: an ordinary socket is one, and so is one with TLS around it.

The plain case stays the socket itself: nothing stands between a channel and the system calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

Writable: TypeAlias = memoryview
Sendable: TypeAlias = bytes | bytearray | memoryview


class Incomplete(Exception):
    """No error: bytes came, but none that can be handed out yet; call again."""


class ByteStream(Protocol):
    """A connected byte stream that blocks, unless a call's flags say MSG_DONTWAIT.

    Reads and writes may come from two threads at once. Counts are of plain bytes. A write that raised
    BlockingIOError must be repeated with the same bytes first.
    """

    @property
    def family(self) -> int:
        """AF_UNIX where descriptors can be passed."""

    def fileno(self) -> int:
        """The descriptor to poll, -1 once closed."""

    def settimeout(self, value: float | None, /) -> None:
        """As of a socket."""

    def getpeername(self) -> Any:
        """As of a socket."""

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """As of a socket."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """As of a socket."""

    def send(self, data: Sendable, flags: int = ..., /) -> int:
        """As of a socket."""

    def sendmsg(
        self, buffers: Iterable[Sendable], ancillary: Iterable[Any] = ..., flags: int = ..., /
    ) -> int:
        """As of a socket."""

    def recv_into(self, buffer: Writable, size: int = ..., flags: int = ...) -> int:
        """As of a socket; may raise Incomplete."""

    def recvmsg_into(
        self, buffers: Iterable[Writable], space: int = ..., flags: int = ..., /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """As of a socket; may raise Incomplete."""

    def shutdown(self, how: int, /) -> None:
        """As of a socket."""

    def close(self) -> None:
        """As of a socket."""
