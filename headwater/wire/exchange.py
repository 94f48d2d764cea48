"""One exchange over several channels: a request to each, an answer from each, in the calling thread.

Reads while it still writes, and never blocks in one channel while another is ready. It holds both sides of
every channel from beginning to end.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from headwater.errors import ConnectionLostError, StalledError
from headwater.messages import AnyMessage
from headwater.wire.channel import Array, Channel, encoded
from headwater.wire.incoming import PlaceOf, Received, Span


class Outgoing(Protocol):
    """A frame to send, as `headwater.wire.channel.Outgoing` is one."""

    @property
    def message(self) -> AnyMessage: ...
    @property
    def buffers(self) -> Sequence[Array]: ...
    @property
    def descriptors(self) -> Sequence[int]: ...


_LONGEST_POLL_MS = 1 << 30
"""What poll takes is an int; a longer wait polls again."""


def exchange(
    channels: Sequence[Channel],
    outgoing: Sequence[Outgoing],
    on_received: Callable[[int, Received], bool],
    place: PlaceOf,
    deadline_s: float | None,
    request: int,
    unanswered: Collection[int] | None = None,
    sent: Callable[[], None] | None = None,
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
        unanswered: the channels whose answer is still out; None: all.
        sent: called once everything is sent; not where nothing was to be.

    Raises:
        UsageError: a frame cannot be sent; none was, and the channels are as they were.
        StalledError: the deadline has passed; it names who has not answered.
        ConnectionLostError: a channel broke or was closed before it gave its answer; it names the peer.
        ProtocolError: as for `Channel.receive`.
    After any other error, also of `on_received` and `place`, frames may be half sent: close the channels.
    Where nothing was to be sent, more can be taken after a StalledError, with `unanswered`.
    """
    heads: list[bytes] = []
    if len(outgoing) > 1:  # else it is found before anything is sent as well
        heads = [encoded(frame.message, frame.buffers, frame.descriptors, request) for frame in outgoing]
    entered = 0
    try:
        for channel in channels:
            entered += 1
            channel.enter()
        unsent: dict[int, Span] = {}
        lost: dict[int, ConnectionLostError] = {}
        for index, frame in enumerate(outgoing):
            try:
                head = heads[index] if heads else b""
                rest = channels[index].start(
                    frame.message, frame.buffers, frame.descriptors, request, head=head
                )
            except ConnectionLostError as error:
                lost[index] = error
            else:
                if rest is not None:
                    unsent[index] = rest
        if sent is not None and outgoing and not unsent:
            sent()
        if len(channels) == 1 and not unsent and not lost and unanswered is None:
            _listen(channels[0], on_received, place, deadline_s)
        else:
            _Turn(channels, on_received, place, deadline_s, unsent, lost, unanswered, sent).drive()
    finally:
        for channel in channels[:entered]:
            channel.leave()


def _listen(
    channel: Channel, on_received: Callable[[int, Received], bool], place: PlaceOf, deadline_s: float | None
) -> None:
    """Wait for the answer of a single channel: no poll, as its read may block."""
    until = math.inf if deadline_s is None else time.monotonic() + deadline_s
    left = deadline_s
    while True:
        try:
            received = channel.wait(place, 0, left, until)
        except BlockingIOError:
            raise _stalled((channel,), deadline_s) from None
        except EOFError:
            raise channel.ended() from None
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
        unanswered: Collection[int] | None,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self._channels = channels
        self._on_received = on_received
        self._place = place
        self._deadline_s = deadline_s
        self._until = math.inf if deadline_s is None else time.monotonic() + deadline_s
        self._unsent = unsent
        self._lost = lost
        self._sent = sent
        self._unanswered = set(range(len(channels)) if unanswered is None else unanswered)

    def drive(self) -> None:
        """Read and write whatever is ready, until everything is sent and answered."""
        poller = select.poll()
        index_of: dict[int, int] = {}
        for index, channel in enumerate(self._channels):
            if index not in self._unanswered and index not in self._unsent:
                continue
            self._take(index, channel.buffered(self._place, index))
            if index in self._unanswered and channel.pending():
                self._read(index)
            if events := self._wanted(index):
                index_of[channel.fileno()] = index
                poller.register(channel, events)
        while self._unanswered or self._unsent:
            ready = poller.poll(self._milliseconds_left())
            if not ready and time.monotonic() >= self._until:
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
        while True:
            try:
                received = channel.advance(self._place, index)
            except BlockingIOError:
                return
            except EOFError:
                raise self._lost.get(index) or channel.ended() from None
            except ConnectionLostError as error:
                if index in self._lost:  # it could not be written to before it could not be read
                    raise self._lost[index] from error
                raise
            self._take(index, received)
            if index not in self._unanswered or not channel.pending():
                return

    def _take(self, index: int, received: Received | None) -> None:
        """Hand out a frame, and those read together with it, until the channel has given its answer."""
        while received is not None:
            if self._on_received(index, received):
                self._unanswered.discard(index)
                return
            received = self._channels[index].buffered(self._place, index)

    def _push(self, index: int) -> None:
        try:
            if self._channels[index].push(self._unsent[index]) is None:
                del self._unsent[index]
                if not self._unsent and self._sent is not None:
                    self._sent()
        except BlockingIOError:
            pass
        except ConnectionLostError as error:
            del self._unsent[index]
            self._lost[index] = error

    def _milliseconds_left(self) -> int | None:
        if self._until == math.inf:
            return None
        return min(max(0, math.ceil((self._until - time.monotonic()) * 1000)), _LONGEST_POLL_MS)


def _stalled(channels: Sequence[Channel], deadline_s: float | None) -> StalledError:
    peers = ", ".join(channel.peer for channel in channels)
    return StalledError(f"no answer from {peers} within {deadline_s} s")
