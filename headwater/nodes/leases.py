"""Splits over the connection to the coordinator: a worker asks for them, the coordinator answers.

A worker has one request outstanding at a time. The coordinator answers at once, from the thread of
that worker's connection, or later, from the thread of the worker whose message ended the wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError, StalledError, named
from headwater.nodes.membership import Membership
from headwater.nodes.session import Session
from headwater.splits import LeaseBook, Replies
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater.worker")


class LeaseDesk:
    """The coordinator's side.

    Args:
        recorded: for a member, what the log has recorded; blocks until it knows.
        recorded_now: the same, nothing where that cannot be told at once.
    """

    def __init__(
        self,
        workers: int,
        recorded: Callable[[m.Member], m.Recorded],
        recorded_now: Callable[[], m.Recorded],
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


class LeaseClient:
    """The worker's side; used by the thread that uses the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._number = 0

    def next(self, request: Callable[[int], m.Lease], on_wait: Callable[[], None]) -> m.Leased | None:
        """The next split, None when there will be none; blocks while others may still give theirs back, and
        while the coordinator is away.

        `on_wait` is called once before a wait for others.

        Raises:
            ConfigurationError: the others make this call differently; names both.
            StalledError: nothing changed for `welcome.deadline` seconds; names who holds what.
            ConnectionLostError: the coordinator is gone.
        """
        self._number += 1
        began = time.monotonic()
        asked = _Asked(self._session.membership, request(self._number))
        try:
            reply = self._receive(asked, began, "")
            if isinstance(reply, m.Unleased) and not reply.over:
                on_wait()
                reply = self._receive(asked, began, reply.reason)
        finally:
            self._session.waiting += time.monotonic() - began
        return reply if isinstance(reply, m.Leased) else None

    def finish(self, finish: m.Finish) -> None:
        """Give back; does not wait for an answer, as there is none."""
        self._session.membership.tell(finish)

    def _receive(self, asked: _Asked, began: float, reason: str) -> m.Leased | m.Unleased:
        """The next answer to the outstanding request; earlier ones are of requests given up."""
        welcome, membership = self._session.welcome, self._session.membership
        while True:
            left = began + welcome.deadline - time.monotonic()
            if left <= 0:
                why = membership.beside(reason or "no word of why")
                raise StalledError(f"no split for {welcome.deadline:g} s: {why}")
            try:
                message = membership.next_message(min(left, welcome.patience))
            except TimeoutError:
                why = membership.beside(reason or "waits for a split")
                _log.warning("worker %d: %s", welcome.member.index, why)
                continue
            if isinstance(message, m.Welcome):
                asked.again()
                continue
            if not isinstance(message, m.Leased | m.Unleased):
                raise ProtocolError(f"the coordinator sent {type(message).__name__}, expected a split")
            if message.number != self._number:
                continue
            if isinstance(message, m.Unleased) and message.failure is not None:
                raise named(message.failure.error, message.failure.reason, default=ProtocolError)
            return message


class _Asked:
    """A request, sent once over each connection: a coordinator that comes back knows nothing of it."""

    def __init__(self, membership: Membership, request: m.Lease) -> None:
        self._membership = membership
        self._request = request
        self._over = membership.tell(request)

    def again(self) -> None:
        """The coordinator is back."""
        if self._over != self._membership.connection:
            self._over = self._membership.tell(self._request)
