"""Splits over the members' connections: workers ask for them, the coordinator answers.

A worker has one request outstanding at a time. It is answered at once, from the thread of that worker's
connection, or later, from the thread of the worker whose message ended the wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.machines.splits import LeaseBook, Replies
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater.coordinator")


class LeaseDesk:
    """Answers all workers' requests.

    Args:
        recorded: for a member, what the log has recorded; blocks until it knows.
        recorded_now: the same, nothing where that cannot be told at once.
    """

    def __init__(
        self,
        workers: int,
        recorded: Callable[[m.Member], m.DataProgress],
        recorded_now: Callable[[], m.DataProgress],
    ) -> None:
        self._workers = workers
        self._recorded, self._recorded_now = recorded, recorded_now
        self._lock = threading.Lock()
        self._book: LeaseBook | None = None
        self._channels: dict[int, Channel] = {}

    def serve(self, member: m.Member, channel: Channel, message: m.Lease | m.Finish) -> None:
        """Take a worker's message and answer whoever is answered by it; blocks for sending alone."""
        book = self._open_book(member)
        with self._lock:
            self._channels[member.id] = channel
            if isinstance(message, m.Lease):
                replies = _leased(book, member, message)
            else:
                replies = book.finish(member.id, message)
        self._send(replies)

    def gone(self, member: int) -> None:
        """A worker died or left: its splits go back, from where the log recorded it."""
        with self._lock:
            known = self._channels.pop(member, None) is not None
        if known and self._book is not None:
            recorded = self._recorded_now()
            with self._lock:
                replies = self._book.gone(member, recorded)
            self._send(replies)

    def unvisited(self) -> list[m.Unvisited]:
        """What nobody reads any more of what all should have read together."""
        with self._lock:
            return self._book.unvisited() if self._book is not None else []

    def _open_book(self, member: m.Member) -> LeaseBook:
        """Made for the first worker that asks: by then a restored server knows what is done, and so does one
        that went on while there was no coordinator."""
        if self._book is None:
            recorded = self._recorded(member)
            with self._lock:
                if self._book is None:
                    self._book = LeaseBook(self._workers, recorded)
        return self._book

    def _send(self, replies: Replies) -> None:
        for member, reply in replies:
            channel = self._channels.get(member)
            try:
                if channel is not None:
                    channel.send(reply)
            except ConnectionLostError as error:
                _log.info("no split for member %d: %s", member, error)  # its own thread strikes it off


def _leased(book: LeaseBook, member: m.Member, lease: m.Lease) -> Replies:
    try:
        return book.lease(member.id, member.index, lease)
    except HeadwaterError as error:
        refusal = m.Refused(type(error).__name__, str(error))
        return [(member.id, m.Unleased(lease.number, True, refusal.reason, refusal))]
