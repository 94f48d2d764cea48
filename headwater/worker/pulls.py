"""Rows of tables on their way to a worker: several tables' in one exchange, and rows that came ahead.

Invariants:
- Whatever is asked for together is of one version, on all servers.
- Which rows that came ahead may be used `headwater.machines.rows_ahead` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels.arrange import Ids, Plan, arrange
from headwater.machines.current_read import is_large
from headwater.machines.row_buffer import RowBuffer, RowSlice
from headwater.machines.rows_ahead import Ahead
from headwater.runtime.client import Client
from headwater.wire.channel import Outgoing

if TYPE_CHECKING:
    from headwater.worker.local_table import LocalTable

Array = NDArray[np.float32]

Asked = Sequence[tuple["LocalTable", Plan]]
"""Tables, each of which may be there several times, and the plans of the ids that are wanted of them."""


def pull_rows(
    session: Client, memory: RowBuffer, asked: Asked, use: Callable[[int, Array], Any], what: str
) -> int:
    """Pull in one exchange; `use(i, rows)` gets float32[u, dim], of the ids of `asked[i]`'s plan.

    `rows` is valid during the call only, and must not be changed. Blocks; returns the version of the rows.
    Raises as `Client.call`.
    """
    session.finish()
    used = memory.used
    pulls = _by_table(asked, len(session.channels))
    places = [memory.take(pull.plan, pull.table.dim) for pull in pulls]
    parts = list(zip(pulls, places, strict=True))
    ordered = is_large(sum(4 * len(pull.plan.ids) * pull.table.dim for pull in pulls), len(session.channels))
    try:
        answer: m.Answer = session.call(
            lambda server, number: _request(memory, parts, server, number, ordered),
            what,
            lambda server, _: memory.incoming(places, server),
            memory=memory,
        )
        for pull, place in parts:
            pull.hand_out(memory.rows(place), use)
        return answer.version
    finally:
        memory.reset(used)


@dataclass(frozen=True, slots=True, eq=False)
class _TablePull:
    """What is pulled of one table. `numbers`: of those of `asked` that are of it."""

    table: LocalTable
    plan: Plan
    numbers: list[int]
    sizes: list[int]

    def hand_out(self, rows: Array, use: Callable[[int, Array], Any]) -> None:
        """`rows`: of each of the plan's ids."""
        if len(self.numbers) == 1:
            use(self.numbers[0], rows)
            return
        begin = 0
        for number, size in zip(self.numbers, self.sizes, strict=True):
            use(number, rows[self.plan.inverse[begin : begin + size]])
            begin += size


def _by_table(asked: Asked, servers: int) -> list[_TablePull]:
    """A request names a table once, so what is asked of it is united."""
    numbers: dict[LocalTable, list[int]] = {}
    for number, (table, _) in enumerate(asked):
        numbers.setdefault(table, []).append(number)
    pulls = []
    for table, mine in numbers.items():
        plans = [asked[number][1] for number in mine]
        plan = plans[0] if len(plans) == 1 else arrange(np.concatenate([p.ids for p in plans]), servers)
        pulls.append(_TablePull(table, plan, mine, [len(p.ids) for p in plans]))
    return pulls


def _request(
    memory: RowBuffer, parts: Sequence[tuple[_TablePull, RowSlice]], server: int, number: int, ordered: bool
) -> Outgoing:
    rows = tuple([memory.part(place, pull.table.id, server) for pull, place in parts])
    arrays = [array for _, place in parts for array in memory.outgoing(place, server, rows=False)]
    return Outgoing(m.PullRows(number, rows, ordered), arrays)


def pull_together(
    session: Client, memory: RowBuffer, wanted: Sequence[tuple[LocalTable, Ids]]
) -> list[Ahead]:
    """The rows of each of `wanted`, all of one version, which is each table's `read_version` from then on.

    What all came ahead is there; otherwise they are pulled in one exchange. Raises as `Client.call`.
    """
    there = _all_ahead(wanted, session.version)
    if there is None:
        asked = [(table, table.planned(given)) for table, given in wanted]
        rows = [np.empty((len(plan.ids), table.dim), dtype=np.float32) for table, plan in asked]
        version = session.version
        if some := [number for number, one in enumerate(rows) if len(one)]:
            names = ", ".join(sorted({repr(asked[number][0].name) for number in some}))
            version = pull_rows(
                session,
                memory,
                [asked[number] for number in some],
                lambda place, values: rows[some[place]].__setitem__(slice(None), values),
                f"pull of tables {names}",
            )
        there = [
            Ahead(plan, given, mine, version)
            for (_, plan), (_, given), mine in zip(asked, wanted, rows, strict=True)
        ]
    for (table, _), ahead in zip(wanted, there, strict=True):
        table.read_version = ahead.version
    return there


def _all_ahead(wanted: Sequence[tuple[LocalTable, Ids]], version: int) -> list[Ahead] | None:
    """What came ahead for each of these, once; None where some did not, and all is left there."""
    there = []
    for table, given in wanted:
        found = table.ahead.find(given, version)
        if found is None:
            return None
        there.append(found)
    for (table, given), _ in zip(wanted, there, strict=True):
        table.ahead.take(given, version)
    return there
