"""Rows of a table as a file for other tools: Parquet, or one safetensors file, written piece by piece."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.store import Location, Sink, split, write_all
from headwater.checkpoint.tensors import Tensor, write_tensors
from headwater.errors import CheckpointError, ConfigurationError

FORMATS = (".parquet", ".safetensors")


@dataclass(frozen=True, slots=True)
class Column:
    """One value a row, or a vector of `width` values.

    `pieces`: gives the column from its beginning, as arrays [n] or [n, width]; all columns of a file in
    pieces of equal lengths.
    """

    name: str
    dtype: np.dtype[Any]
    width: int
    pieces: Callable[[], Iterator[NDArray[Any]]]


class _File(io.RawIOBase):
    """A sink as pyarrow writes to it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        write_all(self._sink, view)
        return len(view)


def check_format(file: Location) -> str:
    """The format that a file's name says. Raises ConfigurationError for any other."""
    name = split(file)[1]
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise ConfigurationError(f"{file}: rows are written as {' or '.join(FORMATS)}, by the file's name")


def write_columns(file: Location, rows: int, columns: Sequence[Column]) -> None:
    """Write a file of `rows` rows; a local one is replaced when the new one is complete. Blocks.

    Parquet has a column each, vectors as fixed-size lists of float32; safetensors has a tensor each.

    Raises:
        ConfigurationError: another format, or pyarrow is not installed.
        CheckpointError: the file cannot be written.
    """
    if check_format(file) == ".parquet":
        _write_parquet(file, columns)
        return
    folder, name = split(file)
    tensors = [
        Tensor(one.name, one.dtype, (rows, one.width) if one.width else (rows,), one.pieces())
        for one in columns
    ]
    write_tensors(folder, name, tensors, {"format": "pt"})


def _write_parquet(file: Location, columns: Sequence[Column]) -> None:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigurationError(
            "Parquet needs the package pyarrow: install Headwater with its extra `files`"
        ) from error
    kinds = {one.name: arrow.from_numpy_dtype(one.dtype) for one in columns}
    fields = [
        (one.name, arrow.list_(kinds[one.name], one.width) if one.width else kinds[one.name])
        for one in columns
    ]
    schema = arrow.schema(fields)
    folder, name = split(file)
    try:
        with (
            folder.write(name) as sink,
            parquet.ParquetWriter(arrow.PythonFile(_File(sink), "w"), schema) as writer,
        ):
            for pieces in zip(*(one.pieces() for one in columns), strict=True):
                arrays = [
                    arrow.FixedSizeListArray.from_arrays(arrow.array(piece.reshape(-1)), one.width)
                    if one.width
                    else arrow.array(piece)
                    for one, piece in zip(columns, pieces, strict=True)
                ]
                writer.write_batch(arrow.record_batch(arrays, schema=schema))
    except (OSError, arrow.ArrowException) as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error
