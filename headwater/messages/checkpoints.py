"""What a checkpoint consists of, as servers tell the coordinator and manifests record it."""

from __future__ import annotations

import msgspec

from headwater.messages.models import ModelSpec, ProgramRecord, RuleSpec, TableSpec


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of `size` bytes: elements [start, stop) of a model, or slots [start, stop) of a table."""

    name: str
    sha256: str
    size: int
    start: int
    stop: int


class ModelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as of a checkpoint; `files` by server, only the sender's own where a server reports it."""

    spec: ModelSpec
    rules: tuple[RuleSpec, ...]
    counts: tuple[int, ...]
    updates: int
    states: tuple[str, ...]
    files: tuple[FileRecord, ...]
    program: ProgramRecord = ProgramRecord()


class TableRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table as of a checkpoint; `states`: name → floats a row; `rows` and `pending` ids in `files`."""

    spec: TableSpec
    rule: RuleSpec
    updates: int
    states: dict[str, int]
    rows: int
    pending: int
    files: tuple[FileRecord, ...]
    program: ProgramRecord = ProgramRecord()


class PartRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one server wrote for a checkpoint. `programs`: what programs keep, which server 0 writes."""

    server: int
    models: tuple[ModelRecord, ...]
    tables: tuple[TableRecord, ...]
    programs: FileRecord | None = None
