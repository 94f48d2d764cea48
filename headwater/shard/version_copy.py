"""One version of models and tables, as a follower keeps it: what arrives, where it goes, what it is then.

Invariants:
- Between `place` and the end of `install` this is of no version; `machines/follower.py` shows it to nobody.
- Parts of all servers are of one version, or none is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.kernels.slabs import PRIVATE, ChunkMemory
from headwater.shard.cuts import TableCut
from headwater.shard.table_copy import TableCopy
from headwater.spec.layout import Layout

Ids: TypeAlias = NDArray[np.int64]


class Readable(Protocol):
    """One version, wherever it lies; `VersionCopy` says what the attributes are."""

    vectors: dict[int, NDArray[Any]]
    models: dict[int, int]
    tables: dict[int, TableCopy]
    position: int
    recorded: m.DataProgress


_LARGE = 4 << 20
"""Bytes from which huge pages are worth their rest."""


def _zeros(memory: ChunkMemory, size: int) -> NDArray[np.uint8]:
    return memory.take(size, size >= _LARGE)


class VersionCopy:
    """Of the models and tables with these ids, spread over `servers` servers, in `memory`.

    Attributes:
        model_specs, table_specs, memory: as given.
        vectors: by model id, float32[elements], or uint16[elements], the bits of bfloat16.
        models: by id, the version of that vector's values; -1 for none.
        tables: by id.
        position: of the log, at which servers copied this version.
        recorded: where workers were in their data then.
        touched: by table id, the ids that the last installation changed; None: all.
    """

    def __init__(
        self,
        models: Mapping[int, m.ModelSpec],
        tables: Mapping[int, m.TableSpec],
        dtype: m.ReadType,
        servers: int,
        memory: ChunkMemory = PRIVATE,
    ) -> None:
        self.model_specs, self.table_specs = dict(models), dict(tables)
        self.memory = memory
        self.servers = servers
        self.layouts = {id: Layout(spec.tensors) for id, spec in models.items()}
        kind = np.uint16 if dtype == "bfloat16" else np.float32
        self.vectors: dict[int, NDArray[Any]] = {
            id: _zeros(memory, layout.elements * np.dtype(kind).itemsize).view(kind)
            for id, layout in self.layouts.items()
        }
        self.models = dict.fromkeys(self.layouts, -1)
        self.tables = {id: TableCopy(spec, servers, memory) for id, spec in tables.items()}
        self.position = 0
        self.recorded = m.DataProgress()
        self.touched: dict[int, Ids | None] = {}
        self._arrived: dict[int, list[TableCut]] = {}

    def wanted(self) -> tuple[tuple[m.Wanted, ...], tuple[m.Wanted, ...]]:
        """What a request for a newer version says of models and of tables."""
        models = tuple(m.Wanted(id, version) for id, version in self.models.items())
        return models, tuple(m.Wanted(id, table.version) for id, table in self.tables.items())

    def expect(self, server: int) -> None:
        """A server is asked, perhaps again: what it has sent before does not count."""
        self._arrived.pop(server, None)

    def place(self, server: int, part: m.Publication) -> list[NDArray[Any]]:
        """Where the payload that follows a server's part goes, in its order.

        Raises:
            ProtocolError: it has what was not asked for.
        """
        arrays: list[NDArray[Any]] = []
        for id in part.models:
            if id not in self.vectors:
                raise ProtocolError(f"server {server} published model {id}, asked for {sorted(self.vectors)}")
            start, stop = self.layouts[id].cut(self.servers)[server]
            self.models[id] = -1
            arrays.append(self.vectors[id][start:stop])
        cuts = self._arrived[server] = self._rooms(part)
        arrays += [array for cut in cuts for array in cut.arrays()]
        return [array for array in arrays if array.size]

    def _rooms(self, part: m.Publication) -> list[TableCut]:
        if [rows.table for rows in part.tables] != list(self.tables):
            raise ProtocolError(f"a server published other tables than {sorted(self.tables)}")
        return [self._room(rows) for rows in part.tables]

    def _room(self, rows: m.PublishedRows) -> TableCut:
        if min(rows.rows, rows.deleted) < 0:
            raise ProtocolError(f"{rows.rows} rows and {rows.deleted} deleted of table {rows.table}")
        dim = self.tables[rows.table].spec.dim
        return TableCut(
            rows.base,
            np.empty(rows.rows, np.int64),
            np.empty((rows.rows, dim), np.float32),
            np.empty(rows.deleted, np.int64),
            np.empty(rows.rows, np.int32) if rows.last else None,
        )

    def install(self, parts: Sequence[m.Publication]) -> int:
        """Become what all servers' parts, whose payloads have arrived, say together; returns the version.

        Raises:
            ProtocolError: the parts are not of one version, or do not apply to what is here.
        """
        first = parts[0]
        for server, part in enumerate(parts):
            if (part.version, part.position, part.models) != (first.version, first.position, first.models):
                raise ProtocolError(
                    f"servers 0 and {server} published versions {first.version} and {part.version} for one "
                    f"request: they are not one version"
                )
        # Where a server has nothing, nothing follows its part, and no place was asked for.
        arrived = [self._arrived.get(server) or self._rooms(part) for server, part in enumerate(parts)]
        for place, (id, table) in enumerate(self.tables.items()):
            cuts = [cuts[place] for cuts in arrived]
            table.install(cuts, first.version)
            whole = any(cut.base < 0 for cut in cuts)
            changed = [ids for cut in cuts for ids in (cut.ids, cut.deleted)]
            self.touched[id] = None if whole else np.concatenate(changed)
        for id in self.models:
            if id in first.models:
                self.models[id] = first.version
            elif self.models[id] < 0:
                raise ProtocolError(f"model {id} did not come, and no version of it is here")
        self.position, self.recorded = first.position, first.recorded
        self._arrived.clear()
        return first.version

    def become(self, other: Readable) -> None:
        """Copy all of another one's version."""
        for id, vector in self.vectors.items():
            np.copyto(vector, other.vectors[id])
            self.models[id] = other.models[id]
        for id, table in self.tables.items():
            table.become(other.tables[id])
        self.position, self.recorded = other.position, other.recorded

    def spoil(self) -> None:
        """What is here is of no version any more: the next request asks for all of it."""
        self.models = dict.fromkeys(self.models, -1)
        for table in self.tables.values():
            table.version = -1
        self._arrived.clear()
