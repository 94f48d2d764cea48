"""The shared memory of one worker in which ids and rows of tables come and go, whatever their number.

Places are given out from the bottom up and taken back from the top down, like a stack. A window that is
too small is replaced by a larger one; what was placed moves along, and arrays of the old one stay valid but
stale.

Like windows, scratch is not fenced by messages: who may touch it when is the business of the exchange.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import numpy as np

from headwater.errors import ProtocolError
from headwater.wire.fork import close_in_child
from headwater.wire.shared_memory import Bytes, Mapping, check_file, filled_file

_LINE = 64
_SMALLEST = 1 << 20


class Scratch:
    """The worker's side; `shared` False for private memory, where nobody shares it.

    Attributes:
        memory: uint8[size], writable.
        used: bytes given out, from the start.
        generation: counts the windows there were.
        descriptor: of the file, for passing it on; -1 where there is none.
        shared: as given.
    """

    def __init__(self, *, shared: bool) -> None:
        self.used = 0
        self.generation = 0
        self.descriptor = -1
        self.memory: Bytes = np.empty(0, dtype=np.uint8)
        self.shared = shared
        self._close: Callable[[], object] = lambda: None
        close_in_child(self)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What travels to give it to another process."""
        return (self.descriptor,)

    def take(self, size: int) -> int:
        """Give out `size` bytes; returns their offset, a multiple of 64. Contents are whatever was there.

        Raises:
            EnvironmentFailure: the system has no memory for it.
        """
        start = self.used
        stop = start + size
        if stop > len(self.memory):
            self._grow(stop)
        self.used = -(-stop // _LINE) * _LINE
        return start

    def renew(self) -> None:
        """Go on in a new file with the same content, which who mapped the old one does not see."""
        self._replace(len(self.memory))

    def release(self) -> None:
        """Close the descriptor; may be called twice. The memory stays while any array of it lives."""
        self.descriptor = -1
        self._close()

    def close_descriptors(self) -> None:
        """Close the descriptor in a forked child; its mapping stays."""
        self.release()

    def _grow(self, size: int) -> None:
        self._replace(max(_SMALLEST, size + size // 4))

    def _replace(self, size: int) -> None:
        old = self.memory[: self.used]
        if self.shared:
            descriptor = filled_file(size)
            close = weakref.finalize(self, os.close, descriptor)
            memory = Mapping(descriptor, 0, size).bytes()
            self.release()
            self.descriptor, self._close = descriptor, close
        else:
            memory = np.empty(size, dtype=np.uint8)
        memory[: len(old)] = old
        self.memory = memory
        self.generation += 1


class ScratchView:
    """The server's side: all of a scratch window given by a peer.

    Owns `descriptor` from the call on and closes it in every case.

    Attributes:
        memory: uint8[size], writable.

    Raises:
        ProtocolError: not a file of that size sealed against shrinking.
        EnvironmentFailure: the system would not map it.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        try:
            check_file(descriptor, size)
            self.memory = Mapping(descriptor, 0, size).bytes()
        finally:
            os.close(descriptor)

    def part(self, offset: int, size: int) -> Bytes:
        """uint8[size] at a byte offset.

        Raises:
            ProtocolError: it reaches outside, or does not start where an array may.
        """
        if offset % 4 or not 0 <= offset <= offset + size <= len(self.memory):
            raise ProtocolError(f"{size} bytes at {offset} of a scratch window of {len(self.memory)}")
        return self.memory[offset : offset + size]
