"""The manifest: what a checkpoint holds, in which files, and whether they are what was written.

Invariants:
- A folder without a manifest is no checkpoint; one that has it was complete when it was written.
- The manifest's own sum covers every byte of it: a flipped one is noticed.
- A manifest that is read here is consistent: ranges cover each model and table once, names are plain.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from headwater.errors import CheckpointError, ConfigurationError, HeadwaterError
from headwater.messages import FileRecord, ModelRecord, PartRecord, TableRecord
from headwater.spec.layout import Layout
from headwater.spec.placement import SLOTS

FORMAT = 1
"""Of folders, manifests and the arrays in files; a reader refuses newer ones."""

MANIFEST = "manifest.json"

_NAME = re.compile(r"g(\d{3,9})-v(\d{9,18})", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_SUM = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BLANK = b"0" * 64


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint holds.

    Attributes:
        format: `FORMAT` of whoever wrote it.
        sha256: of this manifest's bytes with these 64 digits as zeros.
        headwater: version of the package that wrote it.
        written: when, UTC, ISO 8601.
        generation: counts resumes and rewinds; with `version` it names a state of training.
        version: commits that the state contains.
        servers: how many wrote it; each record's files are in their order.
        models, tables: in the order of their registration.
        members: what each member last did and where it stands, as its writer encodes it.
        splits: positions in the data, as their writer encodes them.
        programs: the file of what programs keep; None where none keeps anything.
    """

    format: int
    sha256: str
    headwater: str
    written: str
    generation: int
    version: int
    servers: int
    models: tuple[ModelRecord, ...]
    tables: tuple[TableRecord, ...]
    members: msgspec.Raw
    splits: msgspec.Raw
    programs: FileRecord | None = None

    def files(self) -> list[FileRecord]:
        """Every file but the manifest."""
        records: list[ModelRecord | TableRecord] = [*self.models, *self.tables]
        files = [file for record in records for file in record.files]
        return files if self.programs is None else [*files, self.programs]

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.files())


class _Start(msgspec.Struct, frozen=True):
    """What every format begins with, now and later."""

    format: int
    sha256: str


def folder_name(generation: int, version: int) -> str:
    """`g000-v000001200`: names sort as (generation, version)."""
    return f"g{generation:03d}-v{version:09d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """(generation, version) of a checkpoint's folder; None where it is named otherwise."""
    match = _NAME.fullmatch(name)
    if match is None or folder_name(int(match[1]), int(match[2])) != name:
        return None
    return int(match[1]), int(match[2])


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────


def encode(manifest: Manifest) -> bytes:
    """JSON for people and tools to read, with its sum filled in."""
    blank = msgspec.structs.replace(manifest, sha256=_BLANK.decode())
    data = msgspec.json.format(msgspec.json.encode(blank), indent=1) + b"\n"
    return data.replace(_BLANK, hashlib.sha256(data).hexdigest().encode(), 1)


def decode(data: bytes, url: str) -> Manifest:
    """The manifest that `encode` made; `url` is for messages.

    Raises:
        CheckpointError: bytes differ from what was written, or they contradict themselves.
        ConfigurationError: a newer format.
    """
    try:
        start = msgspec.json.decode(data, type=_Start)
        _check_sum(data, start, url)
        if start.format > FORMAT:
            raise ConfigurationError(
                f"{url} has format {start.format}, this headwater reads formats up to {FORMAT}: "
                "use the headwater that wrote it, or a newer one"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{url} is damaged ({error}): use another checkpoint") from error
    try:
        check(manifest)
    except HeadwaterError as error:
        raise CheckpointError(f"{url} contradicts itself: {error}") from error
    return manifest


def _check_sum(data: bytes, start: _Start, url: str) -> None:
    written = start.sha256.encode()
    found = hashlib.sha256(data.replace(written, _BLANK, 1)).hexdigest()
    if not _SUM.fullmatch(start.sha256) or found != start.sha256:
        raise CheckpointError(
            f"{url} is damaged: its sha256 is {found}, it says {start.sha256}: use another checkpoint"
        )


# ── records of several servers ──────────────────────────────────────────────────────────────────


def merge(parts: Sequence[PartRecord]) -> tuple[tuple[ModelRecord, ...], tuple[TableRecord, ...]]:
    """One record per model and table, out of what all servers wrote.

    Raises:
        CheckpointError: parts are missing, or differ in what must be the same on all servers.
    """
    ordered = sorted(parts, key=lambda part: part.server)
    got = [part.server for part in ordered]
    if not got or got != list(range(len(got))):
        raise CheckpointError(f"a checkpoint needs one part of each server from 0 on, got those of {got}")
    models = tuple(_merged(records, rows=False) for records in _across([part.models for part in ordered]))
    tables = tuple(_merged(records, rows=True) for records in _across([part.tables for part in ordered]))
    return models, tables


def _across(records: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The servers' records of the first model, of the second, …"""
    names = [[record.spec.name for record in of_server] for of_server in records]
    for server, found in enumerate(names):
        if found != names[0]:
            raise CheckpointError(
                f"server {server} wrote {found}, server 0 {names[0]}: not the same position"
            )
    return list(zip(*records, strict=True))


def _merged(records: Sequence[Any], rows: bool) -> Any:
    counted = {"rows": 0, "pending": 0} if rows else {}
    first = msgspec.structs.replace(records[0], files=(), **counted)
    for server, record in enumerate(records):
        if msgspec.structs.replace(record, files=(), **counted) != first:
            raise CheckpointError(
                f"{first.spec.name!r} on server {server} differs from that on server 0 "
                f"({record.updates} and {first.updates} updates): not the same position of the log"
            )
    files = tuple(file for record in records for file in record.files)
    sums = {name: sum(getattr(record, name) for record in records) for name in counted}
    return msgspec.structs.replace(first, files=files, **sums)


def check(manifest: Manifest) -> None:
    """Raise CheckpointError unless files cover each model and table once, under plain names."""
    for model in manifest.models:
        layout = Layout(model.spec.tensors)
        _check_cover(model.spec.name, model.files, layout.elements, manifest.servers)
        if len(model.counts) != len(layout.tensors):
            raise CheckpointError(f"{model.spec.name!r} has {len(model.counts)} counts")
    for table in manifest.tables:
        _check_cover(table.spec.name, table.files, SLOTS, manifest.servers)
    names = [file.name for file in manifest.files()]
    strange = [name for name in names if not _FILE.fullmatch(name) or name == MANIFEST]
    if strange or len(set(names)) < len(names):
        raise CheckpointError(f"its files cannot be named {strange or names}")


def _check_cover(name: str, files: Sequence[FileRecord], length: int, servers: int) -> None:
    end = 0
    for file in files:
        if file.start != end or file.stop < file.start:
            break
        end = file.stop
    else:
        if end == length and len(files) == servers:
            return
    found = [(file.start, file.stop) for file in files]
    raise CheckpointError(f"{name!r} should be covered from 0 to {length} by {servers} files, got {found}")
