"""Reading a checkpoint: for any number of servers, only what each needs, into memory once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headwater.checkpoint.manifest import MANIFEST, Manifest, decode, parse_name
from headwater.checkpoint.store import Folder, Location, open_folder, split
from headwater.checkpoint.tensors import Array, TensorFile, open_tensors
from headwater.errors import CheckpointError, ConfigurationError
from headwater.messages import FileRecord, ModelRecord, TableRecord
from headwater.shard.snapshot import ModelSnapshot, TableSnapshot
from headwater.spec.layout import Layout
from headwater.spec.placement import slots_of_server

_LONGEST_MANIFEST = 1 << 30  # bytes: a larger one is no manifest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint, whose manifest is read; its files may still be damaged."""

    folder: Folder
    manifest: Manifest

    @property
    def path(self) -> str:
        """Its folder: a local path or a URL."""
        return self.folder.url


def open_checkpoint(path: Location) -> Checkpoint:
    """Read the manifest of the checkpoint at `path`, a folder such as `runs/g000-v000001200`.

    Raises:
        ConfigurationError: no checkpoint, or one of a newer format.
        CheckpointError: its manifest is damaged or cannot be read.
    """
    folder = open_folder(path)
    size = folder.entries().get(MANIFEST)
    if size is None:
        raise ConfigurationError(_why_not(folder, split(path)[1]))
    if size > _LONGEST_MANIFEST:
        raise CheckpointError(f"{folder.url}/{MANIFEST} is damaged: {size} bytes are no manifest")
    return Checkpoint(folder, decode(_content(folder, MANIFEST, size), f"{folder.url}/{MANIFEST}"))


def read_programs(path: Location) -> bytes:
    """What programs keep in the checkpoint at `path`, as `Programs.to_bytes`; b"" where none keeps anything.

    Raises:
        ConfigurationError, CheckpointError: as `open_checkpoint`; the file is missing or damaged.
    """
    checkpoint = open_checkpoint(path)
    file = checkpoint.manifest.programs
    if file is None:
        return b""
    data = _content(checkpoint.folder, file.name, file.size)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise CheckpointError(f"{checkpoint.path}/{file.name} is damaged: use another checkpoint")
    return data


def _content(folder: Folder, name: str, size: int) -> bytes:
    data = bytearray(size)
    with folder.read(name) as source:
        done = 0
        while got := source.readinto(memoryview(data)[done:]):
            done += got
    return bytes(data[:done])


def _why_not(folder: Folder, name: str) -> str:
    if not folder.exists():
        return f"there is no checkpoint {folder.url}: no such folder"
    if parse_name(name.partition(".")[0]):
        return (
            f"{folder.url} is no checkpoint: without {MANIFEST} its writing was interrupted, use another one"
        )
    return (
        f"{folder.url} is no checkpoint: it has no {MANIFEST}; checkpoints are folders like g000-v000001200"
    )


def read_part(path: Location, server: int, servers: int) -> tuple[list[ModelSnapshot], list[TableSnapshot]]:
    """What server `server` of `servers` holds of the checkpoint at `path`, by however many it was written.

    Blocks for reading just that. Sums are not checked: `verify` or `latest` do, for all servers at once.

    Raises:
        ConfigurationError, CheckpointError: as `open_checkpoint`; files missing or too short.
    """
    checkpoint = open_checkpoint(path)
    manifest, slots = checkpoint.manifest, slots_of_server(server, servers)
    models = [
        _read_model(checkpoint.folder, model, *Layout(model.spec.tensors).cut(servers)[server])
        for model in manifest.models
    ]
    return models, [_read_table(checkpoint.folder, table, slots) for table in manifest.tables]


# ── models ──────────────────────────────────────────────────────────────────────────────────────


def read_elements(
    folder: Folder,
    model: ModelRecord,
    start: int,
    stop: int,
    *,
    states: Sequence[str],
    vectors: Sequence[str] = (),
) -> list[Array]:
    """Elements [start, stop) of a model's values, of each of `states` and of `vectors`: float32[stop − start]
    each."""
    tensors = ["values", *(f"state.{name}" for name in states), *(f"vector.{name}" for name in vectors)]
    arrays: list[Array] = [np.empty(stop - start, dtype=np.float32) for _ in tensors]
    for file in model.files:
        low, high = max(file.start, start), min(file.stop, stop)
        if low >= high:
            continue
        with open_tensors(folder, file.name, file.size) as opened:
            for tensor, array in zip(tensors, arrays, strict=True):
                opened.expect(tensor, "F32", [file.stop - file.start])
                opened.read_into(tensor, low - file.start, array[low - start : high - start])
    return arrays


def _read_model(folder: Folder, model: ModelRecord, start: int, stop: int) -> ModelSnapshot:
    names = model.program.vectors
    values, *rest = read_elements(folder, model, start, stop, states=model.states, vectors=names)
    states, vectors = rest[: len(model.states)], rest[len(model.states) :]
    return ModelSnapshot(
        spec=model.spec,
        rules=model.rules,
        start=start,
        stop=stop,
        values=values,
        states=dict(zip(model.states, states, strict=True)),
        counts=np.array(model.counts, dtype=np.int64),
        updates=model.updates,
        program=model.program,
        vectors=tuple(vectors),
    )


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


class _Cut(NamedTuple):
    """Rows and pending ids of one file that lie in the wanted slots."""

    tensors: TensorFile
    rows: range
    pending: range


def check_table(opened: TensorFile, table: TableRecord, file: FileRecord) -> int:
    """Check that a file holds a part of that table; returns its rows.

    Raises:
        CheckpointError: it does not.
    """
    (rows,) = opened.expect("ids", "I64", [None])
    (pending,) = opened.expect("pending_ids", "I64", [None])
    opened.expect("counts", "I32", [rows])
    opened.expect("last", "I32", [rows if table.spec.expiry else 0])
    opened.expect("values", "F32", [rows, table.spec.dim])
    opened.expect("pending_counts", "I32", [pending])
    for tensor in ("slots", "pending_slots"):
        opened.expect(tensor, "I64", [file.stop - file.start + 1])
    for name, width in table.states.items():
        opened.expect(f"state.{name}", "F32", [rows, width])
    return rows


def _read_table(folder: Folder, table: TableRecord, slots: range) -> TableSnapshot:
    with ExitStack() as stack:
        cuts = []
        for file in table.files:
            low, high = max(file.start, slots.start), min(file.stop, slots.stop)
            if low < high:
                opened = stack.enter_context(open_tensors(folder, file.name, file.size))
                count = check_table(opened, table, file)
                pending = opened.expect("pending_ids", "I64", [None])[0]
                first, last = low - file.start, high - file.start
                rows = _span(opened, "slots", first, last, count)
                cuts.append(_Cut(opened, rows, _span(opened, "pending_slots", first, last, pending)))
        return TableSnapshot(
            spec=table.spec,
            rule=table.rule,
            ids=_joined(cuts, "ids", np.int64),
            counts=_joined(cuts, "counts", np.int32),
            last=_joined(cuts if table.spec.expiry else [], "last", np.int32),
            values=_joined(cuts, "values", np.float32, table.spec.dim),
            states={
                name: _joined(cuts, f"state.{name}", np.float32, width)
                for name, width in table.states.items()
            },
            pending_ids=_joined(cuts, "pending_ids", np.int64),
            pending_counts=_joined(cuts, "pending_counts", np.int32),
            updates=table.updates,
            program=table.program,
        )


def _span(opened: TensorFile, tensor: str, low: int, high: int, count: int) -> range:
    """The rows of slots [low, high) of a file."""
    starts = opened.read(tensor, low, high + 1)
    first, last = int(starts[0]), int(starts[-1])
    if not 0 <= first <= last <= count:
        raise CheckpointError(f"{opened.url} is damaged: {tensor} names rows {first}–{last} of {count}")
    return range(first, last)


def _joined(cuts: Sequence[_Cut], tensor: str, dtype: type, *width: int) -> Array:
    """A tensor's rows out of all files, in one new array."""
    spans = [cut.pending if tensor.startswith("pending_") else cut.rows for cut in cuts]
    out: Array = np.empty((sum(map(len, spans)), *width), dtype=dtype)
    at = 0
    for cut, span in zip(cuts, spans, strict=True):
        cut.tensors.read_into(tensor, span.start, out[at : at + len(span)])
        at += len(span)
    return out
