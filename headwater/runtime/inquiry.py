"""One question to a coordinator: its statistics."""

from __future__ import annotations

from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError
from headwater.messages import Ask, ClusterStatistics, ServerStatistics
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN, Security

_ANSWER_S = 10.0
"""How long a coordinator may take to be reached, and again to answer, in seconds."""


def ask(address: str, security: Security = PLAIN) -> ClusterStatistics:
    """The statistics of the cluster whose coordinator is at `address`.

    Raises:
        ConnectionLostError: nobody answers there.
        ProtocolError: whoever answers is not a coordinator.
    """
    channel = dial(address, timeout=_ANSWER_S, security=security)
    try:
        channel.send(Ask(), timeout=_ANSWER_S)
        received = channel.receive(timeout=_ANSWER_S)
    except (HeadwaterError, TimeoutError) as error:
        raise ProtocolError(f"what listens at {address} is not a coordinator: {error}") from error
    finally:
        channel.close()
    if received is None:
        raise ConnectionLostError(f"{address} closed the connection without an answer")
    if isinstance(received.message, ServerStatistics):
        raise ProtocolError(
            f"{address} is server {received.message.index}: ask the coordinator of its cluster"
        )
    if not isinstance(received.message, ClusterStatistics):
        raise ProtocolError(f"{address} answered {type(received.message).__name__}, expected statistics")
    return received.message
