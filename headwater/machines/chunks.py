"""Memory that a server shares with its standby, in chunks that are used again.

A chunk is lent to an array of one entry. The server takes it, fills it, and may give it back only once *both*
sides have applied the entry: until then each of them may still read it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.actions import Actions, Conn, Send
from headwater.machines.memory import Bytes, ServerMemory


class GivenChunks:
    """Chunks that a server shares with one standby; sizes are powers of two, so that few are needed."""

    def __init__(self, memory: ServerMemory) -> None:
        self._memory = memory
        self._chunks: list[Bytes] = []
        self._handles: list[Any] = []
        self._free: dict[int, list[int]] = defaultdict(list)
        self._known = 0

    def take(self, size: int) -> tuple[int, Bytes]:
        """A chunk for `size` bytes: its number, and uint8[size] of it."""
        rounded = 1 << (max(size, self._memory.smallest_chunk) - 1).bit_length()
        if not self._free[rounded]:
            chunk, handle = self._memory.new_chunk(rounded)
            self._chunks.append(chunk)
            self._handles.append(handle)
            self._free[rounded].append(len(self._chunks) - 1)
        number = self._free[rounded].pop()
        return number, self._chunks[number][:size]

    def give_back(self, number: int) -> None:
        """Both sides are through with a chunk."""
        self._free[len(self._chunks[number])].append(number)

    def introduce(self, conn: Conn) -> Actions:
        """Give the standby the chunks that it does not know yet."""
        actions: Actions = []
        for number in range(self._known, len(self._chunks)):
            chunk = m.Chunk(number, len(self._chunks[number]))
            actions.append(Send(conn, chunk, descriptors=(self._handles[number],)))
        self._known = len(self._chunks)
        return actions

    def release(self) -> None:
        """Nothing is sent any more; the memory stays while arrays of it live."""
        self._handles.clear()


class TakenChunks:
    """The standby's side: chunks by their number."""

    def __init__(self) -> None:
        self._chunks: dict[int, Bytes] = {}

    def add(self, number: int, chunk: Bytes) -> None:
        """The server shares this."""
        self._chunks[number] = chunk

    def part(self, number: int, size: int) -> Bytes:
        """uint8[size] of a chunk.

        Raises:
            ProtocolError: there is no such chunk, or it is smaller.
        """
        chunk = self._chunks.get(number)
        if chunk is None or size > len(chunk):
            has = "is not known" if chunk is None else f"has {len(chunk)} bytes"
            raise ProtocolError(f"an entry has an array of {size} bytes in chunk {number}, which {has}")
        return chunk[:size]
