"""How a server reaches memory that others share with it, and the files of its checkpoints.

Machines say which memory they need; where it is, the runtime (`headwater.runtime.payload`) and the
simulator know: descriptors of shared files there, arrays here. `Given` is what came with a message, in its
order. Whoever takes something out of it takes it away; the driver lets go of what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError
from headwater.machines.actions import Conn
from headwater.messages import PartRecord
from headwater.shard import Staging
from headwater.shard.snapshot import ShardSnapshot

Bytes: TypeAlias = NDArray[np.uint8]
Given: TypeAlias = list[Any]

ScratchPart: TypeAlias = Callable[[int, int], Bytes]
"""Given a byte offset and a size: that part of a scratch window. Raises ProtocolError if it lies outside."""


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Where a server's part of a checkpoint goes."""

    directory: str
    generation: int
    version: int


class ServerMemory(Protocol):
    """Memory of one server. Any thread may call it; it changes nothing of the machine.

    Attributes:
        smallest_chunk: bytes below which sending an array costs less than sharing it.
    """

    smallest_chunk: int

    def shares(self, conn: Conn) -> bool:
        """Whether memory can travel over this connection."""

    def window(self, given: Given, size: int, elements: int, start: int, stop: int) -> Staging:
        """Elements [start, stop) of a member's window of twice `elements` float32, in a file of `size` bytes.

        Raises:
            ProtocolError: what was given is not such a window.
            EnvironmentFailure: the system would not map it.
        """

    def scratch(self, given: Given, size: int) -> ScratchPart:
        """A member's scratch window of `size` bytes. Raises as `window`."""

    def new_chunk(self, size: int) -> tuple[Bytes, Any]:
        """New shared memory, uint8[size], and what is to travel so that a standby can map it.

        Both live for as long as anybody has them.

        Raises:
            EnvironmentFailure: the system has no memory for it.
        """

    def given_chunk(self, given: Given, size: int) -> Bytes:
        """Memory that a server shares with this standby, uint8[size]. Raises as `window`."""

    def write_part(self, place: CheckpointPlace, snapshot: ShardSnapshot) -> PartRecord:
        """Write this server's part of a checkpoint; blocks until it is on disk.

        Raises:
            CheckpointError: it cannot be written.
        """


def take(waiting: deque[Bytes], length: int) -> list[NDArray[Any]]:
    """The next `length` bytes of `waiting`, taken out of it.

    Raises:
        ProtocolError: there are fewer.
    """
    taken: list[NDArray[Any]] = []
    while length:
        if not waiting:
            raise ProtocolError(f"a snapshot has {length} bytes more than its first message says")
        piece = waiting.popleft()
        if piece.nbytes > length:
            waiting.appendleft(piece[length:])
            piece = piece[:length]
        taken.append(piece)
        length -= piece.nbytes
    return taken
