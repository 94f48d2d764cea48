"""What a shard's snapshot and a recovery of the log consist of, as plain values."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message
from headwater.messages.exchange import Answer, StepResult
from headwater.messages.log import AnyEntry, Held, LogStateRecord, Sums
from headwater.messages.models import ModelSpec, ProgramRecord, RuleSpec, TableSpec
from headwater.messages.reading import DataProgress


class AccountRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member in the ledger: its last step with its result, its last answer without values.

    `count`: what went with that answer as this server's own number.
    """

    member: int
    step: int
    result: StepResult | None
    answer: Answer | None
    count: int | None = None


class ModelPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `ModelSnapshot` but for its arrays: values, then each of `states` and of the program's vectors,
    float32; then counts, int64."""

    spec: ModelSpec
    rules: tuple[RuleSpec, ...]
    start: int
    stop: int
    states: tuple[str, ...]
    counts: int
    updates: int
    program: ProgramRecord


class TablePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `TableSnapshot` but for its arrays, which follow in order; `states`: name, width."""

    spec: TableSpec
    rule: RuleSpec
    rows: int
    last: int
    states: tuple[tuple[str, int], ...]
    pending: int
    updates: int
    program: ProgramRecord


class Snapshot(Message, frozen=True):
    """From a server to its standby, first: a `ShardSnapshot`, whose arrays follow as `SnapshotPart`s.

    `programs`: bytes of what programs keep, which come first.
    """

    term: int
    index: int
    servers: int
    position: int
    version: int
    models: tuple[ModelPart, ...]
    changed: tuple[int, ...]
    tables: tuple[TablePart, ...]
    ledger: tuple[AccountRecord, ...]
    standings: LogStateRecord
    recorded: DataProgress
    programs: int = 0


class SnapshotPart(Message, frozen=True):
    """The next bytes of a snapshot's arrays, as payload. The standby answers each with `Acknowledged`."""


class Recovery(Message, frozen=True):
    """A server's answer to a new sequencer: what it has applied, what it could apply, what it holds.

    `written`: for each of `closed` the term of the sequencer that wrote it, for another may have written
    another entry for its position. `agreed`: the last term in which the server was told what stands;
    `prepared`: as in `Reports`. `sums`: of what is measured and not committed yet.
    """

    term: int
    server: int
    standings: LogStateRecord
    closed: tuple[AnyEntry, ...]
    held: tuple[Held, ...]
    written: tuple[int, ...]
    agreed: int = 0
    prepared: int = 0
    sums: tuple[Sums, ...] = ()


BeginningMessage: TypeAlias = Snapshot | SnapshotPart | Recovery
"""What a standby begins with, and what a new sequencer begins with."""
