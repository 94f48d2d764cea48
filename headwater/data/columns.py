"""From columns of pyarrow to arrays of NumPy: one dtype a column, whatever rows are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.data.files import missing
from headwater.errors import ConfigurationError, DataError


def arrow() -> Any:
    """The package pyarrow.

    Raises:
        ConfigurationError: it is missing.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise missing("pyarrow") from error
    return pyarrow


def check_columns(columns: tuple[str, ...], path: str, known: list[str]) -> None:
    """Raise ConfigurationError unless every one of `columns` is one of the file's `known` ones."""
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise ConfigurationError(
            f"{path} has no column {', '.join(map(repr, unknown))}: choose from {', '.join(known)}"
        )


def to_arrays(table: Any, path: str, first: int) -> dict[str, NDArray[Any]]:
    """The columns of a pyarrow table whose first row is row `first` (from 0) of the file.

    Numbers, booleans and times keep their type, vectors of one length become a second dimension,
    everything else becomes objects. A missing float is NaN, a missing object None.

    Raises:
        DataError: a missing value in a column that has none to stand for it; names file and row.
    """
    return {name: _to_array(table.column(name), f"{path}, row", name, first) for name in table.column_names}


def _to_array(column: Any, where: str, name: str, first: int) -> NDArray[Any]:
    types = arrow().types
    column = column.combine_chunks()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    vector, floating = types.is_fixed_size_list(column.type), types.is_floating(column.type)
    has_none = types.is_primitive(column.type) and not floating
    if column.null_count and (vector or has_none):
        row = first + 1 + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where} {row}: column {name!r} has no value, expected {column.type}")
    if not vector:
        array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return array
    inner = column.flatten()
    if inner.null_count:
        place = int(np.flatnonzero(inner.is_null().to_numpy(zero_copy_only=False))[0])
        row = first + 1 + place // column.type.list_size
        raise DataError(f"{where} {row}: column {name!r} has a vector with a missing value")
    flat: NDArray[Any] = inner.to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)
