"""The tables of one server, by id: which there are, and what requests say about their rows.

Invariant: ids are the shard's own copies, checked before they are held; only rows lie in memory that a
member shares, which can make values wrong but nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError, RegistrationError
from headwater.kernels.ahead import compile_for_table
from headwater.kernels.rows import row_rule
from headwater.messages import TableSetting, TableSpec
from headwater.shard.merges import Merge
from headwater.shard.runnable import check_runs
from headwater.shard.snapshot import TableSnapshot
from headwater.shard.table import Gradients, Table
from headwater.spec.codecs import parse_row_codec
from headwater.spec.declaration import table_difference
from headwater.spec.placement import slots_of_server
from headwater.spec.rules import from_spec


@dataclass(frozen=True, slots=True, eq=False)
class StagedRows:
    """Ids of a table, each once, and the memory of a row for each.

    `ids`: int64[n], not to change any more; `rows`: float32[n, dim], gradients to read or room for values.
    """

    table: int
    ids: NDArray[np.int64]
    rows: NDArray[np.float32]


Pushed: TypeAlias = Sequence[tuple[int, Sequence[StagedRows]]]
"""Gradients of rows that steps push, each with the place of its step among those of the commit."""


class Tables:
    """What server `index` of `servers` has of every table, numbered from 0 as they were registered.

    Attributes:
        unprepared: `prepare` has something to do.
    """

    def __init__(self, index: int, servers: int) -> None:
        self.unprepared = False
        self._slots = slots_of_server(index, servers)
        self._tables: list[Table] = []
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables)

    def __getitem__(self, id: int) -> Table:
        """The table with this id.

        Raises:
            ProtocolError: there is none.
        """
        if not 0 <= id < len(self._tables):
            raise ProtocolError(f"there is no table {id}, there are {len(self._tables)}")
        return self._tables[id]

    def check(self, staged: Iterable[StagedRows]) -> None:
        """Refuse rows that are not this server's.

        Raises:
            ProtocolError: a table is named twice, does not exist, or has an id that belongs elsewhere.
        """
        seen: set[int] = set()
        for one in staged:
            if one.table in seen:
                raise ProtocolError(f"table {one.table} is named twice in one request")
            seen.add(one.table)
            self[one.table].check(one.ids)

    def check_settings(self, settings: Iterable[TableSetting]) -> None:
        """Refuse settings that a table's rule cannot have.

        Raises:
            ProtocolError: no such table.
            ConfigurationError: no such setting, or an impossible value.
        """
        for setting in settings:
            self[setting.table].rule.with_settings(**setting.values)

    # ── registration ────────────────────────────────────────────────────────────────────────────

    def create(self, spec: TableSpec) -> None:
        """Begin a table without rows; its id is the next one."""
        self._ids[spec.name] = len(self._tables)
        self._tables.append(Table(spec, self._slots))
        self.unprepared = True

    def prepare(self) -> None:
        """Have memory for rows to come, as `Table.prepare`: in a thread of its own, beside any other call."""
        self.unprepared = False
        for table in tuple(self._tables):
            if table.unprepared:
                table.prepare()

    def resolve(self, spec: TableSpec) -> tuple[int, str]:
        """The id of the table that `spec` declares, and what a person should know of that, or "".

        Raises:
            RegistrationError: the one of this name was declared differently; names both.
        """
        id = self._ids[spec.name]
        if unlike := table_difference(self._tables[id].spec, spec):
            raise RegistrationError(unlike)
        return id, self._tables[id].declared(spec)

    # ── as plain arrays ─────────────────────────────────────────────────────────────────────────

    def snapshot(self, version: int) -> tuple[TableSnapshot, ...]:
        """A copy of every table's rows here, but for those that have expired by `version`."""
        return tuple(table.snapshot(version) for table in self._tables)

    def restore(self, snapshots: Iterable[TableSnapshot]) -> None:
        """Become what the snapshots were made of; copies the arrays."""
        for snapshot in snapshots:
            self._ids[snapshot.spec.name] = len(self._tables)
            self._tables.append(Table.from_snapshot(snapshot, self._slots))

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def apply(self, pushed: Pushed, merge: Merge, version: int) -> None:
        """Apply one commit: `pushed` has each worker's gradients, in rank order."""
        for id, (places, parts) in _by_table(pushed).items():
            table = self._tables[id]
            table.apply(parts, merge.divisor, version, table.updates, merge.weights_of(places))
            self.unprepared |= table.unprepared

    def reduce(self, pushed: Pushed, merge: Merge) -> list[StagedRows]:
        """Each table's gradients as one: applying them instead, by `merge.summed()`, gives the same bits.

        Changes nothing.
        """
        return [
            StagedRows(id, *self._tables[id].reduce(parts, merge.weights_of(places)))
            for id, (places, parts) in _by_table(pushed).items()
        ]

    def pull(self, staged: Iterable[StagedRows], version: int) -> None:
        """Write the rows that were asked for."""
        for one in staged:
            self._tables[one.table].pull(one.ids, one.rows, version)


def _by_table(pushed: Pushed) -> dict[int, tuple[list[int], list[Gradients]]]:
    """For each table: the places of the steps that push to it, and what they push."""
    by_table: dict[int, tuple[list[int], list[Gradients]]] = defaultdict(lambda: ([], []))
    for place, staged in pushed:
        for one in staged:
            places, parts = by_table[one.table]
            places.append(place)
            parts.append((one.ids, one.rows))
    return by_table


def check_table(spec: TableSpec) -> None:
    """Refuse a table that cannot be; blocks while the loops of its rule are compiled.

    Raises:
        RegistrationError: an impossible dim.
        ConfigurationError: an unknown or impossible rule, initialiser, admission, expiry or codec.
    """
    parse_row_codec(spec.codec)
    if from_spec(spec.rule).layerwise:
        raise RegistrationError(f"table {spec.name!r}: {spec.rule.name} is a rule for models only")
    check_runs(from_spec(spec.rule), row_rule)
    Table(spec, range(0))
    compile_for_table(coded=spec.codec is not None)
