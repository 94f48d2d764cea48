"""A server's dealings with the coordinator, for threads that block: it asks what it is to be, and joins."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable

from headwater import messages as m
from headwater.errors import (
    ConnectionLostError,
    HeadwaterError,
)
from headwater.machines.actions import Action, Tell
from headwater.machines.enlistment import Enlistment
from headwater.machines.membership import Ended, Heard, Membership, Returned
from headwater.runtime.dialling import machine
from headwater.runtime.membership import MembershipThread
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN, Security

_DIAL_S = 10.0


def enlist(
    coordinator: str,
    enlistment: Enlistment,
    *,
    spare: Callable[[str], None],
    security: Security = PLAIN,
) -> tuple[Channel, m.Assignment]:
    """Ask the cluster at `coordinator` which server or standby to be; blocks while none is missing.

    The place is kept while the returned channel, over which to join, is open. `spare` is told why it waits.

    Raises:
        ConnectionLostError: nobody answers at that address, or not any more.
        RefusedError: the coordinator refuses, with its reason, or is not admitted itself.
        ProtocolError: what answers is no coordinator.
    """
    channel = dial(coordinator, timeout=_DIAL_S, security=security)
    try:
        channel.send(enlistment.request, timeout=_DIAL_S)
        while (received := channel.receive()) is not None:
            assignment = enlistment.heard(received.message)
            if assignment is not None:
                return channel, assignment
            spare(enlistment.reason)
        raise ConnectionLostError(f"the coordinator at {coordinator} closed the connection")
    except BaseException:
        channel.close()
        raise


class CoordinatorClient:
    """Joins as `role`; blocks until the coordinator takes this node in.

    `next_message` is for one thread at a time, the rest for any.

    Args:
        over: the connection over which a server got its slot.

    Attributes:
        welcome: what the coordinator said first.
        trace: records what this node does while the coordinator asks for it.

    Raises:
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason.
        StalledError: the coordinator could not take this node in before the cluster's deadline.
    """

    def __init__(
        self,
        coordinator: str,
        role: m.Role,
        index: int | None,
        addresses: tuple[str, ...] = (),
        *,
        security: Security = PLAIN,
        over: Channel | None = None,
    ) -> None:
        join = m.Join(role, index, os.getpid(), socket.gethostname(), addresses, machine())
        self._membership = Membership(coordinator, join)
        self._messages: deque[m.AnyMessage] = deque()
        self._thread = MembershipThread(self._membership, self._membership, security, self._take)
        self.trace = self._thread.trace
        try:
            self._thread.begin(f"headwater-membership-{role}", over)
            with self._thread.lock:
                self._thread.changed.wait_for(lambda: self._membership.phase not in ("outside", "joining"))
            if self._membership.phase == "over":
                raise self._end()
        except BaseException:
            self.close()
            raise
        self.welcome = self._membership.welcome

    def tell(self, message: m.AnyMessage) -> None:
        """Send something, lost where the coordinator is away or gone."""
        self._thread.step(lambda now: self._membership.tell(message))

    def next_message(self, timeout: float | None = None) -> m.AnyMessage:
        """What the coordinator says next: Welcome when it is back after it was away.

        Raises:
            HeadwaterError: as the coordinator named it, when it has ended this membership.
            ConnectionLostError: the coordinator is gone, or `close` was called.
            TimeoutError: it said nothing for `timeout` seconds, perhaps because it is away.
        """
        with self._thread.lock:
            if not self._thread.changed.wait_for(lambda: self._messages or self._is_over(), timeout):
                raise TimeoutError(f"the coordinator said nothing for {timeout} s")
            if self._messages:
                return self._messages.popleft()
        raise self._end()

    def watch(self, channels: Callable[[], Iterable[Channel]]) -> None:
        """Close those of the node's other connections whose peer's machine is gone, from now on."""
        self._thread.watched = channels

    @property
    def away_s(self) -> float:
        """For how many seconds the coordinator has been away; 0.0 while it is there."""
        with self._thread.lock:
            return self._membership.away_s(time.monotonic())

    def close(self) -> None:
        """End the connection, without a word, and the thread; idempotent."""
        self._thread.step(lambda now: self._membership.leave())
        self._thread.stop()

    def _take(self, action: Action) -> None:
        """Whatever the membership tells."""
        event = action.event if isinstance(action, Tell) else None
        with self._thread.lock:
            if isinstance(event, Heard):
                self._messages.append(event.message)
            elif isinstance(event, Returned):
                self._messages.append(self.welcome)
            elif isinstance(event, Ended):
                pass  # `next_message` looks for itself
            self._thread.changed.notify_all()

    def _is_over(self) -> bool:
        return self._membership.phase == "over"

    def _end(self) -> HeadwaterError:
        assert self._membership.error is not None
        return self._membership.error
