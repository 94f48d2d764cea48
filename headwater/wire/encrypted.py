"""A connection with TLS around it, in the place of the socket: see `ByteStream` for what it promises."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from typing import Any

from headwater.wire.encryption import Encryption
from headwater.wire.stream import Incomplete, Sendable, Writable

_SMALL, _LARGE = 32 << 10, 256 << 10  # bytes read at once, without and with arrays to fill


class EncryptedStream:
    """`connection`, and the `Encryption` whose handshake was made over it; owns both.

    `_using` guards the encryption and is never held during a system call. A call that writes counts
    plain bytes as gone only when the kernel has all of what they became, so a caller that waits for the
    kernel to take its frame waits for the right thing.
    """

    def __init__(self, connection: socket.socket, encryption: Encryption) -> None:
        self._socket = connection
        self._encryption = encryption
        self._using = threading.Lock()
        self._came = memoryview(bytearray(_SMALL))
        self._unsent = memoryview(b"")  # encrypted
        self._became = 0  # plain bytes that are in `_unsent`, or were when it was longer

    @property
    def family(self) -> int:
        """The socket's."""
        return self._socket.family

    def pending(self) -> bool:
        """Whether a read could give bytes though the socket has none: poll does not know of them."""
        return not self._encryption.drained

    def send(self, data: Sendable, flags: int = 0, /) -> int:
        """Send from the front of `data`; return the bytes gone."""
        return self.sendmsg((data,), (), flags)

    def sendmsg(self, buffers: Iterable[Sendable], ancillary: Iterable[Any] = (), flags: int = 0, /) -> int:
        """Send from the front of `buffers`; return the bytes gone.

        Raises:
            BlockingIOError: not all of what was begun is gone; repeat with the same bytes.
        """
        if not self._became:
            with self._using:
                self._became = self._encryption.encrypt(buffers)
                self._unsent = memoryview(self._encryption.take())
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]
        gone, self._became = self._became, 0
        return gone

    def recv_into(self, buffer: Writable, size: int = 0, flags: int = 0) -> int:
        """Fill `buffer` as far as bytes are there, with at most one system call; 0: the peer ended.

        An end without TLS's own goodbye is an end: whether something is missing, frames and messages
        tell. `size` must be 0.

        Raises:
            Incomplete: a part of a record came.
        """
        with self._using:
            count = self._encryption.decrypt_into(buffer)
        if count or self._encryption.ended:
            return count
        if len(buffer) > _LARGE and len(self._came) < _LARGE:
            self._came = memoryview(bytearray(_LARGE))
        came = self._socket.recv_into(self._came, 0, flags)
        if not came:
            return 0
        with self._using:
            self._encryption.feed(self._came[:came])
            count = self._encryption.decrypt_into(buffer)
        if not count and not self._encryption.ended:
            raise Incomplete
        return count

    def recvmsg_into(
        self, buffers: Iterable[Writable], space: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Fill the first of `buffers` as `recv_into`, and the others with what came with it."""
        total = 0
        for buffer in buffers:
            if total == 0:
                total = count = self.recv_into(buffer, 0, flags)
            else:
                with self._using:
                    count = self._encryption.decrypt_into(buffer)
                total += count
            if count < len(buffer):
                break
        return total, [], 0, None

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def settimeout(self, value: float | None, /) -> None:
        """The socket's."""
        self._socket.settimeout(value)

    def getpeername(self) -> Any:
        """The socket's."""
        return self._socket.getpeername()

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """The socket's."""
        self._socket.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """The socket's."""
        return self._socket.getsockopt(level, option, size)

    def shutdown(self, how: int, /) -> None:
        """The socket's; takes no lock, so it wakes whoever is inside."""
        self._socket.shutdown(how)

    def close(self) -> None:
        """The socket's."""
        self._socket.close()
