"""What a shard is at one position of the log, as plain arrays: for checkpoints and standbys.

Invariants:
- Arrays are copies: nothing that happens later changes them.
- Models and tables stand in the order of their ids. Rows stand slot by slot, so a table's part for other
  slots is a concatenation of pieces of these arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.messages import (
    AccountRecord,
    DataProgress,
    LogStateRecord,
    ModelSpec,
    ProgramRecord,
    RuleSpec,
    TableSpec,
)

Array = NDArray[np.float32]
Arrays = list[NDArray[Any]]

NOTHING_SAID = ProgramRecord()


@dataclass(frozen=True, slots=True, eq=False)
class ModelSnapshot:
    """Elements [start, stop) of a model.

    Attributes:
        rules: of each parameter group, with the settings of now.
        values: float32[stop − start].
        states: state name → float32[stop − start].
        counts: int64[tensors], updates of each tensor, in the order of the layout.
        updates: commits that touched the model.
        program: what workers' programs have said of it besides.
        vectors: float32[stop − start] of each of `program.vectors`.
    """

    spec: ModelSpec
    rules: tuple[RuleSpec, ...]
    start: int
    stop: int
    values: Array
    states: dict[str, Array]
    counts: NDArray[np.int64]
    updates: int
    program: ProgramRecord = NOTHING_SAID
    vectors: tuple[Array, ...] = ()

    def arrays(self) -> list[Array]:
        """All that are as long as the range."""
        return [self.values, *self.states.values(), *self.vectors]


@dataclass(frozen=True, slots=True, eq=False)
class TableSnapshot:
    """The rows of one server's slots of a table.

    Attributes:
        rule: with the settings of now.
        ids: int64[n], in the order of virtual slots.
        counts: int32[n], updates of each row.
        last: int32[n], version of each row's last gradient modulo 2³², with an expiry; else int32[0].
        values: float32[n, dim].
        states: state name → float32[n, width], width 1 for rules with one state a row.
        pending_ids, pending_counts: int64[m], int32[m]: what admission has counted, in the order of slots
            and buckets, and in a bucket from the last pushed on.
        updates: commits that touched the table.
        program: what workers' programs have said of it besides.
    """

    spec: TableSpec
    rule: RuleSpec
    ids: NDArray[np.int64]
    counts: NDArray[np.int32]
    last: NDArray[np.int32]
    values: Array
    states: dict[str, Array]
    pending_ids: NDArray[np.int64]
    pending_counts: NDArray[np.int32]
    updates: int
    program: ProgramRecord = NOTHING_SAID


@dataclass(frozen=True, slots=True, eq=False)
class ShardSnapshot:
    """Server `index` of `servers` as of one position of the log.

    Attributes:
        position: of the last entry that is contained; version: of the last that changed values.
        changed: version of each model's last change.
        ledger: every member's last step and answer.
        standings: what follows from the log up to `position`.
        recorded: where the workers are in their data.
        programs: uint8[n], what their programs keep and what their meetings came to, as `Programs.to_bytes`.
    """

    index: int
    servers: int
    position: int
    version: int
    models: tuple[ModelSnapshot, ...]
    changed: tuple[int, ...]
    tables: tuple[TableSnapshot, ...]
    ledger: tuple[AccountRecord, ...]
    standings: LogStateRecord
    recorded: DataProgress
    programs: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


# ── as a message ────────────────────────────────────────────────────────────────────────────────


def pack(snapshot: ShardSnapshot, term: int) -> tuple[m.Snapshot, Arrays]:
    """The snapshot as a message in `term`, and the arrays that follow it, which are the snapshot's own."""
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
        arrays += [*model.arrays(), model.counts]
    for table in snapshot.tables:
        arrays += [table.ids, table.counts, table.last, table.values, *table.states.values()]
        arrays += [table.pending_ids, table.pending_counts]
    return message, arrays


def _widths(table: TableSnapshot) -> tuple[tuple[str, int], ...]:
    return tuple((name, state.shape[1]) for name, state in table.states.items())


def to_receive(message: m.Snapshot) -> tuple[ShardSnapshot, Arrays]:
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
        vectors=tuple(array(np.float32, length) for _ in part.program.vectors),
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
