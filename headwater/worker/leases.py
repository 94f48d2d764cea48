"""Splits over the connection to the coordinator: this worker asks for them, and waits for the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from headwater import messages as m
from headwater.errors import ProtocolError, StalledError, named
from headwater.runtime.coordinator_client import CoordinatorClient
from headwater.runtime.session import Session

_log = logging.getLogger("headwater.worker")


class LeaseClient:
    """Asks for one split after the other; used by the thread that uses the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._number = 0
        self._answered = True

    def next(self, request: Callable[[int], m.Lease], on_wait: Callable[[], None]) -> m.Leased | None:
        """The next split, None when there will be none; blocks while others may still give theirs back, and
        while the coordinator is away. After an error it may be called again: the same split is asked for.

        `on_wait` is called once before a wait for others.

        Raises:
            ConfigurationError: the others make this call differently; names both.
            StalledError: nothing changed for `welcome.deadline` seconds; names who holds what.
            ConnectionLostError: the coordinator is gone.
        """
        self._number += self._answered
        self._answered = False
        began = time.monotonic()
        asked = _Asked(self._session.membership, request(self._number))
        try:
            reply = self._receive(asked, began, "")
            if isinstance(reply, m.Unleased) and not reply.over:
                on_wait()
                reply = self._receive(asked, began, reply.reason)
        finally:
            self._session.waiting += time.monotonic() - began
        self._answered = True
        return reply if isinstance(reply, m.Leased) else None

    def finish(self, finish: m.Finish) -> None:
        """Give back; does not wait for an answer, as there is none."""
        self._session.membership.tell(finish)

    def _receive(self, asked: _Asked, began: float, reason: str) -> m.Leased | m.Unleased:
        """The next answer to the outstanding request; earlier ones are of requests given up."""
        welcome, membership = self._session.welcome, self._session.membership
        while True:
            self._session.check_open("batches")
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
                self._answered = True
                raise named(message.failure.error, message.failure.reason, default=ProtocolError)
            return message


class _Asked:
    """A request, sent once over each connection: a coordinator that comes back knows nothing of it."""

    def __init__(self, membership: CoordinatorClient, request: m.Lease) -> None:
        self._membership = membership
        self._request = request
        self._over = membership.tell(request)

    def again(self) -> None:
        """The coordinator is back."""
        if self._over != self._membership.connection:
            self._over = self._membership.tell(self._request)
