"""One version of models and tables in memory that other processes of the machine read.

`share` says where everything of a `VersionCopy` lies; `SharedCopy` is that version in another process.

Invariants:
- Whoever shares does not write the memory again before every reader has let it go.
- A reader trusts the owner's process, which is of the same user, with what the pages of an index say; places
  in the file are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.kernels.index import PAGE, Directory
from headwater.kernels.slabs import Bytes, ChunkMemory, Slabs
from headwater.shard.table_copy import Ids, TableCopy
from headwater.shard.version_copy import Readable, VersionCopy
from headwater.spec.layout import Layout
from headwater.spec.placement import SLOTS

_INT = 4
_PAGES_SHIFT = Slabs([PAGE]).shift


class SharedMemory(ChunkMemory, Protocol):
    """Memory that can be shared.

    Attributes:
        size: bytes of it.
    """

    @property
    def size(self) -> int: ...

    def offset(self, memory: NDArray[Any]) -> int:
        """Where a piece begins in it."""


class MemoryView(Protocol):
    """Somebody else's."""

    def piece(self, offset: int, size: int) -> Bytes:
        """Bytes [offset, offset + size), read-only. Raises ProtocolError: they lie outside of it."""


class Sharing:
    """Says where the versions of one copy lie, which has its memory from `memory`."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._directories: dict[int, Bytes] = {}

    def share(self, copy: VersionCopy, numbers: Mapping[int, int]) -> m.SharedVersion:
        """Of the version that the copy is now. `numbers`: by the copy's id, how readers call a table."""
        memory = self._memory
        models = tuple(m.SharedModel(id, memory.offset(vector)) for id, vector in copy.vectors.items())
        tables = tuple(self._table(id, table, numbers[id]) for id, table in copy.tables.items())
        return m.SharedVersion(memory.size, models, tables)

    def _table(self, id: int, table: TableCopy, number: int) -> m.SharedTable:
        memory = self._memory
        pages, used, of = table.directory
        words = np.concatenate([pages, used, of.reshape(-1)]).astype(np.int32, copy=False)
        place = self._directories.get(id)
        if place is None or place.size != words.nbytes:
            if place is not None:
                memory.give_back(place)
            place = self._directories[id] = memory.take(words.nbytes, False)
        place.view(np.int32)[:] = words
        slabs = tuple(
            tuple(memory.offset(chunk[slab]) for chunk in table.chunks)
            for slab in range(len(table.row_bytes))
        )
        index = tuple(memory.offset(chunk) for chunk in table.pages)
        return m.SharedTable(number, len(table), of.shape[1], memory.offset(place), index, slabs)


class SharedCopy:
    """A version that lies in another process's memory, as `VersionCopy` has one; it is not written here.

    Attributes: as those of `VersionCopy`.
    """

    def __init__(
        self, models: Mapping[int, m.ModelSpec], tables: Mapping[int, m.TableSpec], dtype: m.ReadType
    ) -> None:
        self.servers = 1
        self.layouts = {id: Layout(spec.tensors) for id, spec in models.items()}
        self.vectors: dict[int, NDArray[Any]] = {}
        self.models = dict.fromkeys(self.layouts, -1)
        self.tables: dict[int, TableCopy] = {}
        self.position = 0
        self.recorded = m.DataProgress()
        self.touched: dict[int, Ids | None] = {}
        self._specs = dict(tables)
        self._versions = dict.fromkeys(self._specs, -1)
        self._kind = np.uint16 if dtype == "bfloat16" else np.float32
        self._view: MemoryView | None = None
        self._ids: list[Ids] = []

    def wanted(self) -> tuple[tuple[m.Wanted, ...], tuple[m.Wanted, ...]]:
        """As `VersionCopy.wanted`: of tables, which ids have changed since the version that was here."""
        models = tuple(m.Wanted(id) for id in self.models)
        return models, tuple(m.Wanted(id, version) for id, version in self._versions.items())

    def expect(self, server: int) -> None:
        """As `VersionCopy.expect`."""
        self._ids = []

    def open(self, view: MemoryView) -> None:
        """The memory of what comes next."""
        self._view = view

    def place(self, server: int, part: m.Publication) -> list[NDArray[Any]]:
        """As `VersionCopy.place`: what follows are ids of rows that may have changed."""
        if [rows.table for rows in part.tables] != list(self._specs):
            raise ProtocolError(f"a follower lent other tables than {sorted(self._specs)}")
        if any(rows.deleted < 0 for rows in part.tables):
            raise ProtocolError("a follower lent a table of which less than no rows have changed")
        self._ids = [np.empty(rows.deleted, np.int64) for rows in part.tables]
        return [ids for ids in self._ids if ids.size]

    def install(self, parts: Sequence[m.Publication]) -> int:
        """Become what was lent. Raises ProtocolError: it does not lie in what came with it."""
        (part,) = parts
        shared, view = part.shared, self._view
        if shared is None or view is None:
            raise ProtocolError("a follower of this machine sent a version, and was asked to lend one")
        places = {one.model: one.offset for one in shared.models}
        if set(places) != set(self.layouts) or [one.table for one in shared.tables] != list(self._specs):
            raise ProtocolError("a follower lent other models or tables than it was asked for")
        size = np.dtype(self._kind).itemsize
        self.vectors = {
            id: view.piece(places[id], layout.elements * size).view(self._kind)
            for id, layout in self.layouts.items()
        }
        self.tables = {one.table: self._table(one, view) for one in shared.tables}
        for table in self.tables.values():
            table.version = part.version
        ids = self._ids or [np.empty(0, np.int64) for _ in part.tables]
        self.touched = {
            rows.table: None if rows.base < 0 or rows.base != self._versions[rows.table] else found
            for rows, found in zip(part.tables, ids, strict=True)
        }
        self.models = dict.fromkeys(self.models, part.version)
        self._versions = dict.fromkeys(self._versions, part.version)
        self.position, self.recorded = part.position, part.recorded
        return part.version

    def _table(self, shared: m.SharedTable, view: MemoryView) -> TableCopy:
        table = TableCopy.unfilled(self._specs[shared.table], 1)
        if shared.width < 1 or len(shared.slabs) != len(table.row_bytes):
            raise ProtocolError(f"table {table.spec.name!r} was lent with {len(shared.slabs)} slabs")
        if len({len(chunks) for chunks in shared.slabs}) > 1:
            raise ProtocolError(f"table {table.spec.name!r} was lent with slabs of different sizes")
        words = view.piece(shared.directory, (2 + shared.width) * SLOTS * _INT).view(np.int32)
        # Copied, as compiled loops take arrays that could be written.
        pages, used, of = (part.copy() for part in np.split(words, [SLOTS, 2 * SLOTS]))
        of = of.reshape(SLOTS, shared.width)
        used_places = of[np.arange(shared.width) < pages[:, np.newaxis]]
        if not 0 <= used_places.min() <= used_places.max() < len(shared.pages) << _PAGES_SHIFT:
            raise ProtocolError(f"table {table.spec.name!r} was lent with pages outside of its index")
        index = [view.piece(offset, PAGE << _PAGES_SHIFT) for offset in shared.pages]
        shift = Slabs(table.row_bytes).shift
        chunks = [
            [view.piece(offset, size << shift) for offset, size in zip(places, table.row_bytes, strict=True)]
            for places in zip(*shared.slabs, strict=True)
        ]
        table.adopt(shared.rows, Directory(pages, used, of), index, chunks)
        return table

    def become(self, other: Readable) -> None:
        """What comes next is lent whole, and told are the rows that differ from this other version."""
        self._versions = {id: other.tables[id].version for id in self._specs}

    def spoil(self) -> None:
        """As `VersionCopy.spoil`."""
        self.models = dict.fromkeys(self.models, -1)
        self._versions = dict.fromkeys(self._versions, -1)
