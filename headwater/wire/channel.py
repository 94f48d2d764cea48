"""One connected stream socket that carries frames, blocking for servers and non-blocking for workers.

The socket stays in blocking mode; an exchange asks for non-blocking calls one by one (MSG_DONTWAIT),
and timeouts are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO), so a small frame costs one system call
each way. What has been read of a frame is kept in the channel, so a read may stop anywhere and go on
later. One thread reads at a time; any number may send.

With TLS the stream is not the socket but stands for it, and may hold bytes that poll knows nothing of:
only `pending` tells.
"""

from __future__ import annotations

import array
import contextlib
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from headwater.errors import ConnectionLostError
from headwater.messages import AnyMessage
from headwater.wire.encrypted import EncryptedStream
from headwater.wire.fork import close_in_child
from headwater.wire.frames import Limits, encode
from headwater.wire.incoming import Array, Incoming, PlaceOf, Received, Span, StaticProgress
from headwater.wire.sockets import keep_alive, peer_name, tcp_info, timeval, tune_tcp
from headwater.wire.stream import ByteStream

__all__ = ["Array", "Channel", "Outgoing", "PlaceOf", "Received", "StaticProgress"]

_JOINED = 16 << 10  # bytes up to which copying a payload is cheaper than handing the kernel two arrays
_UNIX_BUFFER = 512 << 10  # bytes; some 10 % faster than the default. TCP tunes its own, unless told
# Plain numbers: the socket module's flags are enums, and each operation on one costs most of a microsecond.
_NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
NO_WAIT = int(socket.MSG_DONTWAIT)


@dataclass(slots=True)
class Outgoing:
    """A frame to send: C-contiguous arrays as payload, and descriptors, which stay the sender's."""

    message: AnyMessage
    buffers: Sequence[Array] = ()
    descriptors: Sequence[int] = ()


class Channel:
    """Frames over one connected stream, a Unix or TCP socket or TLS over it, which it owns from now on.

    Attributes:
        peer: who is at the other end, for logs: "tcp:127.0.0.1:4000" or "unix pid 123".
        can_pass_descriptors: whether open files can travel with frames (a Unix socket).
        sent: bytes so far, before encryption; without what travels as descriptors.
        transport: "unix", "tcp" or "tls".
    """

    def __init__(self, connection: ByteStream, limits: Limits | None = None) -> None:
        connection.settimeout(None)
        self._stream = connection
        self.peer = peer_name(connection)
        self.can_pass_descriptors = connection.family == socket.AF_UNIX
        encrypted = "tls" if isinstance(connection, EncryptedStream) else "tcp"
        self.transport = "unix" if self.can_pass_descriptors else encrypted
        self._incoming = Incoming(connection, limits or Limits(), self.peer)
        self.sent = 0
        self._receive_timeout: float | None = None  # what the kernel has been told
        self._send_timeout: float | None = None
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._reaping = threading.Lock()
        self._closed = False
        self._takes_no_more = False  # the peer has ended the connection, and what it sent may be read yet
        self._passing: Sequence[tuple[int, int, array.array[int]]] = ()  # descriptors of the frame being sent
        self._rest: Span | None = None  # of a frame that `try_send` began
        close_in_child(self)
        if self.can_pass_descriptors:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        else:
            tune_tcp(connection)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once it is closed."""
        return self._stream.fileno()

    @property
    def received(self) -> int:
        """Bytes so far, as `sent`."""
        return self._incoming.count

    def send(
        self,
        message: AnyMessage,
        *,
        request: int = 0,
        buffers: Sequence[Array] = (),
        descriptors: Sequence[int] = (),
        timeout: float | None = None,
    ) -> None:
        """Send one frame; blocks until the kernel has all of it, and frames of other threads before it.

        Args:
            request: id of the request that this is, or answers.
            buffers: C-contiguous arrays, together the payload; free again when this returns.
            descriptors: open files to pass on; they stay the caller's.
            timeout: seconds without progress after which the connection is given up.

        Raises:
            UsageError: the message cannot be sent; nothing was.
            ConnectionLostError: the connection is closed, or the peer took nothing for `timeout`
                seconds: as part of a frame may be out, the connection is then closed here. Where the peer
                has ended it, what the peer sent before can still be received.
        """
        head = encoded(message, buffers, descriptors, request)  # before anything is sent, as it may fail
        if timeout is None:
            self._writing.acquire()
        elif not self._writing.acquire(timeout=timeout):
            self.close()
            raise self._given_up(timeout)
        try:
            if self._closed or self._takes_no_more:
                raise self._is_closed()
            if timeout != self._send_timeout:
                self._send_timeout = self._tell_kernel(socket.SO_SNDTIMEO, timeout)
            if self._rest is not None:
                self._push_all(self._rest)
            unsent = self.start(message, buffers, descriptors, request, 0, head)
            if unsent is not None:
                self._push_all(unsent)
        except BlockingIOError as error:
            self.close()
            raise self._given_up(timeout) from error
        except BaseException as error:
            self._cannot_send(error)
            raise
        finally:
            self._writing.release()
            if self._closed:
                self._reap()

    def try_send(
        self,
        message: AnyMessage,
        *,
        request: int = 0,
        buffers: Sequence[Array] = (),
        descriptors: Sequence[int] = (),
    ) -> bool:
        """Send as much of a frame as the kernel takes at once; whether that is all. Does not block.

        What is left stays here, with its `buffers`, until `flush` or the next `send` sends it.

        Raises:
            UsageError: the message cannot be sent; nothing was.
            ConnectionLostError: the connection is closed, or broken.
        """
        head = encoded(message, buffers, descriptors, request)
        self._writing.acquire()
        try:
            if self._closed or self._takes_no_more:
                raise self._is_closed()
            assert self._rest is None, "flush before the next frame"
            self._rest = self.start(message, buffers, descriptors, request, NO_WAIT, head)
            while self._rest is not None:
                self._rest = self.push(self._rest, NO_WAIT)
            return True
        except BlockingIOError:
            return False
        except BaseException as error:
            self._cannot_send(error)
            raise
        finally:
            self._writing.release()
            if self._closed:
                self._reap()

    def flush(self) -> None:
        """Send what `try_send` left; blocks for the peer to take it.

        Raises:
            ConnectionLostError: the connection is closed, or broken.
        """
        if self._rest is None:
            return
        self._writing.acquire()
        try:
            if self._closed or self._takes_no_more:
                raise self._is_closed()
            if self._send_timeout is not None:
                self._send_timeout = self._tell_kernel(socket.SO_SNDTIMEO, None)
            self._push_all(self._rest)
        except BaseException as error:
            self._cannot_send(error)
            raise
        finally:
            self._writing.release()
            if self._closed:
                self._reap()

    def _cannot_send(self, error: BaseException) -> None:
        """A frame has not left whole, so none can follow it.

        A peer may say that it leaves and end the connection while something is sent to it: its last words
        are still to be read. Any other failure ends the connection.
        """
        if isinstance(error.__cause__, BrokenPipeError | ConnectionResetError):
            self._takes_no_more = True
        elif not self._takes_no_more:
            self.close()

    def _push_all(self, unsent: Span | None) -> None:
        """Send the rest of a frame; blocks for the peer to take it."""
        while unsent is not None:
            self._rest = unsent = self.push(unsent, 0)

    def receive(self, place: StaticProgress | None = None, timeout: float | None = None) -> Received | None:
        """Return the next frame, or None where the peer, or `close`, ended the connection between frames.

        Blocks. The caller owns the descriptors of what is returned.

        Args:
            place: given the message and the bytes of its payload before any of them is stored,
                returns the writable arrays they go to, of as many bytes together. Without it a
                payload is a protocol error.
            timeout: seconds.

        Raises:
            TimeoutError: `timeout` has passed; a later call goes on where this one stopped.
            ConnectionLostError: the connection broke, or ended inside a frame.
            ProtocolError: what came is not a frame that this side can take. The connection must be
                closed; it can still be sent on.
        """
        self._reading.acquire()
        try:
            if self._closed:
                return None
            if self._incoming.failure:
                raise self._is_broken()
            until = math.inf if timeout is None else time.monotonic() + timeout
            return self.wait(place, None, timeout, until)
        except EOFError:
            return None
        except BlockingIOError:
            raise TimeoutError(f"no frame from {self.peer} within {timeout} s") from None
        finally:
            self._reading.release()
            if self._closed:
                self._reap()

    def finish(self) -> None:
        """Send nothing more: the peer sees the end after what was sent. It may still send."""
        with self._writing:
            try:
                self._stream.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the peer ended it first
        if self._closed:
            self._reap()

    def keep_alive(self, seconds: float) -> None:
        """Have the end of the peer's machine noticed about so long after its last sign of life.

        By default that is a minute. Without effect on a Unix socket, which ends with the peer.
        """
        if not self.can_pass_descriptors and not self._closed:
            with contextlib.suppress(OSError):  # it ended just now
                keep_alive(self._stream, seconds)

    def acknowledgements(self) -> bytes:
        """What the kernel knows of the peer's, see `life`; b"" where it knows nothing."""
        return b"" if self.can_pass_descriptors else tcp_info(self._stream)

    def close(self) -> None:
        """End the connection; a thread that is blocked in it wakes up. May be called twice."""
        self._closed = True
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer ended it first, or this is the second call
        self._reap()

    def close_descriptors(self) -> None:
        """Let go of the connection in a forked child, without ending it for the parent."""
        self._closed = True
        self._reading, self._writing, self._reaping = threading.Lock(), threading.Lock(), threading.Lock()
        self._incoming.close_descriptors()
        self._stream.close()

    # ── for one thread that drives several channels at once, see `headwater.wire.exchange` ───────
    # It calls these between `enter` and `leave`; `send` and `receive` hold the lock of their side.

    def enter(self) -> None:
        """Take both sides: until `leave` no other thread reads, and others that send wait. May block.

        Raises:
            ConnectionLostError: it is closed, or nothing more can be read from it; `leave` all the same.
        """
        self._reading.acquire()
        self._writing.acquire()
        if self._closed:
            raise self._is_closed()
        if self._incoming.failure:
            raise self._is_broken()

    def leave(self) -> None:
        """Give both sides back."""
        self._writing.release()
        self._reading.release()
        if self._closed:
            self._reap()

    def start(
        self,
        message: AnyMessage,
        buffers: Sequence[Array],
        descriptors: Sequence[int],
        request: int,
        flags: int = NO_WAIT,
        head: bytes = b"",
    ) -> Span | None:
        """Send a small frame at once; return what is left to `push`, None if nothing is.

        Does not block unless `flags` is 0. `head`: what `encoded` has made of the others, if it was called.

        Raises:
            UsageError: the message cannot be sent; nothing was.
            ConnectionLostError: the connection broke.
        """
        length = 0
        for buffer in buffers:
            length += buffer.nbytes
        if not head:
            head = encode(message, request=request, payload_length=length, flags=len(descriptors))
        if descriptors:
            assert self.can_pass_descriptors
            self._passing = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        if descriptors or length > _JOINED:
            return Span((memoryview(head), *buffers))
        data = b"".join((head, *cast(Sequence[bytes], buffers))) if length else head
        try:
            sent = self._stream.send(data, flags | _NO_SIGNAL)
        except BlockingIOError:
            if not flags:
                raise
            sent = 0
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self.peer}: {error}") from error
        self.sent += sent
        return None if sent == len(data) else Span((memoryview(data)[sent:],))

    def push(self, unsent: Span, flags: int = NO_WAIT) -> Span | None:
        """Send more of a frame with one system call; return what is left, None if nothing is.

        Raises BlockingIOError where the kernel takes nothing now, ConnectionLostError.
        """
        try:
            sent = self._stream.sendmsg(unsent.views(), self._passing, flags | _NO_SIGNAL)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self.peer}: {error}") from error
        self._passing = ()  # they left with the first byte
        unsent.advance(sent)
        self.sent += sent
        return unsent if unsent.left else None

    def wait(
        self, place: StaticProgress | PlaceOf | None, index: int | None, left: float | None, until: float
    ) -> Received:
        """Block until a frame is there, for at most `left` seconds, which end at `until`; None: for ever.

        Raises BlockingIOError when they are over, EOFError at the end, and otherwise as `receive`.
        """
        flags = 0 if left is None and self._receive_timeout is None else self._wait_at_most(left)
        advance = self._incoming.advance
        while (received := advance(place, index, flags)) is None:
            if left is not None:
                left = until - time.monotonic()
                if left <= 0:
                    raise BlockingIOError
                self._wait_at_most(left)
        return received

    def advance(self, place: PlaceOf, index: int) -> Received | None:
        """Read more, with one system call; the next frame, if that completed it. `index` is for `place`.

        Raises BlockingIOError where nothing is there, EOFError at the end, and otherwise as `receive`.
        """
        return self._incoming.advance(place, index, NO_WAIT)

    def buffered(self, place: PlaceOf, index: int) -> Received | None:
        """The next frame, if it was read ahead with the one before; reads nothing."""
        return self._incoming.buffered(place, index)

    def pending(self) -> bool:
        """Whether the stream holds bytes that poll knows nothing of."""
        return isinstance(self._stream, EncryptedStream) and self._stream.pending()

    def ended(self) -> ConnectionLostError:
        """What to raise where EOFError came before an answer."""
        return ConnectionLostError(f"{self.peer} closed the connection before it answered")

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _wait_at_most(self, left: float | None) -> int:
        """Have the next read wait for about `left` seconds, None for ever; return the flags for it.

        The kernel keeps what it was told last, so it is told again only where that is off by a tenth.
        """
        told = self._receive_timeout
        if left is None:
            if told is not None:
                self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, None)
        elif left <= 0:
            return NO_WAIT
        elif told is None or not 0.9 * told < left <= told:
            self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, left)
        return 0

    def _tell_kernel(self, option: int, timeout: float | None) -> float | None:
        self._stream.setsockopt(socket.SOL_SOCKET, option, timeval(timeout))
        return timeout

    def _is_broken(self) -> ConnectionLostError:
        return ConnectionLostError(f"nothing more can be read from {self.peer}: {self._incoming.failure}")

    def _is_closed(self) -> ConnectionLostError:
        return ConnectionLostError(f"the connection to {self.peer} is closed")

    def _given_up(self, timeout: float | None) -> ConnectionLostError:
        return ConnectionLostError(f"{self.peer} took nothing for {timeout} s: connection given up")

    def _reap(self) -> None:
        """Close the descriptors unless a thread is inside: its number could be another file's by then."""
        with self._reaping:
            if not self._reading.locked() and not self._writing.locked():
                self._incoming.close_descriptors()
                self._stream.close()


def encoded(message: AnyMessage, buffers: Sequence[Array], descriptors: Sequence[int], request: int) -> bytes:
    """Prefix and header of a frame that these follow.

    Raises:
        UsageError: the message cannot be sent.
    """
    length = 0
    for buffer in buffers:
        length += buffer.nbytes
    return encode(message, request=request, payload_length=length, flags=len(descriptors))
