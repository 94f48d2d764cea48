"""How any node becomes a member, or comes back as one: one question to the coordinator.

The connection over which it is answered stays open.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

from headwater.errors import ConnectionLostError, FinishedError, ProtocolError, RefusedError, named
from headwater.messages import (
    AnyMessage,
    Assignment,
    Finished,
    Join,
    JoinWaits,
    NoSlot,
    Refused,
    Rejoin,
    RequestSlot,
    Role,
    Welcome,
)
from headwater.runtime.dialling import machine
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN, Security

_log = logging.getLogger("headwater")

_DIAL_S = 10.0
_CALL_S = 2.0
"""A member that calls again is patient between calls, not in one."""


def join(
    coordinator: str,
    role: Role,
    index: int | None,
    *,
    addresses: tuple[str, ...] = (),
    own: Callable[[Channel], Channel] = lambda channel: channel,
    timeout: float | None = None,
    security: Security = PLAIN,
    over: Channel | None = None,
) -> tuple[Channel, Welcome]:
    """Join the cluster at `coordinator`; blocks until it is complete enough to take this node in.

    The returned channel is the membership: its end without a Departed message is a death.
    `own` is told of the channel before the wait; `timeout`: seconds for the welcome; `security`: what
    all nodes of the cluster were given; `over`: the connection over which it enlisted.

    Raises:
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason, or is not admitted itself.
        ProtocolError: what answers is no coordinator.
    """
    channel = own(over or dial(coordinator, timeout=_DIAL_S, security=security))
    request = Join(role, index, os.getpid(), socket.gethostname(), addresses, machine())
    answer = _answer(channel, request, timeout, coordinator)
    if isinstance(answer, Refused):
        channel.close()
        raise named(answer.error, answer.reason, default=RefusedError)
    return channel, answer


def enlist(
    coordinator: str,
    request: RequestSlot,
    *,
    spare: Callable[[str], None],
    security: Security = PLAIN,
) -> tuple[Channel, Assignment]:
    """Ask the cluster at `coordinator` which server or standby to be; blocks while none is missing.

    The place is kept while the returned channel, over which to join, is open. `spare` is told why it waits.

    Raises:
        ConnectionLostError: nobody answers at that address, or not any more.
        RefusedError: the coordinator refuses, with its reason, or is not admitted itself.
        ProtocolError: what answers is no coordinator.
    """
    channel = dial(coordinator, timeout=_DIAL_S, security=security)
    try:
        channel.send(request, timeout=_DIAL_S)
        while (received := channel.receive()) is not None:
            answer = received.message
            if isinstance(answer, Assignment):
                return channel, answer
            if isinstance(answer, Refused):
                raise named(answer.error, answer.reason, default=RefusedError)
            if isinstance(answer, Finished):
                raise FinishedError("training has finished")
            if not isinstance(answer, NoSlot):
                raise ProtocolError(f"the coordinator answered {type(answer).__name__}")
            spare(answer.reason)
        raise ConnectionLostError(f"the coordinator at {coordinator} closed the connection")
    except BaseException:
        channel.close()
        raise


def rejoin(
    coordinator: str,
    request: Rejoin,
    *,
    own: Callable[[Channel], Channel],
    security: Security = PLAIN,
) -> tuple[Channel, Welcome | Refused]:
    """As `join`, for a member that lost its connection; blocks for at most some seconds.

    What the coordinator says is returned, so that its refusal, which is final, is none of the errors of a
    coordinator that is not there yet.

    Raises:
        HeadwaterError, TimeoutError: nobody says anything.
    """
    channel = own(dial(coordinator, timeout=_CALL_S, security=security))
    return channel, _answer(channel, request, _CALL_S, coordinator)


def _answer(
    channel: Channel, request: AnyMessage, timeout: float | None, coordinator: str
) -> Welcome | Refused:
    try:
        channel.send(request, timeout=_DIAL_S)
        while (received := channel.receive(timeout=timeout)) is not None:
            answer = received.message
            if isinstance(answer, Welcome | Refused):
                return answer
            if isinstance(answer, Finished):
                raise FinishedError("training has finished")
            if not isinstance(answer, JoinWaits):
                raise ProtocolError(f"the coordinator answered {type(answer).__name__}")
            _log.info("joining: %s", answer.reason)
        raise ConnectionLostError(f"the coordinator at {coordinator} closed the connection")
    except BaseException:
        channel.close()
        raise
