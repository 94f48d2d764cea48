"""A shard's snapshot as a message and the arrays that follow it, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.shard.snapshot import ModelSnapshot, ShardSnapshot, TableSnapshot

Arrays = list[NDArray[Any]]


def pack(snapshot: ShardSnapshot, term: int) -> tuple[m.Snapshot, Arrays]:
    """The message and its payload; the arrays are the snapshot's own."""
    message = m.Snapshot(
        term=term,
        index=snapshot.index,
        servers=snapshot.servers,
        position=snapshot.position,
        version=snapshot.version,
        models=tuple(
            m.ModelPart(
                x.spec, x.rules, x.start, x.stop, tuple(x.states), len(x.counts), x.updates, x.program
            )
            for x in snapshot.models
        ),
        changed=snapshot.changed,
        tables=tuple(
            m.TablePart(
                t.spec, t.rule, len(t.ids), len(t.last), _widths(t), len(t.pending_ids), t.updates, t.program
            )
            for t in snapshot.tables
        ),
        ledger=snapshot.ledger,
        standings=snapshot.standings,
        recorded=snapshot.recorded,
        programs=len(snapshot.programs),
    )
    arrays: Arrays = [snapshot.programs]
    for model in snapshot.models:
        arrays += [model.values, *model.states.values(), model.counts]
    for table in snapshot.tables:
        arrays += [table.ids, table.counts, table.last, table.values, *table.states.values()]
        arrays += [table.pending_ids, table.pending_counts]
    return message, arrays


def _widths(table: TableSnapshot) -> tuple[tuple[str, int], ...]:
    return tuple((name, state.shape[1]) for name, state in table.states.items())


def room(message: m.Snapshot) -> tuple[ShardSnapshot, Arrays]:
    """A snapshot whose arrays are to be received, and those arrays, in the order in which they come."""
    arrays: Arrays = []

    def array(dtype: type, *shape: int) -> NDArray[Any]:
        arrays.append(np.empty(shape, dtype=dtype))
        return arrays[-1]

    programs = array(np.uint8, message.programs)
    models = tuple(_model(part, array) for part in message.models)
    tables = tuple(_table(part, array) for part in message.tables)
    snapshot = ShardSnapshot(
        message.index,
        message.servers,
        message.position,
        message.version,
        models,
        message.changed,
        tables,
        message.ledger,
        message.standings,
        message.recorded,
        programs,
    )
    return snapshot, arrays


def _model(part: m.ModelPart, array: Any) -> ModelSnapshot:
    length = part.stop - part.start
    return ModelSnapshot(
        part.spec,
        part.rules,
        part.start,
        part.stop,
        values=array(np.float32, length),
        states={name: array(np.float32, length) for name in part.states},
        counts=array(np.int64, part.counts),
        updates=part.updates,
        program=part.program,
    )


def _table(part: m.TablePart, array: Any) -> TableSnapshot:
    return TableSnapshot(
        part.spec,
        part.rule,
        ids=array(np.int64, part.rows),
        counts=array(np.int32, part.rows),
        last=array(np.int32, part.last),
        values=array(np.float32, part.rows, part.spec.dim),
        states={name: array(np.float32, part.rows, width) for name, width in part.states},
        pending_ids=array(np.int64, part.pending),
        pending_counts=array(np.int32, part.pending),
        updates=part.updates,
        program=part.program,
    )
