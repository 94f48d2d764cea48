"""A checkpoint without a cluster: as arrays, or as one standard safetensors file.

Rows that had expired by the checkpoint's version are left out: they count as absent, swept or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.find import resolve
from headwater.checkpoint.read import Checkpoint, check_table, read_elements
from headwater.checkpoint.row_files import Column, check_format, write_columns
from headwater.checkpoint.store import Location, split
from headwater.checkpoint.tensors import (
    METADATA,
    Array,
    Tensor,
    TensorFile,
    Written,
    open_tensors,
    write_tensors,
)
from headwater.errors import ConfigurationError
from headwater.messages import FileRecord, ModelRecord, TableRecord
from headwater.spec.layout import Layout
from headwater.spec.lifetime import AfterSteps, expiry_from_spec

_PIECE = 4 << 20  # elements copied at a time
_BUFFERS = ".buffers"  # what `headwater.torch` adds to the name of a module's model for that of its buffers


def load_checkpoint(path: Location) -> dict[str, dict[str, NDArray[Any]]]:
    """The values in a checkpoint, by name of model or table; blocks to verify and read it.

    Args:
        path: a checkpoint such as `runs/g000-v000001200`, or the directory of several, of which the newest
            good one is taken; a local path or a URL that fsspec knows.

    Returns:
        model name → tensor name → float32 array in the tensor's shape (those of a model are views of one
        vector), and table name → `ids` int64[n], in no useful order, and `values` float32[n, dim], row by
        row. All of it is the caller's.

    Raises:
        ConfigurationError: no checkpoint, one of a newer format, or a model and a table of the same name.
        CheckpointError: a damaged one, or none that is good.
    """
    checkpoint = resolve(path)
    loaded: dict[str, dict[str, NDArray[Any]]] = {}
    for model in checkpoint.manifest.models:
        layout = Layout(model.spec.tensors)
        values = layout.views(_elements(checkpoint, model, 0, layout.elements))
        loaded[model.spec.name] = layout.with_aliases(values)
    for table in checkpoint.manifest.tables:
        if table.spec.name in loaded:
            raise ConfigurationError(f"a model and a table are both named {table.spec.name!r}: rename one")
        loaded[table.spec.name] = {
            tensor.name.rpartition(".")[2]: _whole(tensor) for tensor in _of_table(checkpoint, table)
        }
    return loaded


def export(path: Location, file: Location) -> Written:
    """Write the values in a checkpoint as one safetensors file; blocks to verify and copy it.

    Tensors have their own names, after the model's name and a dot where there are several models; buffers of
    a torch module, the model `<model>.buffers`, go with its parameters. Tables are `<table>.ids` and
    `<table>.values`. `safetensors.torch.load_file` reads it. A local `file` is replaced when the new one is
    complete; memory is needed for small pieces only.

    Args:
        path: as `load_checkpoint`.
        file: a local path, or a URL that fsspec knows.

    Raises:
        ConfigurationError: as `load_checkpoint`, or two tensors of the same name.
        CheckpointError: a damaged checkpoint, or a file that cannot be written.
    """
    checkpoint = resolve(path)
    manifest = checkpoint.manifest
    modules = _modules([model.spec.name for model in manifest.models])
    prefixes = [f"{module}." if len(set(modules)) > 1 else "" for module in modules]
    tensors = [
        tensor
        for prefix, model in zip(prefixes, manifest.models, strict=True)
        for tensor in _of_model(checkpoint, model, prefix)
    ]
    tensors += [tensor for table in manifest.tables for tensor in _of_table(checkpoint, table)]
    names = Counter([METADATA, *(tensor.name for tensor in tensors)])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"a safetensors file cannot hold two tensors {', '.join(twice)}: use load_checkpoint"
        )
    folder, name = split(file)
    origin = {"generation": str(manifest.generation), "version": str(manifest.version)}
    return write_tensors(folder, name, tensors, {"format": "pt", **origin})


def export_table(
    path: Location,
    file: Location,
    table: str,
    *,
    counts: bool = False,
    last: bool = False,
    state: bool = False,
) -> int:
    """Write the rows of a table in a checkpoint as Parquet or safetensors, as the file's name says; blocks.

    Columns are `ids`, `values` (dim float32 each), and on request `counts` (updates of each row), `last`
    (the version of its last gradient modulo 2³², of tables with an expiry) and each state of the rule,
    `state.NAME`. Memory is needed for small pieces only. Returns how many rows.

    Raises:
        ConfigurationError: as `load_checkpoint`; no such table, which lists those that there are; another
            format; or `last` of a table without expiry.
        CheckpointError: a damaged checkpoint, or a file that cannot be written.
    """
    check_format(file)
    checkpoint = resolve(path)
    known = {one.spec.name: one for one in checkpoint.manifest.tables}
    if table not in known:
        there = ", ".join(map(repr, known)) or "none"
        raise ConfigurationError(f"{checkpoint.path} has no table {table!r}: its tables are {there}")
    record = known[table]
    if last and not record.spec.expiry:
        raise ConfigurationError(
            f"table {table!r} has no expiry, so the version of a row's last gradient is not kept"
        )
    wanted = [("ids", "<i8", 0), ("values", "<f4", record.spec.dim)]
    wanted += [(name, "<i4", 0) for name, asked in (("counts", counts), ("last", last)) if asked]
    if state:
        wanted += [(f"state.{name}", "<f4", width) for name, width in record.states.items()]
    columns = [
        Column(name, np.dtype(dtype), width, partial(_rows, checkpoint, record, name))
        for name, dtype, width in wanted
    ]
    rows = sum(_count(checkpoint, record, one) for one in record.files)
    write_columns(file, rows, columns)
    return rows


def _whole(tensor: Tensor) -> Array:
    out = np.empty(tensor.shape, dtype=tensor.dtype)
    at = 0
    for piece in tensor.pieces:
        out[at : at + len(piece)] = piece
        at += len(piece)
    return out


# ── models ──────────────────────────────────────────────────────────────────────────────────────


def _elements(checkpoint: Checkpoint, model: ModelRecord, start: int, stop: int) -> Array:
    return read_elements(checkpoint.folder, model, start, stop, states=())[0]


def _modules(names: list[str]) -> list[str]:
    """The torch module that each model belongs to: `net.buffers` goes with `net`, as in a state dict."""
    return [name.removesuffix(_BUFFERS) if name.removesuffix(_BUFFERS) in names else name for name in names]


def _of_model(checkpoint: Checkpoint, model: ModelRecord, prefix: str) -> Iterator[Tensor]:
    layout = Layout(model.spec.tensors)
    for tensor, start, stop in zip(
        layout.tensors, layout.starts.tolist(), layout.stops.tolist(), strict=True
    ):
        for name in (tensor.name, *tensor.aliases):
            pieces = _pieces(checkpoint, model, start, stop)
            yield Tensor(prefix + name, np.dtype("<f4"), tensor.shape, pieces)


def _pieces(checkpoint: Checkpoint, model: ModelRecord, start: int, stop: int) -> Iterator[Array]:
    for low in range(start, stop, _PIECE):
        yield _elements(checkpoint, model, low, min(low + _PIECE, stop))


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def _of_table(checkpoint: Checkpoint, table: TableRecord) -> Iterator[Tensor]:
    rows = sum(_count(checkpoint, table, file) for file in table.files)
    name, dim = table.spec.name, table.spec.dim
    yield Tensor(f"{name}.ids", np.dtype("<i8"), (rows,), _rows(checkpoint, table, "ids"))
    yield Tensor(f"{name}.values", np.dtype("<f4"), (rows, dim), _rows(checkpoint, table, "values"))


def _count(checkpoint: Checkpoint, table: TableRecord, file: FileRecord) -> int:
    with open_tensors(checkpoint.folder, file.name, file.size) as opened:
        rows = check_table(opened, table, file)
        live = _live(opened, table, checkpoint.manifest.version)
        return rows if live is None else int(np.count_nonzero(live))


def _rows(checkpoint: Checkpoint, table: TableRecord, tensor: str) -> Iterator[Array]:
    """A tensor of a table, without rows that expired, in pieces."""
    at_once = max(_PIECE // table.spec.dim, 1)
    for file in table.files:
        with open_tensors(checkpoint.folder, file.name, file.size) as opened:
            rows = check_table(opened, table, file)
            live = _live(opened, table, checkpoint.manifest.version)
            for low in range(0, rows, at_once):
                piece = opened.read(tensor, low, min(low + at_once, rows))
                yield piece if live is None else piece[live[low : low + at_once]]


def _live(opened: TensorFile, table: TableRecord, version: int) -> NDArray[np.bool_] | None:
    """bool[rows]: which have not expired; None where all have not."""
    expiry = None if table.spec.expiry is None else expiry_from_spec(table.spec.expiry)
    if not isinstance(expiry, AfterSteps):
        return None
    last = opened.read("last").view(np.uint32)
    ages = np.uint32(version % 2**32) - last  # modulo 2³², as they are noted
    live: NDArray[np.bool_] = ages <= expiry.steps
    return live
