"""Shared memory in pieces that are used again: what a server hands its standby without copying it.

The giver takes a chunk, fills it, and gets it back when both sides are through with it. Sizes are rounded up
to powers of two, so that pieces of about one size use the same chunks.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict

from headwater.wire.fork import close_in_child
from headwater.wire.shared_memory import Bytes, Mapping, check_file, filled_file

SMALLEST = 64 << 10
"""Bytes below which sending them costs less than keeping track of a chunk."""


class GivenChunks:
    """The giver's side."""

    def __init__(self) -> None:
        self._memory: list[Bytes] = []
        self._descriptors: list[int] = []
        self._free: dict[int, list[int]] = defaultdict(list)
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        close_in_child(self)

    def take(self, size: int) -> tuple[int, Bytes]:
        """A chunk for `size` bytes: its number, and uint8[size] of it.

        Raises:
            EnvironmentFailure: the system has no memory for it.
        """
        rounded = 1 << (max(size, SMALLEST) - 1).bit_length()
        if not self._free[rounded]:
            descriptor = filled_file(rounded)
            self._descriptors.append(descriptor)
            self._memory.append(Mapping(descriptor, 0, rounded).bytes())
            self._free[rounded].append(len(self._memory) - 1)
        number = self._free[rounded].pop()
        return number, self._memory[number][:size]

    def give_back(self, number: int) -> None:
        """Both sides are through with a chunk."""
        self._free[len(self._memory[number])].append(number)

    def descriptor(self, number: int) -> tuple[int, int]:
        """For passing it on: the chunk's descriptor, which stays this object's, and its size."""
        return self._descriptors[number], len(self._memory[number])

    def close_descriptors(self) -> None:
        """Close all descriptors; the memory stays while arrays of it live. May be called twice."""
        self._close()


class TakenChunks:
    """The other side: chunks by the giver's number."""

    def __init__(self) -> None:
        self._memory: dict[int, Bytes] = {}

    def map(self, number: int, descriptor: int, size: int) -> None:
        """Map a chunk; owns `descriptor` from the call on.

        Raises:
            ProtocolError: not a file of that size sealed against shrinking.
            EnvironmentFailure: the system would not map it.
        """
        try:
            check_file(descriptor, size)
            self._memory[number] = Mapping(descriptor, 0, size).bytes()
        finally:
            os.close(descriptor)

    def part(self, number: int, size: int) -> Bytes | None:
        """uint8[size] of a chunk; None where there is no such chunk, or it is smaller."""
        memory = self._memory.get(number)
        return memory[:size] if memory is not None and size <= len(memory) else None


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
