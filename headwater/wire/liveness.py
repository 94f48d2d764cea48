"""Tells a peer whose machine is gone from one that is busy: the kernel of the second still acknowledges.

Only the kernel knows what was acknowledged, and its own limit for that (TCP_USER_TIMEOUT) also counts the
time in which a peer has no room for more, as one that computes, is stopped or restores a snapshot has none.
So whoever has a thread that wakes now and then looks for itself. Over Unix sockets there is nothing to tell:
a peer that is gone has closed them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from headwater.loggers import logger
from headwater.wire.channel import Channel

_log = logger("headwater")

SILENCE_S = 20.0
"""For how long a peer's machine may acknowledge nothing of what was sent to it."""

_INFO = struct.Struct("=2x2B20xI28xI")
"""Of Linux's tcp_info: retransmits, probes, unacked, last_ack_recv in ms."""
_RECENT_MS = 1000


def is_unanswered(info: bytes) -> bool:
    """Whether what was sent is not acknowledged, though it was sent again.

    A peer without room acknowledges that it has none; then nothing is on its way, and probes are answered.
    """
    retransmits, probes, unacked, quiet_ms = _INFO.unpack_from(info)
    return bool((unacked and retransmits) or probes > 1) and quiet_ms > _RECENT_MS


class PeerLiveness:
    """Gives up connections on which nothing was acknowledged for `silence_s`.

    A state machine but for `look`, which asks the kernel, and is for one thread at a time.
    """

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._since: WeakKeyDictionary[Channel, float] = WeakKeyDictionary()

    def look(self, channels: Iterable[Channel], now: float) -> None:
        """Close those that are silent for too long; `now` in monotonic seconds."""
        for channel in channels:
            if self.is_over(channel, channel.acknowledgements(), now):
                _log.warning(
                    "%s acknowledged nothing for %g s: the connection is given up",
                    channel.peer,
                    self._silence_s,
                )
                channel.close()

    def is_over(self, channel: Channel, info: bytes, now: float) -> bool:
        """Whether `info`, what the kernel says at `now`, is too much; b"" where it says nothing."""
        if not info or not is_unanswered(info):
            self._since.pop(channel, None)
            return False
        return now - self._since.setdefault(channel, now) >= self._silence_s
