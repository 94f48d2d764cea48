"""Memory for rows in chunks that never move, used page by page as rows come.

Invariants:
- A row's bytes stay where they are for the life of the slabs.
- A fresh chunk is address space only: the system gives it pages when rows in it are first written, so
  no push pays for more than the rows it brings, or before that by `populate`.
- A row starts at a multiple of its own size from the start of its chunk, which starts a cache line.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import EnvironmentFailure

CHUNK = 16 << 20
"""Bytes of the largest slab's chunks, unless a single row is larger."""

_HUGE_PAGE = 2 << 20
_POPULATE_WRITE = 23
"""Linux 5.14: have the system give pages to memory; what is in it stays."""


Bytes: TypeAlias = NDArray[np.uint8]


class ChunkMemory(Protocol):
    """Where chunks come from."""

    def take(self, size: int, large: bool) -> Bytes:
        """`size` bytes of zeros or of what was given back, which start a cache line; in huge pages where
        `large` and possible. Raises EnvironmentFailure: the system has no more."""

    def give_back(self, memory: Bytes) -> None:
        """Nobody uses what was taken any more."""


class OwnChunks:
    """Of this process alone, which the system takes back by itself."""

    def take(self, size: int, large: bool) -> Bytes:
        """As `ChunkMemory.take`."""
        return _chunk(size, large)

    def give_back(self, memory: Bytes) -> None:
        """As `ChunkMemory.give_back`."""


PRIVATE = OwnChunks()


class Slabs:
    """Parallel slabs: row r has `row_bytes[k]` bytes in slab k.

    They ask for huge pages (random rows then miss the TLB less, and fresh memory costs fewer faults) unless
    the first chunk is all that is wanted yet: a small table would only lose the rest of one by it. `large`:
    always, for memory that is used all over. `memory`: where chunks come from.

    Attributes:
        shift: a chunk holds 2^shift rows, of every slab.
        addresses: int64[slabs, chunks], where each chunk starts; what kernels take.
        prepared: rows below this had `prepare` called for them.
    """

    def __init__(
        self, row_bytes: Sequence[int], *, large: bool = False, memory: ChunkMemory = PRIVATE
    ) -> None:
        self.row_bytes = tuple(row_bytes)
        self.shift = max(0, (CHUNK // max(row_bytes)).bit_length() - 1)
        self.addresses = np.empty((len(row_bytes), 0), dtype=np.int64)
        self.prepared = 0
        self._large = large
        self._memory = memory
        self._chunks: list[list[Bytes]] = []

    @property
    def chunks(self) -> list[list[Bytes]]:
        """By chunk, the memory of each slab. Not to be written."""
        return self._chunks

    def adopt(self, chunks: list[list[Bytes]]) -> None:
        """Have rows that others have written, which are not written here."""
        assert not self._chunks
        if chunks:
            self._add(chunks)

    def give_back(self) -> None:
        """Let go of all rows."""
        for memory in [part for chunk in self._chunks for part in chunk]:
            self._memory.give_back(memory)
        self._chunks = []
        self.addresses = self.addresses[:, :0]

    def reserve(self, rows: int) -> None:
        """Make room for rows [0, rows), all or nothing; costs nothing by the row.

        Raises:
            EnvironmentFailure: the system has no more memory.
        """
        added: list[list[Bytes]] = []
        while (len(self._chunks) + len(added)) << self.shift < rows:
            large = self._large or bool(self._chunks or added) or rows > 1 << self.shift
            added.append([self._memory.take(size << self.shift, large) for size in self.row_bytes])
        if added:
            self._add(added)

    def _add(self, chunks: list[list[Bytes]]) -> None:
        starts = np.array([[part.ctypes.data for part in chunk] for chunk in chunks], dtype=np.int64)
        self.addresses = np.ascontiguousarray(np.hstack([self.addresses, starts.reshape(len(chunks), -1).T]))
        self._chunks += chunks

    def populate(self, first: int, rows: int) -> None:
        """Have rows [first, first + rows) backed by memory, as far as there is room for them.

        Changes nothing in them, so it may run beside anything else; blocks without the interpreter's lock.
        Does nothing where the system cannot, and then the first write of a row does it.
        """
        populate, starts, page = _madvise(), self.addresses, mmap.PAGESIZE
        last = min(first + rows, starts.shape[1] << self.shift)
        while first < last:
            chunk = first >> self.shift
            stop = min(last, (chunk + 1) << self.shift)
            for slab, size in enumerate(self.row_bytes):
                begin = int(starts[slab, chunk]) + (first - (chunk << self.shift)) * size
                begin, end = begin - begin % page, begin + (stop - first) * size
                populate(begin, end - begin, _POPULATE_WRITE)
            first = stop

    def prepare(self, in_use: Callable[[], int], rows: int) -> None:
        """As `populate` for as many rows after those that are in use, but for what was done before.

        `in_use` is asked again for every piece, as another thread may write rows meanwhile: two that have
        the system give them the same memory take twice the time. One thread at a time.
        """
        piece = max(1, _HUGE_PAGE // max(self.row_bytes))
        while True:
            used, room = in_use(), self.addresses.shape[1] << self.shift
            begin, stop = max(used, self.prepared), min(used + rows, room)
            if begin >= stop:
                return
            self.populate(begin, min(piece, stop - begin))
            self.prepared = min(begin + piece, stop)

    def place(self, slab: int, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64[rows]: the address of each row in one slab."""
        wide = rows.astype(np.int64)
        chunk = wide >> self.shift
        places: NDArray[np.int64] = (
            self.addresses[slab, chunk] + (wide - (chunk << self.shift)) * self.row_bytes[slab]
        )
        return places


def _chunk(size: int, large: bool) -> Bytes:
    """`size` bytes of fresh memory, in huge pages where `large`; the array owns it."""
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise EnvironmentFailure(
            f"the system has no more memory for a table's rows ({error}): use more servers or machines"
        ) from error
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    skipped = -whole.ctypes.data % _HUGE_PAGE
    return whole[skipped : skipped + size]


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """The system's; called without the interpreter's lock. Its failures are harmless here."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
