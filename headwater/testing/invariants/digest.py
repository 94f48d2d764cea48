"""One number for all that must be the same in two copies of a shard."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from headwater.shard import Shard
from headwater.shard.snapshot import ShardSnapshot


def digest(shard: Shard) -> int:
    """Of all that must be the same on a primary and its standby."""
    return snapshot_digest(shard.snapshot())


def snapshot_digest(snapshot: ShardSnapshot) -> int:
    """Of all that a snapshot says."""
    arrays: list[Any] = []
    for model in snapshot.models:
        arrays += [model.counts, *model.arrays()]
    for table in snapshot.tables:
        order = np.argsort(table.ids)  # rows count as a set, whatever places they have in memory
        last = table.last[order] if len(table.last) else table.last
        arrays += [table.ids[order], table.values[order], table.counts[order], last]
        arrays += [table.pending_ids, table.pending_counts, *(one[order] for one in table.states.values())]
    rules = [(model.rules, model.updates, model.program.vectors) for model in snapshot.models]
    notes = [model.program.note for model in snapshot.models]
    rows = [(table.rule, table.updates) for table in snapshot.tables]
    rest = (snapshot.position, snapshot.version, snapshot.changed, snapshot.ledger, snapshot.standings)
    said = msgspec.msgpack.encode((rules, notes, rows, rest, snapshot.recorded))
    return hash((*(array.tobytes() for array in arrays), said))
