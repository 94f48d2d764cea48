"""The reading half of a channel: bytes of a socket in, whole frames out, stopping and going on anywhere.

Small frames are read ahead into one buffer, so prefix and header cost one system call together.
Payload beyond what was read ahead goes straight into the arrays it belongs to. Nothing is allocated
for a frame before its prefix has passed the limits, no more for its header than came of it and as much
again, and descriptors are closed unless a frame that announced them is handed out.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from numpy.typing import NDArray

from headwater.errors import ConnectionLostError, ProtocolError
from headwater.messages import AnyMessage
from headwater.wire.frames import PREFIX_SIZE, Limits, Prefix, decode_header, parse_prefix
from headwater.wire.stream import ByteStream, Incomplete

Array: TypeAlias = NDArray[Any] | memoryview
StaticProgress: TypeAlias = Callable[[AnyMessage, int], Sequence[Array]]
PlaceOf: TypeAlias = Callable[[int, AnyMessage, int], Sequence[Array]]

_READ_AHEAD = 64 << 10
_VECTORS = 64  # arrays of one system call
_DESCRIPTOR = array.array("i").itemsize
# Plain numbers: the socket module's flags are enums, and each operation on one costs most of a microsecond.
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_TRUNCATED = int(socket.MSG_CTRUNC)


@dataclass(slots=True)
class Received:
    """A whole frame. Its payload lies in the arrays that `place` gave.

    Attributes:
        message: the header.
        request: the id that the sender gave it.
        payload_length: bytes.
        descriptors: open files that came with it; whoever receives it closes them.
    """

    message: AnyMessage
    request: int
    payload_length: int
    descriptors: list[int]


class Span:
    """Arrays that bytes go into or come from, one after the other, and how far that has got.

    Attributes:
        left: bytes still to go.
    """

    __slots__ = ("_at", "_views", "left")

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._at = self.left = 0
        self._views: list[memoryview] = []
        for item in arrays:
            if item.nbytes:
                self._views.append(memoryview(cast(Any, item)).cast("B"))
                self.left += item.nbytes

    def views(self) -> list[memoryview]:
        """Return what a single system call should move next."""
        return self._views[self._at : self._at + _VECTORS]

    def advance(self, count: int) -> None:
        """Count the next `count` bytes as moved."""
        self.left -= count
        while count:
            view = self._views[self._at]
            if count < len(view):
                self._views[self._at] = view[count:]
                return
            count -= len(view)
            self._at += 1

    def fill(self, data: memoryview) -> int:
        """Copy from the front of `data` until one of the two ends; return the bytes copied."""
        moved = 0
        for view in self._views[self._at :]:
            count = len(view)
            if count > len(data) - moved:
                count = len(data) - moved
                view = view[:count]
            view[:] = data[moved : moved + count]
            moved += count
        self.advance(moved)
        return moved


class Incoming:
    """What has been read from one stream and not yet handed out. One thread at a time.

    Attributes:
        failure: why nothing more can be read, "" while something can.
        count: bytes that have come.
    """

    def __init__(self, connection: ByteStream, limits: Limits, peer: str) -> None:
        self.count = 0
        self._stream = connection
        self._limits = limits
        self._peer = peer
        passes = connection.family == socket.AF_UNIX and limits.descriptors > 0
        self._ancillary_space = socket.CMSG_SPACE(limits.descriptors * _DESCRIPTOR) if passes else 0
        self._buffer = memoryview(bytearray(_READ_AHEAD))
        self._start = self._end = 0  # of what was read ahead and is not yet used
        self._prefix: Prefix | None = None  # of the frame at `_start`, once it is there
        self._frame: Received | None = None  # whose payload is being read, into `_span`
        self._span = Span(())
        self._descriptors: list[int] = []  # received, announced by no frame yet
        self.failure = ""

    def advance(
        self, place: StaticProgress | PlaceOf | None, index: int | None, flags: int
    ) -> Received | None:
        """Go on towards the next frame with at most one system call; None: it is not all there yet.

        Args:
            place: as for `Channel.receive`; called with `index` first unless that is None.
            flags: of the system call; with MSG_DONTWAIT it never blocks.

        Raises:
            EOFError: the peer closed the connection, between two frames.
            BlockingIOError: nothing there; with flags 0, not within the socket's timeout.
            ConnectionLostError: it broke, or was closed inside a frame.
            ProtocolError: what came is not a frame. After this and the last one, nothing can be read.
        """
        try:
            if self._frame is not None:
                return self._go_on(flags)
            if self._start < self._end:
                received = self._take(place, index)
                if received is not None or self._frame is not None:
                    return received
                self._make_room()
            else:
                self._start = self._end = 0
            self._read_ahead(flags)
            return self._take(place, index)
        except Incomplete:
            return None
        except (BlockingIOError, EOFError):
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def buffered(self, place: StaticProgress | PlaceOf | None, index: int | None) -> Received | None:
        """Return the next frame if all of it was read ahead; never a system call. Raises as `advance`."""
        if self._start == self._end or self._frame is not None:
            return None
        try:
            return self._take(place, index)
        except BaseException as error:
            self._fail(error)
            raise

    def close_descriptors(self) -> None:
        """Close every descriptor that no caller has been given."""
        waiting, self._descriptors = self._descriptors, []
        if self._frame is not None:
            waiting = waiting + self._frame.descriptors
            self._frame.descriptors = []
        for descriptor in waiting:
            os.close(descriptor)

    def _take(self, place: StaticProgress | PlaceOf | None, index: int | None) -> Received | None:
        """Take a frame out of what was read ahead, if its header is all there, and place its payload."""
        start, end = self._start, self._end
        prefix = self._prefix
        if prefix is None:
            if end - start < PREFIX_SIZE:
                return None
            prefix = self._prefix = parse_prefix(self._buffer, self._limits, start)
        flags, header_length, payload_length, request = prefix
        body = start + PREFIX_SIZE
        stop = body + header_length
        if end < stop:
            return None
        message = decode_header(self._buffer[body:stop])
        self._prefix = None
        self._start = stop
        if header_length > _READ_AHEAD:  # nothing else is in a buffer that was made for it
            self._start, self._end, self._buffer = 0, 0, memoryview(bytearray(_READ_AHEAD))
        descriptors = self._claim(flags) if flags or self._descriptors else []
        received = Received(message, request, payload_length, descriptors)
        if not payload_length:
            return received
        self._frame = received
        return self._place(message, payload_length, place, index)

    def _place(
        self, message: AnyMessage, length: int, place: StaticProgress | PlaceOf | None, index: int | None
    ) -> Received | None:
        """Ask where the payload goes and copy there what was read ahead of it."""
        if place is None:
            raise ProtocolError(f"{type(message).__name__} with {length} payload bytes, expected none")
        asked: Any = place
        arrays = asked(message, length) if index is None else asked(index, message, length)
        room = 0
        for item in arrays:
            room += item.nbytes
        if room != length:
            raise ProtocolError(f"{type(message).__name__} with {length} payload bytes, expected {room}")
        start, stop = self._start, self._start + length
        if stop > self._end:
            self._span = Span(arrays)
            self._start = start + self._span.fill(self._buffer[start : self._end])
            return None
        for item in arrays:
            if item.nbytes:
                memoryview(item).cast("B")[:] = self._buffer[start : start + item.nbytes]
                start += item.nbytes
        self._start = stop
        received, self._frame = self._frame, None
        return received

    def _go_on(self, flags: int) -> Received | None:
        """Read payload into the arrays it belongs to."""
        span = self._span
        views = span.views()
        try:
            if len(views) == 1:
                count = self._stream.recv_into(views[0], 0, flags)
            else:
                count = self._stream.recvmsg_into(views, 0, flags)[0]
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self._peer}: {error}") from error
        if not count:
            raise ConnectionLostError(
                f"{self._peer} closed the connection {span.left} bytes before a frame's end"
            )
        span.advance(count)
        self.count += count
        return None if span.left else self._finish()

    def _finish(self) -> Received | None:
        received, self._frame = self._frame, None
        self._span = Span(())  # the arrays are the caller's alone again
        return received

    def _read_ahead(self, flags: int) -> None:
        """Read what is there into the buffer, and the descriptors that come with it."""
        end = self._end
        room = self._buffer[end:] if end else self._buffer
        try:
            if not self._ancillary_space:
                count = self._stream.recv_into(room, 0, flags)
            else:
                count, ancillary, result, _ = self._stream.recvmsg_into(
                    (room,), self._ancillary_space, flags | _CLOSE_ON_EXEC
                )
                if ancillary or result & _TRUNCATED:
                    self._collect(ancillary, result)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self._peer}: {error}") from error
        if not count:
            if not end:
                raise EOFError
            raise ConnectionLostError(f"{self._peer} closed the connection {end} bytes into a frame")
        self._end = end + count
        self.count += count

    def _make_room(self) -> None:
        """Move the begun frame to the front of the buffer, and into a larger one if its header needs it."""
        begun = self._buffer[self._start : self._end]
        need = PREFIX_SIZE + (self._prefix.header_length if self._prefix is not None else 0)
        if len(begun) == len(self._buffer):  # its length is only announced: grow as it comes
            self._buffer = memoryview(bytearray(min(need, 2 * len(begun))))
        self._buffer[: len(begun)] = begun
        self._start, self._end = 0, len(begun)

    def _collect(self, ancillary: list[tuple[int, int, bytes]], result: int) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._descriptors += array.array("i", data[: len(data) - len(data) % _DESCRIPTOR])
        if result & _TRUNCATED or len(self._descriptors) > 2 * self._limits.descriptors:
            raise ProtocolError(f"more than {self._limits.descriptors} descriptors came with a frame")

    def _claim(self, count: int) -> list[int]:
        """Return the descriptors that a frame announced: they came with its first byte, or before."""
        came = len(self._descriptors)
        # What came with bytes that are not parsed yet may belong to the next frame.
        if came < count or (came > count and self._start == self._end):
            raise ProtocolError(f"a frame announced {count} descriptors, {came} came with it")
        claimed = self._descriptors[:count]
        del self._descriptors[:count]
        return claimed

    def _fail(self, error: BaseException) -> None:
        self.failure = str(error) or type(error).__name__
        self.close_descriptors()
