"""A follower's copy of one table, as of one version: rows of all servers, read as by a worker's `pull`.

Invariants:
- What `read` returns at a version is, bit by bit, what a pull there returns, of absent and expired ids too.
- A server's rows are replaced whole, or changed from exactly the version that its rows here are of.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError
from headwater.kernels.index import Directory, Index
from headwater.kernels.rows import ages, begin, gather, scatter
from headwater.kernels.slabs import PRIVATE, Bytes, ChunkMemory, Slabs
from headwater.messages import TableSpec
from headwater.shard.cuts import TableCut
from headwater.spec import initializers
from headwater.spec.lifetime import AfterSteps, expiry_from_spec
from headwater.spec.placement import SLOTS, slots_of, slots_of_server

_ITEM = 4

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]


class TableCopy:
    """Of the table `spec`, spread over `servers` servers; empty at first. `memory`: where its rows lie.

    Attributes:
        version: of its rows; -1 for none.
    """

    def __init__(self, spec: TableSpec, servers: int, memory: ChunkMemory = PRIVATE) -> None:
        self.spec = spec
        self._memory = memory
        self.servers = servers
        self.version = -1
        self._set_spec(spec)
        self._make()

    @classmethod
    def unfilled(cls, spec: TableSpec, servers: int) -> TableCopy:
        """One that is to `adopt` what another process has written."""
        copy = cls.__new__(cls)
        copy.spec, copy.servers, copy.version, copy._memory = spec, servers, -1, PRIVATE
        copy._set_spec(spec)
        return copy

    def _set_spec(self, spec: TableSpec) -> None:
        expiry = None if spec.expiry is None else expiry_from_spec(spec.expiry)
        self._expiry = expiry if isinstance(expiry, AfterSteps) else None
        self._initializer = initializers.from_spec(spec.initializer)

    def _make(self) -> None:
        self._index = Index(range(SLOTS), memory=self._memory)
        self._slabs = Slabs(self.row_bytes, memory=self._memory)

    @property
    def row_bytes(self) -> list[int]:
        """Of one row, by slab: its values, and the version of its last gradient where rows expire."""
        return [self.spec.dim * _ITEM, *([_ITEM] if self._expiry else [])]

    def _clear(self) -> None:
        if self._index.high_water:
            self._index.give_back()
            self._slabs.give_back()
            self._make()

    # ── memory that several processes read ──────────────────────────────────────────────────────

    @property
    def directory(self) -> Directory:
        """Of its index."""
        return self._index.directory

    @property
    def pages(self) -> list[Bytes]:
        """The chunks of its index."""
        return self._index.pages

    @property
    def chunks(self) -> list[list[Bytes]]:
        """By chunk, the memory of each slab of rows."""
        return self._slabs.chunks

    def adopt(self, rows: int, directory: Directory, pages: list[Bytes], chunks: list[list[Bytes]]) -> None:
        """Read what another process has written from now on; this copy is never written."""
        self._index = Index.adopted(range(SLOTS), rows, directory, pages)
        self._slabs = Slabs(self.row_bytes)
        self._slabs.adopt(chunks)

    def __len__(self) -> int:
        return len(self._index)

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def install(self, cuts: list[TableCut], version: int) -> None:
        """Become what the servers' `cuts`, in their order, say that the table is at `version`.

        Raises:
            ProtocolError: a cut is of another base than what is here, or brings an id of another server's.
                What is here is not of any version then.
        """
        base, self.version = self.version, -1
        if all(cut.base < 0 for cut in cuts):
            self._clear()
        for server, cut in enumerate(cuts):
            self._take(server, cut, base)
        self._drop_expired(version)
        self.version = version

    def _take(self, server: int, cut: TableCut, base: int) -> None:
        slots = slots_of_server(server, self.servers)
        if cut.base >= 0 and cut.base != base:
            raise ProtocolError(
                f"rows of table {self.spec.name!r} changed since version {cut.base} came for a copy of "
                f"version {base}: they do not apply to it"
            )
        if cut.base < 0 and len(self._index):
            self._index.remove(self._index.entries(np.arange(slots.start, slots.stop)).ids)
        for ids in (cut.ids, cut.deleted):
            of = slots_of(ids)
            strangers = ids[(of < slots.start) | (of >= slots.stop)]
            if len(strangers):
                raise ProtocolError(
                    f"table {self.spec.name!r}: server {server} sent id {strangers[0]} of another"
                )
        self._index.remove(cut.deleted)
        self._put(cut.ids, cut.values, cut.last)

    def _put(self, ids: Ids, values: Rows, last: NDArray[np.int32] | None) -> None:
        self._slabs.reserve(self._index.high_water + len(ids))
        places = self._index.put(ids, np.zeros(len(ids), np.int32))
        scatter(places, self._slabs, self.spec.dim, values)
        if self._expiry is not None:
            if last is None:
                raise ProtocolError(f"table {self.spec.name!r}: rows came without the version of their last")
            scatter(places, self._slabs, 1, last, 1)

    def _drop_expired(self, version: int) -> None:
        if self._expiry is None:
            return
        ids, rows, _ = self._index.entries(np.arange(SLOTS))
        self._index.remove(ids[ages(rows, self._slabs, 1, version) > self._expiry.steps])

    def become(self, other: TableCopy) -> None:
        """Copy all of another copy of the same table."""
        self._clear()
        ids, rows, _ = other._index.entries(np.arange(SLOTS))
        values = other._gathered(rows)
        last = None
        if self._expiry is not None:
            last = np.empty(len(rows), np.int32)
            gather(rows, other._slabs, 1, last, 1)
        self._put(ids, values, last)
        self.version = other.version

    # ── reading ─────────────────────────────────────────────────────────────────────────────────

    def read(self, ids: Ids) -> Rows:
        """float32[n, dim]: the row of each of int64[n] ids; of an absent one its initial value."""
        rows, hits = self._index.find(ids)
        out = self._gathered(rows)
        if hits < len(ids):
            absent = np.flatnonzero(rows < 0)
            places = out.ctypes.data + absent * (self.spec.dim * _ITEM)
            begin(ids[absent], places, self.spec.dim, self._initializer, self.spec.seed)
        return out

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """bool[n]: which of int64[n] ids have a row."""
        has: NDArray[np.bool_] = self._index.find(ids)[0] >= 0
        return has

    def cut(self, have: int, touched: Ids | None) -> TableCut:
        """What a follower with version `have` is sent; the arrays are copies. Blocks for a pass over them.

        `touched`: the ids whose rows may have changed since, each once; None: all.
        """
        if touched is None:
            ids, rows, _ = self._index.entries(np.arange(SLOTS))
            deleted = np.empty(0, np.int64)
        else:
            rows = self._index.find(touched)[0]
            ids, deleted, rows = touched[rows >= 0], touched[rows < 0], rows[rows >= 0]
        last = None
        if self._expiry is not None:
            last = np.empty(len(rows), np.int32)
            gather(rows, self._slabs, 1, last, 1)
        return TableCut(-1 if touched is None else have, ids, self._gathered(rows), deleted, last)

    def scan(self, batch: int) -> Iterator[tuple[Ids, Rows]]:
        """All rows, `batch` at a time but for the last: int64[n] ids and float32[n, dim]."""
        ids, rows, _ = self._index.entries(np.arange(SLOTS))
        for start in range(0, len(ids), batch):
            part = slice(start, start + batch)
            yield ids[part], self._gathered(rows[part])

    def _gathered(self, rows: NDArray[np.int32]) -> Rows:
        out = np.empty((len(rows), self.spec.dim), np.float32)
        gather(rows, self._slabs, self.spec.dim, out)
        return out
