"""What differs between two versions, for engines that take changes instead of whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.follower.subject import Subject
from headwater.machines.follower import Slot
from headwater.spec.version import Version

Ids: TypeAlias = NDArray[np.int64]

_GAP = 16
"""Equal elements between two changed ones that do not end a run: a run costs about as much as these."""


@dataclass(frozen=True, slots=True, eq=False)
class ValueRun:
    """Elements of a tensor that lie one after another, with their new values.

    Attributes:
        tensor: its name.
        start: the first element, in C order.
        values: [n] in the follower's dtype; the caller's.
    """

    tensor: str
    start: int
    values: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class TableChange:
    """Rows of a table that are new or were touched; the arrays are the caller's.

    Attributes:
        ids: int64[n].
        rows: float32[n, dim].
        deleted: int64[k], ids that have no row any more.
        full: these are all rows there are.
    """

    ids: Ids
    rows: NDArray[np.float32]
    deleted: Ids
    full: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What leads from one version to another.

    Attributes:
        version: what a reader has afterwards.
        base: what it must have before; None: these are all values, whatever was before.
        models: by name, in the order of the elements; a model without changes has none.
        tables: by name.
    """

    version: Version
    base: Version | None
    models: Mapping[str, tuple[ValueRun, ...]]
    tables: Mapping[str, TableChange]


def change(
    subject: Subject,
    before: Slot | None,
    after: Slot,
    touched: Mapping[int, Ids | None],
    *,
    runs: bool = True,
) -> Change:
    """What leads from `before` to `after`, two pinned copies; blocks for a pass over both.

    `touched`: by table id, the ids that may differ; None: any may. `runs` False: of tables only.
    """
    assert after.version is not None
    models = {
        name: tuple(_runs(subject, id, None if before is None else before.copy.vectors[id], after))
        for name, id in subject.models.items()
        if runs
    }
    tables = {
        name: _rows(id, after, None if before is None else touched.get(id))
        for name, id in subject.tables.items()
    }
    return Change(after.version, before.version if before is not None else None, models, tables)


def _runs(subject: Subject, model: int, before: NDArray[Any] | None, after: Slot) -> Iterator[ValueRun]:
    vector, layout = after.copy.vectors[model], after.copy.layouts[model]
    typed = subject.views(model, vector, layout)
    for tensor, start, stop in zip(layout.tensors, layout.starts, layout.stops, strict=True):
        values = typed[tensor.name].reshape(-1)
        if before is None:
            if len(values):
                yield ValueRun(tensor.name, 0, values.copy())
            continue
        bits = f"u{vector.itemsize}"
        places = np.flatnonzero(before[start:stop].view(bits) != vector[start:stop].view(bits))
        ends = np.flatnonzero(np.diff(places) > _GAP)
        firsts = places[np.concatenate(([0], ends + 1))] if len(places) else places
        lasts = places[np.concatenate((ends, [-1]))] if len(places) else places
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            yield ValueRun(tensor.name, first, values[first : last + 1].copy())


def _rows(table: int, after: Slot, touched: Ids | None) -> TableChange:
    copy = after.copy.tables[table]
    if touched is None:
        parts = list(copy.scan(max(len(copy), 1)))
        ids = parts[0][0] if parts else np.empty(0, np.int64)
        rows = parts[0][1] if parts else np.empty((0, copy.spec.dim), np.float32)
        return TableChange(ids, rows, np.empty(0, np.int64), full=True)
    ids = np.unique(touched)
    there = copy.has(ids)
    return TableChange(ids[there], copy.read(ids[there]), ids[~there])
