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
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError, StalledError
from headwater.nodes.session import Session
from headwater.splits import LeaseBook, Replies
from headwater.wire.channel import Channel

_log = logging.getLogger("headwater.worker")


class LeaseDesk:
    """The coordinator's side. `recorded` asks a server what the log has recorded; blocks."""

    def __init__(self, workers: int, recorded: Callable[[], m.Recorded]) -> None:
        self._workers = workers
        self._recorded = recorded
        self._lock = threading.Lock()
        self._book: LeaseBook | None = None
        self._channels: dict[int, Channel] = {}

    def serve(self, member: m.Member, channel: Channel, message: m.Lease | m.Finish) -> None:
        """Take a worker's message and answer whoever is answered by it; blocks for sending alone."""
        book = self._open_book()
        try:
            with self._lock:
                self._channels[member.id] = channel
                if isinstance(message, m.Lease):
                    replies = book.lease(member.id, member.index, message)
                else:
                    replies = book.finish(member.id, message)
        except HeadwaterError as error:
            channel.send(m.Refused(type(error).__name__, str(error)))
            return
        self._send(replies)

    def gone(self, member: int) -> None:
        """A worker died or left: its splits go back, from where the log recorded it."""
        with self._lock:
            known = self._channels.pop(member, None) is not None
        if known and self._book is not None:
            recorded = self._recorded()
            with self._lock:
                replies = self._book.gone(member, recorded)
            self._send(replies)

    def unvisited(self) -> list[m.Unvisited]:
        """What nobody reads any more of what all should have read together."""
        with self._lock:
            return self._book.unvisited() if self._book is not None else []

    def _open_book(self) -> LeaseBook:
        """Made for the first worker that asks: by then a restored server knows what is done."""
        if self._book is None:
            recorded = self._recorded()
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


class LeaseClient:
    """The worker's side; used by the thread that uses the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._number = 0

    def next(self, request: Callable[[int], m.Lease], on_wait: Callable[[], None]) -> m.Leased | None:
        """The next split, None when there will be none; blocks while others may still give theirs back.

        `on_wait` is called once before the wait.

        Raises:
            ConfigurationError: the others make this call differently; names both.
            StalledError: nothing changed for `welcome.deadline` seconds; names who holds what.
            ConnectionLostError: the coordinator is gone.
        """
        self._number += 1
        began = time.monotonic()
        self._session.membership.tell(request(self._number))
        try:
            reply = self._receive(began, "")
            if isinstance(reply, m.Unleased) and not reply.over:
                on_wait()
                reply = self._receive(began, reply.reason)
        finally:
            self._session.waiting += time.monotonic() - began
        return reply if isinstance(reply, m.Leased) else None

    def finish(self, finish: m.Finish) -> None:
        """Give back; does not wait for an answer, as there is none."""
        self._session.membership.tell(finish)

    def _receive(self, began: float, reason: str) -> m.Leased | m.Unleased:
        """The next answer to the outstanding request; earlier ones are of requests given up."""
        welcome = self._session.welcome
        while True:
            left = began + welcome.deadline - time.monotonic()
            if left <= 0:
                raise StalledError(f"no split for {welcome.deadline:g} s: {reason or 'no word of why'}")
            try:
                message = self._session.membership.next_message(min(left, welcome.patience))
            except TimeoutError:
                _log.warning("worker %d: %s", welcome.member.index, reason or "waits for a split")
                continue
            if isinstance(message, m.Whereabouts):
                continue  # of a question given up
            if not isinstance(message, m.Leased | m.Unleased):
                raise ProtocolError(f"the coordinator sent {type(message).__name__}, expected a split")
            if message.number == self._number:
                return message
