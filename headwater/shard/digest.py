"""What a shard is, as one short digest a part: equal for primary and standby at one position of the log.

Pure. Invariant: rows count as a set: ids in order, whatever places they have in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.messages import Digest
from headwater.shard.snapshot import ModelSnapshot, ShardSnapshot, TableSnapshot

_SIZE = 16
_ROWS = 1 << 16
"""Rows put in order at once."""


def digests(snapshot: ShardSnapshot) -> tuple[Digest, ...]:
    """Of every part, in the order of registration; blocks for about a second a gigabyte."""
    return tuple(_parts(snapshot))


def _parts(snapshot: ShardSnapshot) -> Iterator[Digest]:
    for model, changed in zip(snapshot.models, snapshot.changed, strict=True):
        yield from _of_model(model, changed)
    for table in snapshot.tables:
        yield from _of_table(table)
    yield _digest("ledger", snapshot.ledger)
    yield _digest("standings", snapshot.standings, snapshot.version)
    yield _digest("positions in the data", snapshot.recorded)
    yield _digest("what programs keep", arrays=[snapshot.programs])


def _of_model(model: ModelSnapshot, changed: int) -> Iterator[Digest]:
    name = f"model {model.spec.name!r}"
    declared = model.spec, model.rules, model.start, model.stop, model.updates, model.program, changed
    yield _digest(f"{name}: parameters", arrays=[model.values])
    for state, values in model.states.items():
        yield _digest(f"{name}: state {state!r}", arrays=[values])
    for vector, values in zip(model.program.vectors, model.vectors, strict=True):
        yield _digest(f"{name}: vector {vector!r}", arrays=[values])
    yield _digest(f"{name}: counts and settings", *declared, arrays=[model.counts])


def _of_table(table: TableSnapshot) -> Iterator[Digest]:
    name = f"table {table.spec.name!r}"
    order, pending = np.argsort(table.ids), np.argsort(table.pending_ids)
    last = table.last[order] if len(table.last) else table.last
    yield _digest(f"{name}: ids", arrays=[table.ids[order]])
    yield _digest(f"{name}: rows", arrays=_ordered(table.values, order))
    for state, values in table.states.items():
        yield _digest(f"{name}: state {state!r}", arrays=_ordered(values, order))
    yield _digest(f"{name}: last steps and counts", arrays=[table.counts[order], last])
    yield _digest(
        f"{name}: admission and settings",
        *(table.spec, table.rule, table.updates, table.program),
        arrays=[table.pending_ids[pending], table.pending_counts[pending]],
    )


def _ordered(rows: NDArray[Any], order: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    for first in range(0, len(order), _ROWS):
        yield rows[order[first : first + _ROWS]]


def _digest(part: str, *told: Any, arrays: Iterator[NDArray[Any]] | Sequence[NDArray[Any]] = ()) -> Digest:
    summed = hashlib.blake2b(repr(told).encode(), digest_size=_SIZE)
    for array in arrays:
        summed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return Digest(part, summed.hexdigest())
