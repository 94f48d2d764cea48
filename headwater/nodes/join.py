"""How any node becomes a member: one question to the coordinator, over a connection that stays open."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from headwater.errors import ConnectionLostError, ProtocolError, RefusedError, named
from headwater.messages import Join, Refused, Role, Welcome
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import Security

_DIAL_S = 10.0


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
    try:
        channel.send(Join(role, index, os.getpid(), socket.gethostname(), addresses))
        received = channel.receive(timeout=timeout)
        if received is None:
            raise ConnectionLostError(f"the coordinator at {coordinator} closed the connection")
        if isinstance(received.message, Refused):
            raise named(received.message.error, received.message.reason, default=RefusedError)
        if not isinstance(received.message, Welcome):
            raise ProtocolError(f"the coordinator answered {type(received.message).__name__}")
    except BaseException:
        channel.close()
        raise
    return channel, received.message
