"""One question to the coordinator: which split of a data set does this worker read next?

Theory of operation. A request is numbered, and one is outstanding at a time; answers to earlier ones are
ignored. A request whose answer the worker never took, because the wait was interrupted, is made again with
the same number: the coordinator answers it with the same split. The coordinator answers with a split, or
that none is left, or that the worker must wait for what others may still give back: then another answer
follows. A coordinator that was away knows nothing of the request, so it is sent once over each connection.
The wait ends at the deadline with the coordinator's last word on who holds the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, StalledError, named
from headwater.machines.actions import Actions, Note, Tell
from headwater.machines.membership import Membership


class SplitAnswer(NamedTuple):
    """Event: the coordinator's answer to the outstanding request, or why there will be none."""

    reply: m.Leased | m.Unleased | HeadwaterError


class SplitRequests:
    """Of the worker with this membership.

    Attributes:
        due: when `tick` should come.
    """

    def __init__(self, membership: Membership) -> None:
        self.due: float | None = None
        self._membership = membership
        self._number = 0
        self._taken = True
        self._request: m.Lease | None = None
        self._over = 0  # the connection over which it was sent
        self._reason = ""
        self._note_at = self._until = 0.0

    @property
    def next_number(self) -> int:
        """Of the next request."""
        return self._number + self._taken

    def taken(self) -> None:
        """The worker has the answer to the last request."""
        self._taken = True

    def ask(self, lease: m.Lease, now: float) -> Actions:
        """Ask for a split; `lease` has the next number."""
        assert lease.number == self.next_number, lease
        welcome = self._membership.welcome
        self._number, self._request, self._reason, self._taken = lease.number, lease, "", False
        self._over = self._membership.connection
        self._note_at, self._until = now + welcome.patience, now + welcome.deadline
        self.due = min(self._note_at, self._until)
        if self._membership.error is not None:
            return self._answer(self._membership.error)
        return self._membership.tell(lease)

    def received(self, message: m.Leased | m.Unleased) -> Actions:
        """The coordinator answered a request."""
        if message.number != self._number or self._request is None:
            return []
        if isinstance(message, m.Unleased):
            if message.failure is not None:
                failure = message.failure
                return self._answer(named(failure.error, failure.reason, default=ProtocolError))
            if not message.over:
                self._reason = message.reason
                return [Tell(SplitAnswer(message))]
        return self._answer(message)

    def returned(self) -> Actions:
        """The coordinator is back after it was away."""
        if self._request is None or self._over == self._membership.connection:
            return []
        self._over = self._membership.connection
        return self._membership.tell(self._request)

    def ended(self, error: HeadwaterError) -> Actions:
        """There is no coordinator any more."""
        return self._answer(error) if self._request is not None else []

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        if self.due is None or now < self.due:
            return []
        deadline = self._membership.welcome.deadline
        if now >= self._until:
            why = self._membership.beside(self._reason or "no word of why", now)
            return self._answer(StalledError(f"no split for {deadline:g} s: {why}"))
        self._note_at = now + self._membership.welcome.patience
        self.due = min(self._note_at, self._until)
        why = self._membership.beside(self._reason or "waits for a split", now)
        return [Note(f"{self._membership.name}: {why}", "warning")]

    def _answer(self, reply: m.Leased | m.Unleased | HeadwaterError) -> Actions:
        self._request = self.due = None
        return [Tell(SplitAnswer(reply))]
