"""Writing a checkpoint: begun by one, each server's part by that server, committed or abandoned by one.

Invariants:
- Until `commit` the folder is no checkpoint, whoever dies when; afterwards it is complete.
- Nothing that was complete before is touched.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.manifest import FORMAT, MANIFEST, Manifest, check, encode, folder_name, merge
from headwater.checkpoint.store import Folder, Location, open_folder, write_all
from headwater.checkpoint.tensors import Tensor, write_tensors
from headwater.errors import CheckpointError, ConfigurationError
from headwater.messages import FileRecord, ModelRecord, PartRecord, TableRecord
from headwater.shard.snapshot import ModelSnapshot, TableSnapshot
from headwater.spec.layout import Layout
from headwater.spec.placement import slots_of, slots_of_server

PROGRAMS = "programs.msgpack"
"""The file of what programs keep."""

_IDS_AT_ONCE = 1 << 20


def begin(directory: Location, generation: int, version: int) -> None:
    """Prepare to write; what an interrupted write of the same name left is removed.

    Raises:
        ConfigurationError: that checkpoint exists.
        CheckpointError: the directory cannot be made or written.
    """
    folder, name = open_folder(directory), folder_name(generation, version)
    if MANIFEST in folder.inside(name).entries():
        raise ConfigurationError(
            f"{folder.url}/{name} exists: take the next generation (as a resumed training does) "
            "or another directory"
        )
    abandon(directory, generation, version)
    folder.inside(folder.draft(name)).make()


def write_part(
    directory: Location,
    generation: int,
    version: int,
    server: int,
    servers: int,
    models: Iterable[ModelSnapshot],
    tables: Iterable[TableSnapshot],
    programs: NDArray[np.uint8] | None = None,
) -> PartRecord:
    """Write what server `server` of `servers` holds, after `begin`; blocks until it is durable.

    Each snapshot is read once, while it is written, and not kept: pass generators to free memory on the way.
    `programs`: uint8[n], what programs keep, which is the same on all servers; the first one writes it.

    Raises:
        CheckpointError: the files cannot be written.
    """
    folder = _draft(directory, generation, version)
    return PartRecord(
        server,
        tuple(_write_model(folder, i, server, servers, model) for i, model in enumerate(models)),
        tuple(_write_table(folder, i, server, servers, table) for i, table in enumerate(tables)),
        None if programs is None or server or not len(programs) else _write_programs(folder, programs),
    )


def commit(
    directory: Location,
    generation: int,
    version: int,
    parts: Sequence[PartRecord],
    *,
    members: object,
    splits: object,
) -> Manifest:
    """Make a checkpoint of what all servers wrote; when this returns it survives a loss of power.

    Args:
        parts: what `write_part` returned on each server.
        members, splits: anything msgspec encodes as JSON; `Manifest` gives them back as such.

    Raises:
        CheckpointError: parts are missing, do not fit together or are not in the directory as seen from
            here, or the manifest cannot be written.
    """
    models, tables = merge(parts)
    manifest = Manifest(
        format=FORMAT,
        sha256="",
        headwater=importlib.metadata.version("headwater"),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        generation=generation,
        version=version,
        servers=len(parts),
        models=models,
        tables=tables,
        members=msgspec.Raw(msgspec.json.encode(members)),
        splits=msgspec.Raw(msgspec.json.encode(splits)),
        programs=next((part.programs for part in parts if part.programs is not None), None),
    )
    check(manifest)
    folder = _draft(directory, generation, version)
    _check_there(folder, manifest)
    with folder.write(MANIFEST) as sink:
        write_all(sink, memoryview(encode(manifest)))
    open_folder(directory).publish(folder_name(generation, version))
    return manifest


def abandon(directory: Location, generation: int, version: int) -> None:
    """Remove what was written of a checkpoint that was not committed; a committed one stays."""
    folder, name = open_folder(directory), folder_name(generation, version)
    for left in {name, folder.draft(name)}:
        if left != name or MANIFEST not in folder.inside(name).entries():
            folder.delete(left)


def _draft(directory: Location, generation: int, version: int) -> Folder:
    folder = open_folder(directory)
    return folder.inside(folder.draft(folder_name(generation, version)))


def _check_there(folder: Folder, manifest: Manifest) -> None:
    """All files are in the folder that the manifest will be in, and nothing else."""
    found = folder.entries()
    for file in manifest.files():
        if found.pop(file.name, None) != file.size:
            raise CheckpointError(
                f"{folder.url}/{file.name}, {file.size} bytes, was written but is not seen from here: "
                "the directory must be the same one for all servers and the coordinator, on a file system "
                "that all their machines mount, or an fsspec URL such as s3://bucket/run"
            )
    for stranger in found:
        folder.delete(stranger)


# ── files ───────────────────────────────────────────────────────────────────────────────────────


def _write_model(folder: Folder, i: int, server: int, servers: int, model: ModelSnapshot) -> ModelRecord:
    expected = Layout(model.spec.tensors).cut(servers)[server]
    assert (model.start, model.stop) == expected, (
        f"{model.spec.name}: {model.start}–{model.stop}, not {expected}"
    )
    states = {f"state.{name}": array for name, array in model.states.items()}
    vectors = {
        f"vector.{name}": array for name, array in zip(model.program.vectors, model.vectors, strict=True)
    }
    arrays = {"values": model.values, **states, **vectors}
    tensors = [Tensor.of(name, array) for name, array in arrays.items()]
    assert all(tensor.shape == (model.stop - model.start,) for tensor in tensors)
    return ModelRecord(
        spec=model.spec,
        rules=model.rules,
        counts=tuple(model.counts.tolist()),
        updates=model.updates,
        states=tuple(model.states),
        program=model.program,
        files=(
            _write(folder, _file_name("model", i, model.spec.name, server), tensors, model.start, model.stop),
        ),
    )


def _write_table(folder: Folder, i: int, server: int, servers: int, table: TableSnapshot) -> TableRecord:
    slots = slots_of_server(server, servers)
    arrays: dict[str, NDArray[Any]] = {
        "ids": table.ids,
        "counts": table.counts,
        "last": table.last,
        "values": table.values,
        "pending_ids": table.pending_ids,
        "pending_counts": table.pending_counts,
        "slots": slot_starts(table.ids, slots),
        "pending_slots": slot_starts(table.pending_ids, slots),
        **{f"state.{name}": array for name, array in table.states.items()},
    }
    tensors = [Tensor.of(name, array) for name, array in arrays.items()]
    return TableRecord(
        spec=table.spec,
        rule=table.rule,
        updates=table.updates,
        states={name: array.shape[1] for name, array in table.states.items()},
        program=table.program,
        rows=len(table.ids),
        pending=len(table.pending_ids),
        files=(
            _write(folder, _file_name("table", i, table.spec.name, server), tensors, slots.start, slots.stop),
        ),
    )


def _write_programs(folder: Folder, programs: NDArray[np.uint8]) -> FileRecord:
    with folder.write(PROGRAMS) as sink:
        write_all(sink, programs.data)
    return FileRecord(PROGRAMS, hashlib.sha256(programs.data).hexdigest(), len(programs), 0, len(programs))


def _write(folder: Folder, name: str, tensors: Sequence[Tensor], start: int, stop: int) -> FileRecord:
    written = write_tensors(folder, name, tensors)
    return FileRecord(name, written.sha256, written.size, start, stop)


def _file_name(kind: str, i: int, name: str, server: int) -> str:
    """`model-00-resnet.server-000.safetensors`: plain whatever the model's name, which is only a hint."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name, flags=re.ASCII)[:40]
    return f"{kind}-{i:02d}-{plain}.server-{server:03d}.safetensors"


def slot_starts(ids: NDArray[np.int64], slots: range) -> NDArray[np.int64]:
    """int64[slots + 1]: where the ids of each slot start, and the last one's stop; ids are in slot order."""
    counts = np.zeros(len(slots), dtype=np.int64)
    last = slots.start
    for at in range(0, len(ids), _IDS_AT_ONCE):  # in pieces: temporaries stay small beside the rows
        found = slots_of(ids[at : at + _IDS_AT_ONCE])
        assert last <= found[0] <= found[-1] < slots.stop
        assert (found[1:] >= found[:-1]).all()
        last = int(found[-1])
        counts += np.bincount(found - slots.start, minlength=len(slots))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
