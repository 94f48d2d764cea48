"""A standby's side of the link: its shard begins with a snapshot and follows entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.runtime.server.snapshots import room
from headwater.shard.replica import MaterializedEntry, arriving, own_memory
from headwater.shard.snapshot import ShardSnapshot
from headwater.wire.channel import Channel
from headwater.wire.chunks import TakenChunks


class Mirror:
    """What comes over one connection from a server; `next` gives it piece by piece."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._chunks = TakenChunks()
        self._snapshot: ShardSnapshot | None = None
        self._resolved: MaterializedEntry | None = None

    def begin(self) -> tuple[ShardSnapshot, int]:
        """The snapshot that comes first, and its term; blocks.

        Raises:
            ProtocolError: something else came.
        """
        received = self._channel.receive(self._place)
        message = received.message if received is not None else None
        if not isinstance(message, m.Snapshot):
            raise ProtocolError(f"a server sent {type(message).__name__} first, expected Snapshot")
        snapshot, self._snapshot = self._snapshot, None
        return snapshot or room(message)[0], message.term

    def next(self) -> tuple[MaterializedEntry | m.StartTerm | None, int, int] | None:
        """The next entry, or where the log goes on in a new term, or None where there is only news of it; the
        term; and how far the log is committed. None at the end.

        Raises:
            ProtocolError: something else came.
        """
        while (received := self._channel.receive(self._place)) is not None:
            message = received.message
            if isinstance(message, m.Chunk):
                self._map(message, received.descriptors)
            elif isinstance(message, m.CommitIndex):
                return None, message.term, message.committed
            elif isinstance(message, m.StartTerm):
                return message, message.term, 0
            elif isinstance(message, m.AppendEntry):
                resolved, self._resolved = self._resolved, None
                entry = resolved or self._arriving(message)[0]
                return entry, message.inputs.term, message.committed
            else:
                raise ProtocolError(f"a server sent its standby {type(message).__name__}")
        return None

    def _map(self, message: m.Chunk, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise ProtocolError(f"a chunk came with {len(descriptors)} descriptors, expected 1")
        self._chunks.map(message.chunk, descriptors.pop(), message.size)

    def _place(self, message: m.AnyMessage, length: int) -> Sequence[NDArray[Any]]:
        if isinstance(message, m.Snapshot):
            self._snapshot, arrays = room(message)
            return arrays
        if isinstance(message, m.AppendEntry):
            self._resolved, inline = self._arriving(message)
            return inline
        raise ProtocolError(f"{type(message).__name__} with a payload of {length} bytes, expected none")

    def _arriving(self, message: m.AppendEntry) -> tuple[MaterializedEntry, list[NDArray[Any]]]:
        """The entry, its arrays in chunks or to be received, and the latter."""
        numbers = iter(message.chunks)
        inline: list[NDArray[Any]] = []

        def place(size: int) -> NDArray[np.uint8]:
            number = next(numbers, -1) if size else -1
            memory = self._chunks.part(number, size) if number >= 0 else own_memory(size)
            if memory is None:
                raise ProtocolError(f"a shipment names chunk {number}, which has no {size} bytes")
            if number < 0 and size:
                inline.append(memory)
            return memory

        return arriving(message.inputs, place), inline
