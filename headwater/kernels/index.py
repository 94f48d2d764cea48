"""The id index: id → row, one small open-addressing table for each virtual slot.

Invariants:
- Any int64 is a legal id.
- Growth rehashes one slot and adds pages to it; no page is ever given back or left unused, so memory is
  16 bytes for an entry at a load between 0.5 (right after growth) and 0.75, once slots have a few pages.
- What is pending depends on the order of claims and removals within a slot and on nothing else.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.errors import EnvironmentFailure, ProtocolError
from headwater.kernels.cache import load
from headwater.kernels.slabs import PRIVATE, Bytes, ChunkMemory, Slabs

Ids = NDArray[np.int64]
Rows = NDArray[np.int32]
Counts = NDArray[np.int32]

PAGE = 1024
_NEXT_ROW, _FREE, _NEXT_PAGE, _ROWS, _REFUSED, _FRESH, _WANTED = range(7)
_BUCKETS, _WAYS = 16, 8
"""Of one virtual slot: that many ids at most have their updates counted before admission."""

_MOST_ROWS = 2**31 - 2
_PREPARED_PAGES = 2048
_ENTRIES_A_PAGE = 40
"""Of the 64 that a page has room for, when an index is filled at once: below where slots grow."""
_PAGES_A_CHUNK_SHIFT = 14

_NONE = np.empty(0, dtype=np.int32)


class Claim(NamedTuple):
    """What `Index.claim` found or made, for n ids.

    Attributes:
        rows: int32[n], −1 where admission refused the id.
        counts: int32[n], the row's updates with this one; 0 where refused.
        fresh: int32[…], positions of the ids whose row is new.
        refused: how many were refused.
    """

    rows: Rows
    counts: Counts
    fresh: Rows
    refused: int


class Entries(NamedTuple):
    """The entries of some slots, one slot after the other: int64[n] ids, int32[n] rows and counts."""

    ids: Ids
    rows: Rows
    counts: Counts


class Directory(NamedTuple):
    """Which pages the slots of an index have: int32[slots] how many, int32[slots] entries in them, and
    int32[slots, width] which, of the chunks' pages counted through."""

    pages: Counts
    used: Counts
    of: NDArray[np.int32]


class Index:
    """The index of the virtual slots `slots`; an id becomes an entry at its `needed`-th claim.

    Pending counts are bounded: each slot remembers 128 ids that it has not admitted, in 16 buckets of
    8 by hash, and a new one displaces the one of its bucket that was not claimed for longest. A displaced id
    starts from nothing, so admission may come later than at the `needed`-th claim, never earlier.
    """

    def __init__(self, slots: range, needed: int = 1, *, memory: ChunkMemory = PRIVATE) -> None:
        self._first = slots.start
        self._source = memory
        self._needed = needed
        count = len(slots)
        self._used = np.zeros(count, dtype=np.int32)
        self._counters = np.zeros(7, dtype=np.int64)
        self._free = np.empty(0, dtype=np.int32)
        buckets = count * _BUCKETS if needed > 1 else 0
        self._pending_ids = np.zeros((buckets, _WAYS), dtype=np.int64)
        self._pending_counts = np.zeros((buckets, _WAYS), dtype=np.int32)
        self._lay_out()

    def _lay_out(self) -> None:
        """Give every slot empty pages with room for as many entries as `used` says; page 0 where none."""
        self._memory = Slabs([PAGE], large=True, memory=self._source)
        assert self._memory.shift == _PAGES_A_CHUNK_SHIFT
        self._pages = 1 + self._used // np.int32(_ENTRIES_A_PAGE)
        own = np.where(self._used > 0, self._pages, 0)
        ends = 1 + np.cumsum(own, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 1
        self._memory.reserve(total)
        self._counters[_NEXT_PAGE] = total
        width = max(4, int(self._pages.max(initial=0)))
        firsts = np.where(own > 0, ends - own, 0).astype(np.int32)
        self._directory: NDArray[np.int32] = np.add(firsts[:, np.newaxis], np.arange(width, dtype=np.int32))
        _loops().clear_pages(0, total, self._chunks)

    @classmethod
    def adopted(cls, slots: range, rows: int, directory: Directory, pages: list[Bytes]) -> Index:
        """One whose pages others have written, to `find` and list `entries`; it is not to be changed."""
        index = cls.__new__(cls)
        index._first, index._counters = slots.start, np.zeros(7, dtype=np.int64)
        index._counters[_ROWS] = rows
        index._pages, index._used, index._directory = directory.pages, directory.used, directory.of
        index._memory = Slabs([PAGE])
        index._memory.adopt([[chunk] for chunk in pages])
        return index

    @property
    def directory(self) -> Directory:
        """What `adopted` takes. Not to be written."""
        return Directory(self._pages, self._used, self._directory)

    @property
    def pages(self) -> list[Bytes]:
        """The chunks that pages lie in. Not to be written."""
        return [chunk[0] for chunk in self._memory.chunks]

    def give_back(self) -> None:
        """Let go of all pages; this is not used any more."""
        self._memory.give_back()

    @property
    def _chunks(self) -> NDArray[np.int64]:
        chunks: NDArray[np.int64] = self._memory.addresses[0]
        return chunks

    def __len__(self) -> int:
        return int(self._counters[_ROWS])

    @property
    def high_water(self) -> int:
        """Rows are numbered below this."""
        return int(self._counters[_NEXT_ROW])

    @property
    def used(self) -> NDArray[np.int32]:
        """int32[slots]: entries of each slot. Not to be written."""
        return self._used

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        arrays = (
            self._pages,
            self._used,
            self._directory,
            self._free,
            self._pending_ids,
            self._pending_counts,
        )
        return int(self._counters[_NEXT_PAGE]) * PAGE + sum(array.nbytes for array in arrays)

    def stranger(self, ids: Ids) -> int | None:
        """The first id that belongs to another server. All other methods take only ids of this one."""
        position = _loops().stranger(ids, self._first, len(self._pages))
        return None if position < 0 else int(ids[position])

    def find(self, ids: Ids) -> tuple[Rows, int]:
        """int32[n]: the row of each id, −1 where it has none; and how many have one."""
        rows = np.empty(len(ids), dtype=np.int32)
        found = _loops().find(ids, self._first, self._pages, self._directory, self._chunks, rows)
        return rows, found

    def claim(self, ids: Ids) -> Claim:
        """Find each id or, where it is admitted, make its entry; `ids` differ from each other.

        Raises:
            EnvironmentFailure: there could be more than 2³¹ − 2 rows; nothing changed.
        """
        self._check_room(len(ids))
        rows, counts = np.empty(len(ids), dtype=np.int32), np.empty(len(ids), dtype=np.int32)
        known = _loops().count(
            ids, self._first, self._pages, self._directory, self._chunks, rows, counts
        )  # fmt: skip
        absent = np.flatnonzero(rows < 0).astype(np.int32) if known < len(ids) else _NONE
        fresh = self._admit(ids, absent, self._needed, rows, counts)
        return Claim(rows, counts, fresh, int(self._counters[_REFUSED]))

    def put(self, ids: Ids, counts: Counts) -> Rows:
        """Have an entry with this count of updates for each id, whatever was counted before; their rows.

        Raises:
            EnvironmentFailure: there could be more than 2³¹ − 2 rows; nothing changed.
        """
        self._check_room(len(ids))
        rows, known = self.find(ids)
        if known < len(ids):
            absent = np.flatnonzero(rows < 0).astype(np.int32)
            self.remove(ids[absent])  # what admission counted of them
            self._admit(ids, absent, 1, rows, np.empty_like(rows))
        _loops().set_counts(ids, counts, self._first, self._pages, self._directory, self._chunks)
        return rows

    def _admit(self, ids: Ids, absent: Rows, needed: int, rows: Rows, counts: Counts) -> Rows:
        """Make entries for the ids at positions `absent`, at their `needed`-th claim; where those are."""
        fresh, counters = np.empty_like(absent), self._counters
        counters[[_FRESH, _REFUSED]] = 0
        done = 0
        while done < len(absent):
            done = _loops().claim(
                ids, absent, done, self._first, self._pages, self._used, self._directory, self._chunks,
                counters, self._free, needed, self._pending_ids, self._pending_counts, rows, counts,
                fresh,
            )  # fmt: skip
            if done < len(absent):
                self._make_room(int(counters[_WANTED]))
        self._memory.reserve(int(counters[_NEXT_PAGE]) + _PREPARED_PAGES)
        return fresh[: counters[_FRESH]]

    def _make_room(self, pages: int) -> None:
        """So that one slot can have `pages` pages."""
        self._memory.reserve(int(self._counters[_NEXT_PAGE]) + pages)
        width = self._directory.shape[1]
        if pages > width:
            wider = np.zeros((len(self._pages), max(pages, width * 3 // 2)), dtype=np.int32)
            wider[:, :width] = self._directory
            self._directory = wider

    def prepare(self) -> None:
        """Have memory for the next pages that slots grow by, as `Slabs.prepare`."""
        self._memory.prepare(lambda: int(self._counters[_NEXT_PAGE]), _PREPARED_PAGES)

    def remove(self, ids: Ids) -> int:
        """Drop entries and pending counts of ids; their rows are claimed again. Returns how many had one."""
        free = int(self._counters[_FREE])
        if free + len(ids) > len(self._free):
            larger = np.empty(max(free + len(ids), len(self._free) * 3 // 2), dtype=np.int32)
            larger[:free] = self._free[:free]
            self._free = larger
        removed: int = _loops().remove(
            ids, self._first, self._pages, self._used, self._directory, self._chunks, self._counters,
            self._free, self._pending_ids, self._pending_counts,
        )  # fmt: skip
        return removed

    def entries(self, slots: NDArray[np.int64]) -> Entries:
        """The entries of the slots at positions int64[k], one slot after the other."""
        used = self._used[slots]
        slots = slots[used > 0]  # a small table has entries in few of them
        count = int(used.sum(dtype=np.int64))
        ids = np.empty(count, dtype=np.int64)
        rows, counts = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
        _loops().entries(slots, self._pages, self._directory, self._chunks, ids, rows, counts)
        return Entries(ids, rows, counts)

    def fill(self, ids: Ids, counts: Counts) -> None:
        """Make the entries of an index that has none yet: id number i with row i and counts[i].

        Raises:
            EnvironmentFailure: more than 2³¹ − 2 rows.
            ProtocolError: an id of another server, or one that stands there twice.
        """
        assert self.high_water == 0
        self._check_room(len(ids))
        self._check_own(ids)
        _loops().tally(ids, self._first, self._used)
        self._lay_out()
        bad = _loops().fill(ids, counts, self._first, self._pages, self._directory, self._chunks)
        if bad >= 0:
            raise ProtocolError(f"id {ids[bad]} stands twice among a table's rows: they are damaged")
        self._counters[[_NEXT_ROW, _ROWS]] = len(ids)

    def pending(self) -> tuple[Ids, Counts]:
        """Ids that were counted and not admitted, int64[m] and int32[m].

        In the order of slots and buckets, and in a bucket from the last claimed on.
        """
        counted = self._pending_counts > 0
        return self._pending_ids[counted], self._pending_counts[counted]

    def fill_pending(self, ids: Ids, counts: Counts) -> None:
        """Take up what `pending` gave, of this index's slots; ids of one bucket in the same order.

        Raises:
            ProtocolError: an id of another server, or one that no such index could have counted.
        """
        self._check_own(ids)
        bad = 0 if len(ids) else -1
        if self._needed > 1:
            bad = _loops().fill_pending(
                ids, counts, self._first, self._needed, self._pending_ids, self._pending_counts
            )
        if bad >= 0:
            raise ProtocolError(
                f"id {ids[bad]} with {counts[bad]} updates cannot wait for admission: the counts are damaged"
            )

    def _check_room(self, more: int) -> None:
        if self.high_water + more > _MOST_ROWS:
            raise EnvironmentFailure(f"a server holds at most {_MOST_ROWS} rows of a table: use more servers")

    def _check_own(self, ids: Ids) -> None:
        stranger = self.stranger(ids)
        if stranger is not None:
            raise ProtocolError(f"id {stranger} belongs to another server")


@functools.cache
def _loops() -> ModuleType:
    return load(Path(__file__).with_name("index_loops.py").read_text())
