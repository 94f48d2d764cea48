"""How any node becomes a member, or comes back as one: one question to the coordinator.

The connection over which it is answered stays open.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from headwater.errors import ConnectionLostError, ProtocolError, RefusedError, named
from headwater.messages import AnyMessage, Join, Refused, Rejoin, Role, Welcome
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import Security

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
    security: Security | None = None,
) -> tuple[Channel, Welcome]:
    """Join the cluster at `coordinator`; blocks until it is complete enough to take this node in.

    The returned channel is the membership: its end without a Departed message is a death.
    `own` is told of the channel before the wait; `timeout`: seconds for the welcome; `security`: what
    all nodes of the cluster were given.

    Raises:
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason, or is not admitted itself.
        ProtocolError: what answers is no coordinator.
    """
    channel = own(dial(coordinator, timeout=_DIAL_S, security=security))
    request = Join(role, index, os.getpid(), socket.gethostname(), addresses)
    answer = _answer(channel, request, timeout, coordinator)
    if isinstance(answer, Refused):
        channel.close()
        raise named(answer.error, answer.reason, default=RefusedError)
    return channel, answer


def rejoin(
    coordinator: str,
    request: Rejoin,
    *,
    own: Callable[[Channel], Channel],
    security: Security | None = None,
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
        received = channel.receive(timeout=timeout)
        if received is None:
            raise ConnectionLostError(f"the coordinator at {coordinator} closed the connection")
        if not isinstance(received.message, Welcome | Refused):
            raise ProtocolError(f"the coordinator answered {type(received.message).__name__}")
        return received.message
    except BaseException:
        channel.close()
        raise
