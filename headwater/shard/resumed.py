"""What a shard begins a new generation with: the models and tables of a checkpoint, without anybody in it.

Invariants:
- The log begins anew at position 0, with the version of the checkpoint; entries and ledgers of former members
  mean nothing in it.
- What the log kept of every rank's program stays: its data, its meetings, what it has the ranks keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from headwater import messages as m
from headwater.shard.snapshot import ModelSnapshot, ShardSnapshot, TableSnapshot

Snapshot = TypeVar("Snapshot", ModelSnapshot, TableSnapshot)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a checkpoint says besides its models and tables.

    `members`: the standings of the log then; `recorded`: where the ranks were in their data; `programs`: as
    `Programs.to_bytes`.
    """

    version: int
    members: m.LogStateRecord
    recorded: m.DataProgress
    programs: bytes


def resumed(
    index: int, servers: int, kept: Kept, models: Sequence[ModelSnapshot], tables: Sequence[TableSnapshot]
) -> ShardSnapshot:
    """What server `index` of `servers` begins with; `models` and `tables` are its parts of the checkpoint."""
    names: list[tuple[m.Kind, str]] = [("register", model.spec.name) for model in models]
    names += [("table", table.spec.name) for table in tables]
    standings = m.LogStateRecord(
        version=kept.version,
        position=0,
        rounds=0,
        late=0,
        workers=0,
        newest=0,
        ranks=(),
        finished=(),
        names=tuple(sorted(names)),
        members=(),
        met=kept.members.met,
        histories=kept.members.histories,
    )
    return ShardSnapshot(
        index=index,
        servers=servers,
        position=0,
        version=kept.version,
        models=tuple(_undeclared(model) for model in models),
        changed=(kept.version,) * len(models),
        tables=tuple(_undeclared(table) for table in tables),
        ledger=(),
        standings=standings,
        recorded=kept.recorded,
        programs=np.frombuffer(kept.programs, np.uint8),
    )


def _undeclared(snapshot: Snapshot) -> Snapshot:
    """As nobody has declared it since, and with nobody who governs its settings."""
    before = snapshot.program
    program = m.ProgramRecord(before.first, resumed=True, vectors=before.vectors, note=before.note)
    return dataclasses.replace(snapshot, program=program)
