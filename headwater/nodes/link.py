"""One direction of the log between a server and the sequencer: many writers, ordered, coalesced.

Whoever finds the channel free sends everything that is pending as one message; nobody waits for the
channel, and what is put while it is busy leaves with the next message.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from headwater.messages import AnyMessage
from headwater.wire.channel import Channel

Item = TypeVar("Item")


class Link(Generic[Item]):
    """Items of one kind on their way over a channel that may be connected later.

    `wrap` makes a message of the pending items.
    """

    def __init__(self, wrap: Callable[[tuple[Item, ...]], AnyMessage]) -> None:
        self._wrap = wrap
        self._pending: deque[Item] = deque()
        self._sending = threading.Lock()
        self._channel: Channel | None = None

    def connect(self, channel: Channel) -> None:
        """Send over `channel` from now on, what is pending first."""
        self._channel = channel
        self.flush()

    def put(self, items: Iterable[Item]) -> None:
        """Append; the caller's lock gives the order. Does not block."""
        self._pending.extend(items)

    def flush(self) -> None:
        """Send what is pending unless another thread is at it, which then sends this too.

        Raises:
            ConnectionLostError: the channel is closed.
        """
        while self._pending and self._channel is not None and self._sending.acquire(blocking=False):
            try:
                batch = tuple(self._pending.popleft() for _ in range(len(self._pending)))
                self._channel.send(self._wrap(batch))
            finally:
                self._sending.release()
