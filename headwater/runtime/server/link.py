"""The log between a server and the sequencer: many writers, ordered, coalesced.

Whoever finds the channel free sends everything that is pending as one message; nobody waits for the
channel, and what is put while it is busy leaves with the next message. A link outlives its channel: what was
sent over one that broke is asked for again by the server, when it connects anew.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from headwater.errors import ConnectionLostError
from headwater.messages import AnyEntry, AnyMessage, Entries, Held, Reports, StartTerm, Sums
from headwater.runtime.server.applier import Progress
from headwater.wire.channel import Channel


class _Link:
    """Both directions: a channel, and the order in which threads use it."""

    def __init__(self) -> None:
        self._sending = threading.Lock()
        self._channel: Channel | None = None

    def flush(self) -> None:
        """Send what is pending unless another thread is at it, which then sends this too."""
        while self._pending() and self._channel is not None and self._sending.acquire(blocking=False):
            channel = self._channel
            try:
                for message in self._take() if channel is not None else ():
                    channel.send(message)
            except ConnectionLostError:
                self._lost(channel)
            finally:
                self._sending.release()

    def _hang_up(self) -> None:
        """End the channel there is, which wakes a thread that is blocked in it."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _lost(self, channel: Channel) -> None:
        if self._channel is channel:
            self._channel = None

    def _pending(self) -> bool:
        raise NotImplementedError

    def _take(self) -> Iterable[AnyMessage]:
        raise NotImplementedError


class EntryLink(_Link):
    """From the sequencer of `term` to one server."""

    def __init__(self, term: int) -> None:
        super().__init__()
        self._term = term
        self._agreed: StartTerm | None = None
        self._entries: deque[AnyEntry] = deque()
        self._committed = self._told = 0

    def connect(
        self, channel: Channel, agreed: StartTerm | None, entries: Iterable[AnyEntry], committed: int
    ) -> None:
        """Send over `channel` from now on: what the server must be told first, then these entries."""
        self._hang_up()
        with self._sending:
            self._agreed = agreed
            self._entries = deque(entries)
            self._committed, self._told = committed, 0
            self._channel = channel

    def agree(self, agreed: StartTerm) -> None:
        """Queue where the log goes on, before any entry."""
        self._agreed = agreed

    def put(self, entries: Sequence[AnyEntry], committed: int) -> None:
        """Append; the caller's lock gives the order. Does not block."""
        if self._channel is not None:  # else the server will say what it lacks
            self._entries.extend(entries)
            self._committed = committed

    def _pending(self) -> bool:
        return bool(self._entries) or self._agreed is not None or self._committed > self._told

    def _take(self) -> Iterable[AnyMessage]:
        agreed, self._agreed = self._agreed, None
        if agreed is not None:
            yield agreed
        batch = tuple(self._entries.popleft() for _ in range(len(self._entries)))
        committed = self._told = self._committed
        if batch or committed:
            yield Entries(batch, self._term, committed)


class ReportLink(_Link):
    """From server `index` to the sequencer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        self._term = 0
        self._held: deque[Held] = deque()
        self._measured: deque[Sums] = deque()
        self._prepared = self._told = 0
        self._putting = threading.Lock()

    def reset(self, term: int) -> None:
        """Queue what comes from now on for the sequencer of `term`, whom `Recovery` tells of all before.

        Under the shard's lock, together with that.
        """
        self._hang_up()
        with self._sending, self._putting:
            self._term = term
            self._held.clear()
            self._measured.clear()
            self._prepared = self._told = 0

    def connect(self, channel: Channel) -> None:
        """Send over `channel` from now on, what is queued first."""
        with self._sending:
            self._channel = channel
        self.flush()

    def put(self, held: Iterable[Held], progress: Progress) -> None:
        """Append; what was done in another term than this link's means nothing to its sequencer."""
        with self._putting:
            self._held.extend(held)
            if progress.term == self._term:
                self._measured.extend(progress.measured)
                self._prepared = max(self._prepared, progress.prepared)

    def _pending(self) -> bool:
        return bool(self._held) or bool(self._measured) or self._prepared > self._told

    def _take(self) -> Iterable[AnyMessage]:
        batch = tuple(self._held.popleft() for _ in range(len(self._held)))
        measured = tuple(self._measured.popleft() for _ in range(len(self._measured)))
        prepared = self._told = self._prepared
        yield Reports(self._index, batch, self._term, prepared, measured)
