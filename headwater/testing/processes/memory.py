"""Memory that simulated nodes share: the arrays themselves stand for what a descriptor would give.

A chunk is one array on both sides, and is used again as a real one is: who reads it too late reads what the
other has written there since.
"""

from __future__ import annotations

import numpy as np

from headwater.errors import ProtocolError
from headwater.machines.actions import Conn
from headwater.machines.memory import Bytes, CheckpointPlace, Given, ScratchPart
from headwater.messages import PartRecord
from headwater.shard import Staging
from headwater.shard.snapshot import ShardSnapshot


class SharedArrays:
    """A `ServerMemory`; `shared`: whether memory travels at all."""

    smallest_chunk = 512

    def __init__(self, shared: bool) -> None:
        self._shared = shared

    def shares(self, conn: Conn) -> bool:
        """Whether memory can travel over this connection."""
        return self._shared

    def window(self, given: Given, size: int, elements: int, start: int, stop: int) -> Staging:
        """As `ServerMemory.window`; given are gradients and parameters."""
        if len(given) != 2 or len(given[0]) != elements:
            raise ProtocolError(f"a window came as {len(given)} arrays, expected 2 of {elements} elements")
        parameters, gradients = given.pop(), given.pop()
        return Staging(gradients[start:stop], parameters[start:stop])

    def scratch(self, given: Given, size: int) -> ScratchPart:
        """As `ServerMemory.scratch`."""
        memory: Bytes = given.pop()

        def part(offset: int, length: int) -> Bytes:
            if offset % 4 or not 0 <= offset <= offset + length <= len(memory):
                raise ProtocolError(f"{length} bytes at {offset} of a scratch window of {len(memory)}")
            return memory[offset : offset + length]

        return part

    def new_chunk(self, size: int) -> tuple[Bytes, Bytes]:
        """As `ServerMemory.new_chunk`."""
        chunk = np.zeros(size, np.uint8)
        return chunk, chunk

    def given_chunk(self, given: Given, size: int) -> Bytes:
        """As `ServerMemory.given_chunk`."""
        chunk: Bytes = given.pop()
        if len(chunk) < size:
            raise ProtocolError(f"a chunk of {size} bytes was announced, it has {len(chunk)}")
        return chunk

    def write_part(self, place: CheckpointPlace, snapshot: ShardSnapshot) -> PartRecord:
        """Nothing is written."""
        return PartRecord(snapshot.index, (), ())
