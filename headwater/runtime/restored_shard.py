"""A server's shard as a checkpoint has it: the first of a new generation of the log."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import msgspec
import numpy as np

from headwater import messages as m
from headwater.checkpoint import open_checkpoint, read_part, read_programs
from headwater.shard import Shard
from headwater.shard.snapshot import ModelSnapshot, ShardSnapshot, TableSnapshot
from headwater.spec.sync import Reduce

Snapshot = TypeVar("Snapshot", ModelSnapshot, TableSnapshot)


def restored(path: str, index: int, servers: int, reduce: Reduce) -> Shard:
    """Server `index` of `servers`, however many wrote the checkpoint; blocks for reading its part.

    The log begins anew at position 0, with nobody in it, the version of the checkpoint, and what the log kept
    of every rank's program.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigurationError: there is no checkpoint, or one of a newer format.
    """
    manifest = open_checkpoint(path).manifest
    models, tables = read_part(path, index, servers)
    names: list[tuple[m.Kind, str]] = [("register", model.spec.name) for model in models]
    names += [("table", table.spec.name) for table in tables]
    before = msgspec.json.decode(manifest.members, type=m.LogStateRecord)
    standings = m.LogStateRecord(
        version=manifest.version,
        position=0,
        rounds=0,
        late=0,
        workers=0,
        newest=0,
        ranks=(),
        finished=(),
        names=tuple(sorted(names)),
        members=(),
        met=before.met,
        histories=before.histories,
    )
    snapshot = ShardSnapshot(
        index=index,
        servers=servers,
        position=0,
        version=manifest.version,
        models=tuple(_resumed(model) for model in models),
        changed=(manifest.version,) * len(models),
        tables=tuple(_resumed(table) for table in tables),
        ledger=(),
        standings=standings,
        recorded=msgspec.json.decode(manifest.splits, type=m.DataProgress),
        programs=np.frombuffer(read_programs(path), np.uint8),
    )
    return Shard.restore(snapshot, reduce)


def _resumed(snapshot: Snapshot) -> Snapshot:
    """As nobody has declared it since, and with nobody who governs its settings."""
    before = snapshot.program
    program = m.ProgramRecord(before.first, resumed=True, vectors=before.vectors, note=before.note)
    return dataclasses.replace(snapshot, program=program)
