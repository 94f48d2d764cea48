"""One question to a node that one is no member of: its statistics, or a checkpoint."""

from __future__ import annotations

from headwater.errors import (
    ConnectionLostError,
    HeadwaterError,
    ProtocolError,
    RefusedError,
    StalledError,
    named,
)
from headwater.messages import (
    AnyMessage,
    Ask,
    CheckpointTaken,
    ClusterStatistics,
    Refused,
    ServerStatistics,
    TakeCheckpoint,
)
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN, Security

ANSWER_S = 10.0
"""How long a node may take to be reached, and again to answer, in seconds."""


def ask(address: str, security: Security = PLAIN) -> ClusterStatistics:
    """The statistics of the cluster whose coordinator is at `address`.

    Raises:
        ConnectionLostError: nobody answers there.
        ProtocolError: whoever answers is not a coordinator.
        RefusedError: it refuses, with its reason.
    """
    answer = ask_node(address, security)
    if isinstance(answer, ServerStatistics):
        raise ProtocolError(f"{address} is server {answer.index}: ask the coordinator of its cluster")
    return answer


def ask_node(
    address: str, security: Security = PLAIN, *, seconds: float = ANSWER_S
) -> ClusterStatistics | ServerStatistics:
    """The statistics of the coordinator, server or standby at `address`, which has `seconds` to answer.

    Raises as `ask`.
    """
    channel = dial(address, timeout=seconds, security=security)
    try:
        channel.send(Ask(), timeout=seconds)
        received = channel.receive(timeout=seconds)
    except TimeoutError as error:
        raise ConnectionLostError(f"{address} did not answer for {seconds:g} s") from error
    except HeadwaterError as error:
        raise ProtocolError(f"what listens at {address} is not a coordinator: {error}") from error
    finally:
        channel.close()
    if received is None:
        raise ConnectionLostError(f"{address} closed the connection without an answer")
    return _statistics(address, received.message)


def _statistics(address: str, message: AnyMessage) -> ClusterStatistics | ServerStatistics:
    if isinstance(message, ClusterStatistics | ServerStatistics):
        return message
    if isinstance(message, Refused):
        raise named(message.error, message.reason, default=RefusedError)
    raise ProtocolError(f"{address} answered {type(message).__name__}, expected statistics")


def take_checkpoint(address: str, by: str, seconds: float, security: Security = PLAIN) -> str:
    """Have the cluster whose coordinator is at `address` write a checkpoint of now; blocks until it is on
    disk, and returns its path there. `by`: who asks, in words for the coordinator's log.

    Raises:
        ConnectionLostError: nobody answers there, or the coordinator went away meanwhile.
        ProtocolError: whoever answers is not a coordinator.
        ConfigurationError: the cluster has no directory for checkpoints.
        CheckpointError: it cannot be written.
        RefusedError: the cluster begins, or ends.
        StalledError: it was not on disk after so many seconds; it may be yet.
    """
    channel = dial(address, timeout=ANSWER_S, security=security)
    try:
        channel.send(TakeCheckpoint(by), timeout=ANSWER_S)
        received = channel.receive(timeout=seconds)
    except TimeoutError as error:
        raise StalledError(
            f"the checkpoint that {address} was asked for was not on disk after {seconds:g} s: "
            "it goes on being written"
        ) from error
    finally:
        channel.close()
    if received is None:
        raise ConnectionLostError(
            f"what listens at {address} closed the connection without a checkpoint: give the address of the "
            "cluster's coordinator"
        )
    if isinstance(received.message, Refused):
        raise named(received.message.error, received.message.reason, default=RefusedError)
    if not isinstance(received.message, CheckpointTaken):
        raise ProtocolError(f"{address} answered {type(received.message).__name__}, expected a checkpoint")
    return received.message.path
