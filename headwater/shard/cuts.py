"""What a follower is sent of a shard, as plain arrays, as of one version.

Invariant: the arrays are copies, and stay as they are until the follower has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m

Arrays: TypeAlias = list[NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class TableCut:
    """One server's rows of a table as of a version; see `m.PublishedRows`.

    `ids`: int64[n]; `values`: float32[n, dim]; `deleted`: int64[k]; `last`: int32[n], or None.
    """

    base: int
    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    deleted: NDArray[np.int64]
    last: NDArray[np.int32] | None

    def describe(self, table: int) -> m.PublishedRows:
        """As a message."""
        return m.PublishedRows(table, self.base, len(self.ids), len(self.deleted), self.last is not None)

    def arrays(self) -> Arrays:
        """In the order in which they travel."""
        last = () if self.last is None else (self.last,)
        return [self.ids, self.values, self.deleted, *last]


@dataclass(frozen=True, slots=True, eq=False)
class ShardCut:
    """What one follower is sent, as of `version` at `position`.

    `models`: by id, this server's range as float32, or as the bits of bfloat16.
    """

    version: int
    position: int
    models: Mapping[int, NDArray[Any]]
    tables: Sequence[tuple[int, TableCut]]
    recorded: m.DataProgress

    def message(self, number: int) -> m.Publication:
        """What goes before `arrays()`."""
        tables = tuple(cut.describe(table) for table, cut in self.tables)
        return m.Publication(number, self.version, self.position, tuple(self.models), tables, self.recorded)

    def arrays(self) -> Arrays:
        """The payload."""
        rows = [array for _, cut in self.tables for array in cut.arrays()]
        return [array for array in (*self.models.values(), *rows) if array.size]
