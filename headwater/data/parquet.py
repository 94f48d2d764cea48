"""Parquet files, row group by row group."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from headwater.data.columns import arrow, check_columns, to_arrays
from headwater.data.files import Group, opened
from headwater.errors import DataError


@dataclass(frozen=True)
class Parquet:
    """Files in Parquet format.

    A batch has an array a column, `float32[n, k]` and the like for columns of lists of one size. Groups
    are the file's row groups: 10,000 to 1,000,000 rows each are read and shuffled well.

    Args:
        columns: those to read, in this order; None reads all.
    """

    columns: Sequence[str] | None = None

    def reader(self, path: str) -> ParquetReader:
        """What reads this file and all with its columns.

        Raises:
            ConfigurationError: a column that it does not have, or pyarrow is missing.
            DataError: it cannot be read.
        """
        with opened(path) as file:
            schema = _open(file, path).schema_arrow
        columns = tuple(schema.names if self.columns is None else self.columns)
        check_columns(columns, path, list(schema.names))
        return ParquetReader(columns, tuple(str(schema.field(name).type) for name in columns))


@dataclass(frozen=True)
class ParquetReader:
    """Reads `columns` of these `types`."""

    columns: tuple[str, ...]
    types: tuple[str, ...]

    def groups(self, path: str) -> list[Group]:
        """The row groups; reads the end of the file."""
        with opened(path) as file:
            parquet = _open(file, path)
            schema, metadata = parquet.schema_arrow, parquet.metadata
        for name, kind in zip(self.columns, self.types, strict=True):
            if name not in schema.names or str(schema.field(name).type) != kind:
                found = schema.field(name).type if name in schema.names else "none"
                raise DataError(
                    f"{path}: column {name!r} is {found}, but {kind} in the first file: all need the same"
                )
        groups, first = [], 0
        for number in range(metadata.num_row_groups):
            rows = metadata.row_group(number).num_rows
            groups.append(Group(rows, first, number, number + 1))
            first += rows
        return groups

    def read(self, path: str, group: Group) -> dict[str, NDArray[Any]]:
        """One row group."""
        with opened(path) as file:
            try:
                table = _open(file, path).read_row_group(group.start, columns=list(self.columns))
            except (arrow().ArrowException, OSError) as error:
                last = group.first + group.rows
                raise DataError(f"cannot read {path}, rows {group.first + 1}–{last}: {error}") from error
        return to_arrays(table.select(list(self.columns)), path, group.first)


def _open(file: Any, path: str) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(file)
    except arrow().ArrowException as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error
