"""Memory that simulated nodes share: the arrays themselves stand for what a descriptor would give.

A chunk is one array on both sides, and is used again as a real one is: who reads it too late reads what the
other has written there since.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError
from headwater.machines.actions import Conn
from headwater.machines.memory import Bytes, CheckpointPlace, Given, ScratchPart
from headwater.messages import PartRecord
from headwater.shard import Staging
from headwater.shard.snapshot import ShardSnapshot
from headwater.testing.processes.disk import Disk

_LINE = 64


class SharedArrays:
    """A `ServerMemory`; `shared`: whether memory travels at all; `disk`: where checkpoints go."""

    smallest_chunk = 512

    def __init__(self, shared: bool, disk: Disk | None = None) -> None:
        self._shared = shared
        self._disk = disk

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
        """To the simulated disk, where there is one."""
        if self._disk is not None:
            self._disk.put(place, snapshot)
        return PartRecord(snapshot.index, (), ())


class WindowArrays:
    """A `ModelMemory` of a member. Who has mapped what it was before a renewal keeps that."""

    def __init__(self, elements: int, shared: bool) -> None:
        self.gradients = np.zeros(elements, np.float32)
        self.parameters = np.zeros(elements, np.float32)
        self.shared = shared

    @property
    def size(self) -> int:
        """Bytes, of both."""
        return self.gradients.nbytes + self.parameters.nbytes

    @property
    def descriptors(self) -> Sequence[NDArray[np.float32]]:
        """What travels to give it to others."""
        return self.gradients, self.parameters

    def renew(self) -> None:
        """As `ModelMemory.renew`, but at other addresses; what is not shared nobody else ever has."""
        if self.shared:
            self.gradients, self.parameters = self.gradients.copy(), self.parameters.copy()

    def release(self) -> None:
        """Nothing is to be given back."""


class ScratchArray:
    """A `RowMemory` of a member, so small that it is often replaced by a larger one."""

    def __init__(self, shared: bool) -> None:
        self.memory: Bytes = np.empty(0, np.uint8)
        self.used = 0
        self.shared = shared
        self.generation = 0

    @property
    def descriptors(self) -> Sequence[Bytes]:
        """What travels to give it to others."""
        return (self.memory,)

    def take(self, size: int) -> int:
        """As `RowMemory.take`."""
        start, stop = self.used, self.used + size
        if stop > len(self.memory):
            self._replace(stop + stop // 4)
        self.used = -(-stop // _LINE) * _LINE
        return start

    def renew(self) -> None:
        """As `RowMemory.renew`."""
        self._replace(len(self.memory))

    def release(self) -> None:
        """Nothing is to be given back."""

    def _replace(self, size: int) -> None:
        memory = np.zeros(-(-size // _LINE) * _LINE, np.uint8)
        memory[: self.used] = self.memory[: self.used]
        self.memory = memory
        self.generation += 1
