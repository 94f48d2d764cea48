"""Files of lines with a delimiter, block by block.

Invariant: a row is a line that is not empty, so rows can be counted without parsing. A line break inside
of quotes is therefore an error, not data.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.data.columns import arrow, check_columns, to_arrays
from headwater.data.files import Group, is_compressed, opened
from headwater.errors import ConfigurationError, DataError
from headwater.spec.amounts import shown

_BLOCK = 4 << 20
"""About how many bytes a group has. A compressed file is one group, as its middle cannot be found."""

_HEAD = 1 << 20
"""From how many bytes of the first file the types of columns are inferred."""


@dataclass(frozen=True)
class Csv:
    """Text files with a row a line, UTF-8, compressed where the name says so (.gz, .bz2, .xz).

    Attributes:
        columns: those to read, in this order; None reads all.
        delimiter: one character, such as "," or a tab.
        names: of the columns of files without a header; None takes the first line of each file as header.
        types: column → "int64", "float32", "string" and so on, as pyarrow names them; those of other
            columns are inferred from the first megabyte of the first file and then hold for all.
    """

    columns: Sequence[str] | None = None
    delimiter: str = ","
    names: Sequence[str] | None = None
    types: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.delimiter, str) or len(self.delimiter) != 1:
            raise ConfigurationError(f"Csv: delimiter must be one character, got {shown(self.delimiter)}")

    def reader(self, path: str) -> CsvReader:
        """What reads this file and all with its columns.

        Raises:
            ConfigurationError: a column that it does not have, an unknown type, or pyarrow is missing.
            DataError: it cannot be read.
        """
        with opened(path) as file:
            head = file.read(_HEAD)
        head = head[: head.rfind(b"\n") + 1] or head
        header, _, rest = head.partition(b"\n")
        names = tuple(_header(header, self.delimiter, path) if self.names is None else self.names)
        columns = tuple(names if self.columns is None else self.columns)
        check_columns((*columns, *self.types), path, list(names))
        given = {name: _type(name, kind) for name, kind in self.types.items()}
        first = _Source(path, names, self.delimiter, columns, given)
        table = first.parse(rest if self.names is None else head, 0)
        return CsvReader(names, self.delimiter, self.names is None, columns, _settled(table.schema))


@dataclass(frozen=True)
class CsvReader:
    """Reads `columns`, of these `types`, of files that have the columns `names`."""

    names: tuple[str, ...]
    delimiter: str
    header: bool
    columns: tuple[str, ...]
    types: dict[str, Any]

    def groups(self, path: str) -> list[Group]:
        """Blocks of whole lines; reads the file once to find them."""
        with opened(path) as file:
            begin = self._skip_header(file, path)
            groups = list(_blocks(file, begin))
        if is_compressed(path) and groups:
            return [Group(sum(group.rows for group in groups), 0, begin, groups[-1].stop)]
        return groups

    def read(self, path: str, group: Group) -> dict[str, NDArray[Any]]:
        """One block."""
        with opened(path) as file:
            file.seek(group.start)
            block = file.read(group.stop - group.start)
        source = _Source(path, self.names, self.delimiter, self.columns, self.types)
        table = source.parse(block, group.first)
        if len(table) != group.rows:
            raise DataError(
                f"{path}, rows {group.first + 1}–{group.first + group.rows}: {group.rows} lines hold "
                f"{len(table)} rows: a quoted value with a line break in it cannot be read"
            )
        return to_arrays(table, path, group.first)

    def _skip_header(self, file: Any, path: str) -> int:
        """Check the header, if there is one; return where the rows begin."""
        if not self.header:
            return 0
        line = file.readline()
        names = tuple(_header(line, self.delimiter, path))
        if names != self.names:
            raise DataError(
                f"{path} has the columns {', '.join(names)}, but the first file {', '.join(self.names)}"
            )
        return len(line)


@dataclass(frozen=True)
class _Source:
    """Lines of one file, to be parsed."""

    path: str
    names: tuple[str, ...]
    delimiter: str
    columns: tuple[str, ...]
    types: Mapping[str, Any]

    def parse(self, lines: bytes, first: int) -> Any:
        """A pyarrow table of the lines, which begin with row `first` (from 0) of the file.

        Raises:
            DataError: a line has too many or too few values, or one of another type; names it.
        """
        if not lines.strip(b"\r\n"):
            kinds = [(name, self.types.get(name, arrow().string())) for name in self.columns]
            return arrow().schema(kinds).empty_table()
        wrong: list[Any] = []
        try:
            return self._read(lines, self.columns, self.types, wrong)
        except arrow().ArrowInvalid as error:
            if wrong:
                raise DataError(
                    f"{self.path}, row {first + wrong[0].number}: {wrong[0].actual_columns} values, "
                    f"expected {wrong[0].expected_columns}: {wrong[0].text!r}"
                ) from error
            raise self._explain(lines, first, str(error)) from error

    def _read(self, lines: bytes, columns: Sequence[str], types: Mapping[str, Any], wrong: list[Any]) -> Any:
        csv = importlib.import_module("pyarrow.csv")

        def refuse(row: Any) -> str:
            wrong.append(row)
            return "error"

        return csv.read_csv(
            arrow().BufferReader(lines),
            # One thread and one block, or rows would not be numbered.
            csv.ReadOptions(use_threads=False, block_size=len(lines) + 1, column_names=self.names),
            csv.ParseOptions(delimiter=self.delimiter, invalid_row_handler=refuse),
            csv.ConvertOptions(include_columns=list(columns), column_types=dict(types)),
        )

    def _explain(self, lines: bytes, first: int, error: str) -> DataError:
        """Which value cannot be read: found by halves, as pyarrow says it in words only."""
        rows = [line for line in lines.splitlines(keepends=True) if line.strip(b"\r\n")]
        low, high = 0, len(rows)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._reads(b"".join(rows[low:middle])) else (low, middle)
        where = f"{self.path}, row {first + low + 1}"
        for name in self.columns:
            if not self._reads(rows[low], (name,)):
                value = self._read(rows[low], (name,), {name: arrow().binary()}, []).column(0)[0].as_py()
                expected = self.types.get(name, "text in UTF-8")
                return DataError(f"{where}: column {name!r} is {value!r}, expected {expected}")
        return DataError(f"{where}: {error}")

    def _reads(self, lines: bytes, columns: Sequence[str] | None = None) -> bool:
        try:
            self._read(lines, columns or self.columns, self.types, [])
        except arrow().ArrowInvalid:
            return False
        return True


def _blocks(file: Any, begin: int) -> Iterator[Group]:
    """Cut what follows in the file into groups of whole lines."""
    start, first, rest = begin, 0, b""
    while data := file.read(_BLOCK):
        whole = data.rfind(b"\n") + 1
        lines, tail = rest + data[:whole], data[whole:]
        if not whole:
            rest += tail
            continue
        rows = _rows(lines)
        yield Group(rows, first, start, start + len(lines))
        start, first, rest = start + len(lines), first + rows, tail
    if rest:
        yield Group(_rows(rest + b"\n"), first, start, start + len(rest))


def _rows(lines: bytes) -> int:
    """How many of the lines are not empty."""
    signs = np.frombuffer(lines.replace(b"\r\n", b"\n"), dtype=np.uint8)
    ends = np.flatnonzero(signs == ord("\n"))
    return int(np.count_nonzero(np.diff(ends, prepend=-1) > 1))


def _header(line: bytes, delimiter: str, path: str) -> list[str]:
    """The names in a header line."""
    if not line.strip():
        raise DataError(f"{path} begins with an empty line: expected the names of its columns")
    csv = importlib.import_module("pyarrow.csv")
    try:
        table = csv.read_csv(
            arrow().BufferReader(line.strip(b"\r\n") + b"\n"),
            parse_options=csv.ParseOptions(delimiter=delimiter),
        )
    except arrow().ArrowInvalid as error:
        raise DataError(f"{path}: the header cannot be read: {error}") from error
    return list(table.column_names)


def _type(name: str, kind: str) -> Any:
    try:
        return arrow().type_for_alias(kind)
    except ValueError as error:
        raise ConfigurationError(f"Csv: column {name!r} has the type {kind!r}: {error}") from error


def _settled(schema: Any) -> dict[str, Any]:
    """The types for all files; a column without any value in the first megabyte is text."""
    string = arrow().string()
    return {field.name: string if arrow().types.is_null(field.type) else field.type for field in schema}
