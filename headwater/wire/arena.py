"""Memory of one process that others of its machine may read, given out in pieces of any size.

A piece never moves. All pieces lie in one file without a name that only grows, so one descriptor gives all of
them to another process, and what is mapped stays readable when the owner is gone.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

from headwater.errors import EnvironmentFailure, ProtocolError
from headwater.wire.fork import close_in_child
from headwater.wire.shared_memory import Bytes, Mapping, check_file, growing_file


class Arena:
    """The owner's side; a `ChunkMemory`.

    Attributes:
        size: bytes of the file so far.
        descriptor: of the file, for passing it on.

    Raises:
        EnvironmentFailure: the system has no such files.
    """

    def __init__(self) -> None:
        self.size = 0
        self.descriptor = growing_file()
        self._offsets: dict[int, tuple[int, Bytes]] = {}
        self._free: dict[int, list[int]] = {}
        self._close = weakref.finalize(self, os.close, self.descriptor)
        close_in_child(self)

    def __index__(self) -> int:
        return self.descriptor

    def take(self, size: int, large: bool = False) -> Bytes:
        """`size` bytes at the start of a page: zeros, or what was in a piece that was given back.

        Raises:
            EnvironmentFailure: the system has no more.
        """
        room = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
        free = self._free.get(room)
        if free:
            return self._offsets[free.pop()][1][:size]
        try:
            os.ftruncate(self.descriptor, self.size + room)
        except OSError as error:
            raise EnvironmentFailure(f"no more memory that processes share: {error}") from error
        piece = Mapping(self.descriptor, self.size, room, filled=False).bytes()
        self._offsets[piece.ctypes.data] = self.size, piece
        self.size += room
        return piece[:size]

    def give_back(self, memory: Bytes) -> None:
        """Nobody uses a piece any more; the next one of its size is the same."""
        address = memory.ctypes.data
        self._free.setdefault(self._offsets[address][1].size, []).append(address)

    def offset(self, memory: NDArray[np.generic]) -> int:
        """Where a piece that was taken begins in the file."""
        return self._offsets[memory.ctypes.data][0]

    def close_descriptors(self) -> None:
        """Close it in a forked child; its mapping stays."""
        self._close()


class ArenaView:
    """Another process's arena, to be read and not written. Takes the descriptor, and closes it in every case.

    Attributes:
        size: bytes of it that can be read here.

    Raises:
        ProtocolError: not such a file, or one that is smaller.
        EnvironmentFailure: the system would not map it.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        try:
            check_file(descriptor, size)
            self._bytes = Mapping(descriptor, 0, size, filled=False, writable=False).bytes()
        finally:
            os.close(descriptor)

    def piece(self, offset: int, size: int) -> Bytes:
        """Bytes [offset, offset + size), read-only. Raises ProtocolError: they lie outside of it."""
        if not 0 <= offset <= offset + size <= self.size:
            raise ProtocolError(
                f"bytes [{offset}, {offset + size}) lie outside a shared file of {self.size} bytes"
            )
        return self._bytes[offset : offset + size]


class ArenaViews:
    """Views of the arenas that one process reads, each mapped once for as long as anybody has it."""

    def __init__(self) -> None:
        self._views: weakref.WeakValueDictionary[tuple[int, int], ArenaView] = weakref.WeakValueDictionary()

    def open(self, descriptor: int, size: int) -> ArenaView:
        """A view with at least `size` bytes; as `ArenaView`, which also raises."""
        try:
            file = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        key = file.st_dev, file.st_ino
        view = self._views.get(key)
        if view is not None and view.size >= size:
            os.close(descriptor)
            return view
        view = ArenaView(descriptor, size)
        self._views[key] = view
        return view
