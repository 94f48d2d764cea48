"""Memory for rows in chunks that never move, used page by page as rows come.

Invariants:
- A row's bytes stay where they are for the life of the slabs.
- A fresh chunk is address space only: the machine gives it pages when rows in it are first written, so
  no push pays for more than the rows it brings.
- A row starts at a multiple of its own size from the start of its chunk, which starts a cache line.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 16 << 20
"""Bytes of the largest slab's chunks, unless a single row is larger."""

_HUGE_PAGE = 2 << 20


class Slabs:
    """Parallel slabs: row r has `row_bytes[k]` bytes in slab k.

    From the second chunk on they ask for huge pages (random rows then miss the TLB less); a small table
    would only lose the rest of one by it. `large`: from the first on, for memory that is used all over.

    Attributes:
        shift: a chunk holds 2^shift rows, of every slab.
        addresses: int64[slabs, chunks], where each chunk starts; what kernels take.
    """

    def __init__(self, row_bytes: Sequence[int], *, large: bool = False) -> None:
        self.row_bytes = tuple(row_bytes)
        self.shift = max(0, (CHUNK // max(row_bytes)).bit_length() - 1)
        self.addresses = np.empty((len(row_bytes), 0), dtype=np.int64)
        self._large = large
        self._chunks: list[list[NDArray[np.uint8]]] = []

    def reserve(self, rows: int) -> None:
        """Make room for rows [0, rows); costs nothing by the row.

        Raises:
            MemoryError: the machine has no more address space.
        """
        while len(self._chunks) << self.shift < rows:
            large = self._large or bool(self._chunks)
            self._chunks.append([_chunk(size << self.shift, large) for size in self.row_bytes])
            self.addresses = np.array(
                [[part.ctypes.data for part in chunk] for chunk in self._chunks], dtype=np.int64
            ).T.copy()

    def place(self, slab: int, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64[rows]: the address of each row in one slab."""
        wide = rows.astype(np.int64)
        chunk = wide >> self.shift
        places: NDArray[np.int64] = (
            self.addresses[slab, chunk] + (wide - (chunk << self.shift)) * self.row_bytes[slab]
        )
        return places


def _chunk(size: int, large: bool) -> NDArray[np.uint8]:
    """`size` bytes of fresh memory, in huge pages where `large`; the array owns it."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    skipped = -whole.ctypes.data % _HUGE_PAGE
    return whole[skipped : skipped + size]
