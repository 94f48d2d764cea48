"""What is to leave over one connection, in the order in which it was put there.

Any thread puts, one at a time sends. Whoever puts into an outbox that nobody empties is told so, and sees to
it that somebody does: its own thread, or another. So nothing is sent by two threads at once, and an outbox
that is empty needs no thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from headwater.errors import ConnectionLostError
from headwater.machines.actions import Close, Send
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater")


class Outbox:
    """Of `channel`. `drain` blocks for the peer to take what is sent; nothing else blocks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[Send | Close] = deque()
        self._sending = False

    def put(self, last: Send | Close) -> bool:
        """Let this leave after what was put before. True: the caller sees to it that `drain` is called."""
        with self._changed:
            self._waiting.append(last)
            called, self._sending = self._sending, True
            return not called

    def drain(self) -> None:
        """Send until nothing is left; what cannot be sent any more is dropped."""
        while (first := self._next()) is not None:
            try:
                if isinstance(first, Send):
                    self._channel.send(
                        first.message,
                        request=first.request,
                        buffers=first.buffers,
                        descriptors=first.descriptors,
                    )
                else:
                    self._channel.finish()
            except ConnectionLostError as error:
                _log.debug("not sent: %s", error)  # whoever reads from it finds the end

    def wait_until_empty(self, seconds: float) -> bool:
        """Block until all has left, for at most so long; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._sending, seconds)

    def _next(self) -> Send | Close | None:
        with self._changed:
            if self._waiting:
                return self._waiting.popleft()
            self._sending = False
            self._changed.notify_all()
            return None
