"""What tests do to members: reach their connections, break them, have members die, speak as one by hand."""

import socket

from headwater.errors import ConnectionLostError
from headwater.messages import Join, Refused
from headwater.wire.listener import dial


def to_coordinator(worker):
    """A worker's channel to its coordinator."""
    (channel,) = worker._session._member._channels.values()
    return channel


def cut_from_coordinator(worker):
    """The connection breaks, as the network does it."""
    to_coordinator(worker)._stream.shutdown(socket.SHUT_RDWR)


def ask_coordinator(address, request):
    """Say the first word of a connection to a coordinator by hand: the connection, and the answer."""
    channel = dial(address, timeout=10)
    channel.send(request)
    received = channel.receive(timeout=30)
    if received is None:
        channel.close()
        raise ConnectionLostError("the coordinator closed the connection")
    answer = received.message
    if isinstance(answer, Refused):
        channel.close()
    return channel, answer


def join(address, role, index):
    """Join by hand: the connection, and the answer."""
    return ask_coordinator(address, Join(role, index, 1, "here"))
