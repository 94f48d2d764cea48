"""One connected stream socket that carries frames, blocking for servers and non-blocking for workers.

The socket stays in blocking mode; `exchange` asks for non-blocking calls one by one (MSG_DONTWAIT),
and timeouts are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO), so a small frame costs one system call
each way. What has been read of a frame is kept in the channel, so a read may stop anywhere and go on
later. One thread reads at a time; any number may send.
"""

from __future__ import annotations

import array
import math
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from headwater.errors import ConnectionLostError, StalledError
from headwater.messages import AnyMessage
from headwater.wire.fork import close_in_child
from headwater.wire.frames import Limits, encode
from headwater.wire.incoming import Array, Incoming, Place, PlaceOf, Received, Span
from headwater.wire.sockets import peer_name, timeval

__all__ = ["Array", "Channel", "Outgoing", "Place", "PlaceOf", "Received", "exchange"]

_JOINED = 16 << 10  # bytes up to which copying a payload is cheaper than handing the kernel two arrays
_UNIX_BUFFER = 512 << 10  # bytes; some 10 % faster than the default. TCP tunes its own, unless told
# Plain numbers: the socket module's flags are enums, and each operation on one costs most of a microsecond.
_NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
_NO_WAIT = int(socket.MSG_DONTWAIT)


@dataclass(slots=True)
class Outgoing:
    """A frame to send: C-contiguous arrays as payload, and descriptors, which stay the sender's."""

    message: AnyMessage
    buffers: Sequence[Array] = ()
    descriptors: Sequence[int] = ()


class Channel:
    """Frames over one connected stream socket, Unix or TCP, which it owns from now on.

    Attributes:
        peer: who is at the other end, for logs: "tcp:127.0.0.1:4000" or "unix pid 123".
        can_pass_descriptors: whether open files can travel with frames (a Unix socket).
    """

    def __init__(self, connection: socket.socket, limits: Limits | None = None) -> None:
        connection.settimeout(None)
        self._socket = connection
        self.peer = peer_name(connection)
        self.can_pass_descriptors = connection.family == socket.AF_UNIX
        self._incoming = Incoming(connection, limits or Limits(), self.peer)
        self._receive_timeout: float | None = None  # what the kernel has been told
        self._send_timeout: float | None = None
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._reaping = threading.Lock()
        self._closed = False
        self._passing: Sequence[tuple[int, int, array.array[int]]] = ()  # descriptors of the frame being sent
        close_in_child(self)
        if self.can_pass_descriptors:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once it is closed."""
        return self._socket.fileno()

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
            ConnectionLostError: the connection is closed, or the peer took nothing for `timeout`
                seconds: as part of a frame may be out, the connection is then closed here.
        """
        if timeout is None:
            self._writing.acquire()
        elif not self._writing.acquire(timeout=timeout):
            self.close()
            raise self._given_up(timeout)
        try:
            if self._closed:
                raise self._is_closed()
            if timeout != self._send_timeout:
                self._send_timeout = self._tell_kernel(socket.SO_SNDTIMEO, timeout)
            unsent = self._start(message, buffers, descriptors, request, 0)
            while unsent is not None:
                unsent = self._push(unsent, 0)
        except BlockingIOError as error:
            self.close()
            raise self._given_up(timeout) from error
        except BaseException:
            self.close()
            raise
        finally:
            self._writing.release()
            if self._closed:
                self._reap()

    def receive(self, place: Place | None = None, timeout: float | None = None) -> Received | None:
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
            return self._receive(place, None, timeout, until)
        except EOFError:
            return None
        except BlockingIOError:
            raise TimeoutError(f"no frame from {self.peer} within {timeout} s") from None
        finally:
            self._reading.release()
            if self._closed:
                self._reap()

    def close(self) -> None:
        """End the connection; a thread that is blocked in it wakes up. May be called twice."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer ended it first, or this is the second call
        self._reap()

    def close_descriptors(self) -> None:
        """Let go of the connection in a forked child, without ending it for the parent."""
        self._closed = True
        self._reading, self._writing, self._reaping = threading.Lock(), threading.Lock(), threading.Lock()
        self._incoming.close_descriptors()
        self._socket.close()

    # ── what `send`, `receive` and `exchange` share; whoever calls these holds the lock of that side ──

    def _start(
        self,
        message: AnyMessage,
        buffers: Sequence[Array],
        descriptors: Sequence[int],
        request: int,
        flags: int,
    ) -> Span | None:
        """Send a small frame at once; return what is left to `_push`, None if nothing is."""
        length = 0
        for buffer in buffers:
            length += buffer.nbytes
        head = encode(message, request=request, payload_length=length, flags=len(descriptors))
        if descriptors:
            assert self.can_pass_descriptors
            self._passing = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        if descriptors or length > _JOINED:
            return Span((memoryview(head), *buffers))
        data = b"".join((head, *cast(Sequence[bytes], buffers))) if length else head
        try:
            sent = self._socket.send(data, flags | _NO_SIGNAL)
        except BlockingIOError:
            if not flags:
                raise
            sent = 0
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self.peer}: {error}") from error
        return None if sent == len(data) else Span((memoryview(data)[sent:],))

    def _push(self, unsent: Span, flags: int) -> Span | None:
        """Send more of a frame with one system call; return what is left, None if nothing is."""
        try:
            sent = self._socket.sendmsg(unsent.views(), self._passing, flags | _NO_SIGNAL)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError(f"lost the connection to {self.peer}: {error}") from error
        self._passing = ()  # they left with the first byte
        unsent.advance(sent)
        return unsent if unsent.left else None

    def _receive(
        self, place: Place | PlaceOf | None, index: int | None, left: float | None, until: float
    ) -> Received:
        """Block until a frame is there; BlockingIOError: not in the `left` seconds (None: for ever)."""
        flags = self._wait_at_most(left)
        advance = self._incoming.advance
        while (received := advance(place, index, flags)) is None:
            if left is not None:
                left = until - time.monotonic()
                if left <= 0:
                    raise BlockingIOError
                self._wait_at_most(left)
        return received

    def _wait_at_most(self, left: float | None) -> int:
        """Have the next read wait for about `left` seconds, None for ever; return the flags for it.

        The kernel keeps what it was told last, so it is told again only where that is off by a tenth.
        """
        told = self._receive_timeout
        if left is None:
            if told is not None:
                self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, None)
        elif left <= 0:
            return _NO_WAIT
        elif told is None or not 0.9 * told < left <= told:
            self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, left)
        return 0

    def _tell_kernel(self, option: int, timeout: float | None) -> float | None:
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeval(timeout))
        return timeout

    def _is_broken(self) -> ConnectionLostError:
        return ConnectionLostError(f"nothing more can be read from {self.peer}: {self._incoming.failure}")

    def _is_closed(self) -> ConnectionLostError:
        return ConnectionLostError(f"the connection to {self.peer} is closed")

    def _is_ended(self) -> ConnectionLostError:
        return ConnectionLostError(f"{self.peer} closed the connection before it answered")

    def _given_up(self, timeout: float | None) -> ConnectionLostError:
        return ConnectionLostError(f"{self.peer} took nothing for {timeout} s: connection given up")

    def _enter(self) -> None:
        """Take both sides, for `exchange`."""
        self._reading.acquire()
        self._writing.acquire()

    def _leave(self) -> None:
        self._writing.release()
        self._reading.release()
        if self._closed:
            self._reap()

    def _reap(self) -> None:
        """Close the descriptors unless a thread is inside: its number could be another file's by then."""
        with self._reaping:
            if not self._reading.locked() and not self._writing.locked():
                self._incoming.close_descriptors()
                self._socket.close()


def exchange(
    channels: Sequence[Channel],
    outgoing: Sequence[Outgoing],
    on_received: Callable[[int, Received], bool],
    place: PlaceOf,
    deadline_s: float | None,
    request: int,
) -> None:
    """Send `outgoing[i]` on `channels[i]` and take what comes back, all at once, in the calling thread.

    Reads while it still writes, so two sides with full buffers never wait for each other. Returns
    when everything is sent and `on_received` has returned True once for every channel. No other
    thread may read from these channels meanwhile; others that send on them wait.

    Args:
        on_received: given i and a frame from `channels[i]`; True: this channel has given its answer.
        place: as for `Channel.receive`, with i in front.
        deadline_s: seconds from now for all of it.
        request: id of the frames that are sent.

    Raises:
        StalledError: the deadline has passed; it names who has not answered.
        ConnectionLostError: a channel broke or was closed before it gave its answer; it names the peer.
        ProtocolError: as for `Channel.receive`.
    After any error, also of `on_received` and `place`, frames may be half sent: close the channels.
    """
    for channel in channels:
        channel._enter()
    try:
        for channel in channels:
            if channel._closed:
                raise channel._is_closed()
            if channel._incoming.failure:
                raise channel._is_broken()
        unsent: dict[int, Span] = {}
        lost: dict[int, ConnectionLostError] = {}
        for index, frame in enumerate(outgoing):
            try:
                rest = channels[index]._start(
                    frame.message, frame.buffers, frame.descriptors, request, _NO_WAIT
                )
            except ConnectionLostError as error:
                lost[index] = error
            else:
                if rest is not None:
                    unsent[index] = rest
        if len(channels) == 1 and not unsent and not lost:
            _listen(channels[0], on_received, place, deadline_s)
        else:
            _Turn(channels, on_received, place, deadline_s, unsent, lost).drive()
    finally:
        for channel in channels:
            channel._leave()


def _listen(
    channel: Channel, on_received: Callable[[int, Received], bool], place: PlaceOf, deadline_s: float | None
) -> None:
    """Wait for the answer of a single channel: no poll, as its read may block."""
    until = math.inf if deadline_s is None else time.monotonic() + deadline_s
    left = deadline_s
    while True:
        try:
            received = channel._receive(place, 0, left, until)
        except BlockingIOError:
            raise _stalled((channel,), deadline_s) from None
        except EOFError:
            raise channel._is_ended() from None
        if on_received(0, received):
            return
        if left is not None:
            left = until - time.monotonic()


class _Turn:
    """An `exchange` that needs a poll: several channels, or frames too large to go out at once.

    Args:
        unsent: what is left of the frame of a channel.
        lost: why a channel cannot be written to; what it still says may tell more.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        on_received: Callable[[int, Received], bool],
        place: PlaceOf,
        deadline_s: float | None,
        unsent: dict[int, Span],
        lost: dict[int, ConnectionLostError],
    ) -> None:
        self._channels = channels
        self._on_received = on_received
        self._place = place
        self._deadline_s = deadline_s
        self._until = math.inf if deadline_s is None else time.monotonic() + deadline_s
        self._unsent = unsent
        self._lost = lost
        self._unanswered = set(range(len(channels)))

    def drive(self) -> None:
        """Read and write whatever is ready, until everything is sent and answered."""
        poller = select.poll()
        index_of: dict[int, int] = {}
        for index, channel in enumerate(self._channels):
            self._take(index, channel._incoming.buffered(self._place, index))
            if events := self._wanted(index):
                index_of[channel.fileno()] = index
                poller.register(channel, events)
        while self._unanswered or self._unsent:
            ready = poller.poll(self._milliseconds_left())
            if not ready:
                waiting = sorted(self._unanswered | set(self._unsent))
                raise _stalled([self._channels[index] for index in waiting], self._deadline_s)
            for descriptor, events in ready:
                index = index_of[descriptor]
                if index in self._unanswered and events & ~select.POLLOUT:
                    self._read(index)
                if index in self._unsent and events & ~select.POLLIN:
                    self._push(index)
                if wanted := self._wanted(index):
                    poller.modify(descriptor, wanted)
                else:
                    poller.unregister(descriptor)

    def _wanted(self, index: int) -> int:
        """Return what poll should watch a channel for, 0 once it is done."""
        reading = select.POLLIN if index in self._unanswered else 0
        return reading | select.POLLOUT if index in self._unsent else reading

    def _read(self, index: int) -> None:
        channel = self._channels[index]
        try:
            received = channel._incoming.advance(self._place, index, _NO_WAIT)
        except BlockingIOError:
            return
        except EOFError:
            raise self._lost.get(index) or channel._is_ended() from None
        except ConnectionLostError as error:
            if index in self._lost:
                raise self._lost[index] from error  # it could not be written to before it could not be read
            raise
        self._take(index, received)

    def _take(self, index: int, received: Received | None) -> None:
        """Hand out a frame, and those read together with it, until the channel has given its answer."""
        while received is not None:
            if self._on_received(index, received):
                self._unanswered.discard(index)
                return
            received = self._channels[index]._incoming.buffered(self._place, index)

    def _push(self, index: int) -> None:
        try:
            if self._channels[index]._push(self._unsent[index], _NO_WAIT) is None:
                del self._unsent[index]
        except BlockingIOError:
            pass
        except ConnectionLostError as error:
            del self._unsent[index]
            self._lost[index] = error

    def _milliseconds_left(self) -> int | None:
        if self._until == math.inf:
            return None
        return max(0, math.ceil((self._until - time.monotonic()) * 1000))


def _stalled(channels: Sequence[Channel], deadline_s: float | None) -> StalledError:
    peers = ", ".join(channel.peer for channel in channels)
    return StalledError(f"no answer from {peers} within {deadline_s} s")
