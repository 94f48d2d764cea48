"""Memory of a server in a real process: files that others share with it, and descriptors that travel."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headwater.checkpoint import write_part
from headwater.errors import ProtocolError
from headwater.machines.actions import Conn
from headwater.machines.memory import Bytes, CheckpointPlace, Given, ScratchPart
from headwater.machines.server import ServerMachine
from headwater.messages import AnyMessage, PartRecord
from headwater.shard import Staging
from headwater.shard.snapshot import ShardSnapshot
from headwater.wire.channel import Array, Channel, Received
from headwater.wire.fork import close_in_child
from headwater.wire.scratch import ScratchView
from headwater.wire.shared_memory import Mapping, check_file, filled_file, windows_possible
from headwater.wire.window import WindowView


class SharedFile:
    """The descriptor of a new memfd of `size` bytes, for as long as somebody may send it.

    An action that waits to be sent keeps it open; so its number never means another file by then.

    Raises:
        EnvironmentFailure: the system has no memory for it.
    """

    def __init__(self, size: int) -> None:
        self.descriptor = filled_file(size)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        close_in_child(self)

    def __index__(self) -> int:
        return self.descriptor

    def close_descriptors(self) -> None:
        """Close it in a forked child; its mapping stays."""
        self._close()


class MappedMemory:
    """A `ServerMemory` of memfds. What is given are descriptors; whoever maps one takes and closes it.

    `channel`: that of a connection of this node, while there is one.
    """

    smallest_chunk = 64 << 10

    def __init__(self, channel: Callable[[Conn], Channel | None]) -> None:
        self._channel = channel

    def shares(self, conn: Conn) -> bool:
        """Whether memory can travel over this connection."""
        channel = self._channel(conn)
        return channel is not None and channel.can_pass_descriptors and windows_possible()

    def window(self, given: Given, size: int, elements: int, start: int, stop: int) -> Staging:
        """As `ServerMemory.window`."""
        view = WindowView(_only(given, "a window"), size=size, elements=elements, start=start, stop=stop)
        return Staging(view.gradients, view.parameters)

    def scratch(self, given: Given, size: int) -> ScratchPart:
        """As `ServerMemory.scratch`."""
        return ScratchView(_only(given, "a scratch window"), size).part

    def new_chunk(self, size: int) -> tuple[Bytes, SharedFile]:
        """As `ServerMemory.new_chunk`."""
        file = SharedFile(size)
        return Mapping(file.descriptor, 0, size).bytes(), file

    def given_chunk(self, given: Given, size: int) -> Bytes:
        """As `ServerMemory.given_chunk`."""
        descriptor = _only(given, "a chunk")
        try:
            check_file(descriptor, size)
            return Mapping(descriptor, 0, size).bytes()
        finally:
            os.close(descriptor)

    def write_part(self, place: CheckpointPlace, snapshot: ShardSnapshot) -> PartRecord:
        """As `ServerMemory.write_part`."""
        return write_part(
            place.directory,
            place.generation,
            place.version,
            snapshot.index,
            snapshot.servers,
            snapshot.models,
            snapshot.tables,
            snapshot.programs,
        )


def _only(given: Given, what: str) -> int:
    if len(given) != 1:
        raise ProtocolError(f"{what} came with {len(given)} descriptors, expected 1")
    descriptor: int = given.pop()
    return descriptor


class ServerPayloads:
    """Where payload of `machine`'s connections goes, and what comes of descriptors."""

    def __init__(self, machine: ServerMachine) -> None:
        self._machine = machine

    def place(self, conn: Conn, message: AnyMessage, length: int) -> Sequence[Array]:
        """As `Channel.receive` asks."""
        arrays: Sequence[np.ndarray[Any, Any]] = self._machine.place(conn, message, length)
        return arrays

    def take(self, conn: Conn, received: Received) -> Any:
        """What the machine is handed; takes the descriptors that it keeps."""
        return self._machine.unpack(conn, received.message, received.descriptors)

    def forget(self, conn: Conn) -> None:
        """The connection has ended, and the machine knows."""
