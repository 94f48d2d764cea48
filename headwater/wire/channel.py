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
import struct
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
from headwater.wire.security import peer_credentials

__all__ = ["Array", "Channel", "Outgoing", "Place", "PlaceOf", "Received", "exchange"]

_JOINED = 16 << 10  # bytes up to which copying a payload is cheaper than handing the kernel two arrays
_TIMEVAL = struct.Struct("ll")
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
        self.peer = _peer_name(connection)
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
        _tune(connection)

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
        if not self._writing.acquire(timeout=-1 if timeout is None else timeout):
            self.close()
            raise ConnectionLostError(f"{self.peer} took nothing for {timeout} s: connection given up")
        try:
            self._check_open()
            if timeout != self._send_timeout:
                self._send_timeout = self._tell_kernel(socket.SO_SNDTIMEO, timeout)
            unsent = self._start(message, buffers, descriptors, request, 0)
            while unsent is not None:
                unsent = self._push(unsent, 0)
        except BlockingIOError as error:
            self.close()
            raise ConnectionLostError(
                f"{self.peer} took nothing for {timeout} s: connection given up"
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            self._leave(self._writing)

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
            return self._receive(place, None, timeout)
        except EOFError:
            return None
        except BlockingIOError:
            raise TimeoutError(f"no frame from {self.peer} within {timeout} s") from None
        finally:
            self._leave(self._reading)

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

    def _receive(self, place: Place | PlaceOf | None, index: int | None, timeout: float | None) -> Received:
        """Block until a frame is there; BlockingIOError after `timeout` seconds, else as `Incoming.advance`."""
        advance = self._incoming.advance
        if self._incoming.failure:
            raise ConnectionLostError(f"nothing more can be read from {self.peer}: {self._incoming.failure}")
        flags: int = 0
        until = math.inf
        if timeout is not None and timeout <= 0:
            flags = _NO_WAIT
        else:
            if timeout is not None:
                until = time.monotonic() + timeout
            if timeout != self._receive_timeout:
                self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, timeout)
        while (received := advance(place, index, flags)) is None:
            if until != math.inf:
                self._wait_at_most(until - time.monotonic())
        return received

    def _wait_at_most(self, left: float) -> None:
        """Shorten the kernel's timeout to `left` seconds, unless it is about that already."""
        if left <= 0:
            raise BlockingIOError
        if self._receive_timeout is None or left < 0.9 * self._receive_timeout:
            self._receive_timeout = self._tell_kernel(socket.SO_RCVTIMEO, left)

    def _tell_kernel(self, option: int, timeout: float | None) -> float | None:
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeval(timeout))
        return timeout

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLostError(f"the connection to {self.peer} is closed")

    def _leave(self, *held: threading.Lock) -> None:
        """Release locks, and close the socket if `close` had to leave that to the last one out."""
        for lock in held:
            lock.release()
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
    entered: list[Channel] = []
    try:
        for channel in channels:
            channel._reading.acquire()
            channel._writing.acquire()
            entered.append(channel)
            channel._check_open()
        turn = _Turn(channels, on_received, place, deadline_s)
        turn.send(outgoing, request)
        turn.listen()
    finally:
        for channel in entered:
            channel._leave(channel._reading, channel._writing)


class _Turn:
    """One `exchange`: what is still unsent, and which channels have not given their answer."""

    def __init__(
        self,
        channels: Sequence[Channel],
        on_received: Callable[[int, Received], bool],
        place: PlaceOf,
        deadline_s: float | None,
    ) -> None:
        self._channels = channels
        self._on_received = on_received
        self._place = place
        self._deadline_s = deadline_s
        self._until = math.inf if deadline_s is None else time.monotonic() + deadline_s
        self._unsent: dict[int, Span] = {}
        self._lost: dict[int, ConnectionLostError] = {}  # not writable any more, but perhaps it said why
        self._unanswered = set(range(len(channels)))

    def send(self, outgoing: Sequence[Outgoing], request: int) -> None:
        """Send every frame as far as its socket takes it without waiting."""
        for index, (channel, frame) in enumerate(zip(self._channels, outgoing, strict=True)):
            try:
                unsent = channel._start(frame.message, frame.buffers, frame.descriptors, request, _NO_WAIT)
            except ConnectionLostError as error:
                self._lost[index] = error
            else:
                if unsent is not None:
                    self._unsent[index] = unsent
                    self._push(index)

    def listen(self) -> None:
        """Go on until everything is sent and answered."""
        for index in range(len(self._channels)):
            self._take(index, self._channels[index]._incoming.buffered(self._place, index))
        if len(self._channels) == 1 and not self._unsent:
            self._listen_alone()
        else:
            self._drive()

    def _listen_alone(self) -> None:
        """A single channel needs no poll: it may block in the read."""
        while self._unanswered:
            left = None if self._deadline_s is None else self._until - time.monotonic()
            try:
                self._take(0, self._channels[0]._receive(self._place, 0, left))
            except BlockingIOError:
                raise self._stalled() from None
            except (ConnectionLostError, EOFError) as error:
                raise self._ended(0, error) from error

    def _drive(self) -> None:
        """Read and write whatever is ready."""
        poller = select.poll()
        index_of = {channel.fileno(): index for index, channel in enumerate(self._channels)}
        for descriptor, index in index_of.items():
            if self._wanted(index):
                poller.register(descriptor, self._wanted(index))
        while self._unanswered or self._unsent:
            ready = poller.poll(self._milliseconds_left())
            if not ready:
                raise self._stalled()
            for descriptor, events in ready:
                index = index_of[descriptor]
                if index in self._unanswered and events & ~select.POLLOUT:
                    self._read(index)
                if index in self._unsent and events & ~select.POLLIN:
                    self._push(index)
                if self._wanted(index):
                    poller.modify(descriptor, self._wanted(index))
                else:
                    poller.unregister(descriptor)

    def _wanted(self, index: int) -> int:
        reading = select.POLLIN if index in self._unanswered else 0
        return reading | select.POLLOUT if index in self._unsent else reading

    def _read(self, index: int) -> None:
        try:
            received = self._channels[index]._incoming.advance(self._place, index, _NO_WAIT)
        except BlockingIOError:
            return
        except (ConnectionLostError, EOFError) as error:
            raise self._ended(index, error) from error
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

    def _stalled(self) -> StalledError:
        peers = ", ".join(
            self._channels[index].peer for index in sorted(self._unanswered | set(self._unsent))
        )
        return StalledError(f"no answer from {peers} within {self._deadline_s} s")

    def _ended(self, index: int, error: Exception) -> ConnectionLostError:
        if index in self._lost:
            return self._lost[index]
        if isinstance(error, ConnectionLostError):
            return error
        return ConnectionLostError(f"{self._channels[index].peer} closed the connection before it answered")


def _peer_name(connection: socket.socket) -> str:
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


def timeval(timeout: float | None) -> bytes:
    """Return `timeout` seconds as the kernel's socket options take them; None never ends."""
    whole, part = divmod(0.0 if timeout is None else max(timeout, 1e-6), 1.0)
    return _TIMEVAL.pack(int(whole), int(part * 1e6))


def _tune(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
