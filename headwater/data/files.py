"""Rows of many files as one data set: indexed when it is first used, read group by group when needed.

Optional packages (pyarrow, fsspec) are imported when a file is touched, so that the rest goes without.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ConfigurationError, DataError, HeadwaterError
from headwater.spec.amounts import path as path_of
from headwater.spec.amounts import shown

Batch: TypeAlias = dict[str, NDArray[Any]]
"""Column → array of one value a row, float32[n, k] and the like for columns of vectors."""

_KEPT = 2
"""Groups kept in memory by each thread: a batch may lie across the border of two."""


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of a file that are read together.

    `first`: rows of the file before them. `start` and `stop` are the reader's own: bytes, or a number.
    """

    rows: int
    first: int
    start: int
    stop: int


class Reader(Protocol):
    """Reads files of one kind that have the same columns."""

    def groups(self, path: str) -> Sequence[Group]:
        """The file's groups in order; reads as little as possible."""

    def read(self, path: str, group: Group) -> Mapping[str, NDArray[Any]]:
        """The columns of one group."""


class Format(Protocol):
    """A kind of file: `Csv`, `Parquet`, or one's own."""

    def reader(self, path: str) -> Reader:
        """What reads this file, the first one, and all others that are like it."""


class Files:
    """A data set of rows in files: a batch is a dict from column to array.

    `paths`: one or several paths, patterns with `*` or URLs that fsspec knows; `format`: `Csv` or
    `Parquet`, or an object of one's own like them. Rows are numbered through all files, in the order
    of `paths`, a pattern's sorted. Nothing is read before the length or a row is asked for. A thread
    keeps the two groups (row groups, or blocks of some megabytes) that it read last.

    Raises:
        ConfigurationError: no file matches, or a package is missing.
        DataError: later, when a file cannot be read; names file and row.
    """

    def __init__(
        self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], format: Format
    ) -> None:
        several = paths if isinstance(paths, list | tuple) else [paths]
        named = [path_of("Files: a path", path) for path in several]
        self.paths = tuple(found for path in named for found in _matching(path))
        if not self.paths:
            raise ConfigurationError("Files: no paths were given: pass at least one")
        if not hasattr(format, "reader"):
            raise ConfigurationError(f"Files: format must be hw.Csv(…) or hw.Parquet(…), got {shown(format)}")
        self._format = format
        self._indexed: _Index | None = None
        self._kept = threading.local()

    def __len__(self) -> int:
        """How many rows; the first call looks at every file."""
        return int(self._index.firsts[-1])

    @property
    def groups(self) -> tuple[int, ...]:
        """The number of rows of each group."""
        return tuple(group.rows for _, group in self._index.groups)

    def __getitem__(self, rows: int | Sequence[int] | NDArray[np.int64]) -> Any:
        """A row as a dict from column to value, or, given several indices, a batch; blocks for reading.

        Raises:
            IndexError: a row that does not exist.
            DataError: its file cannot be read.
        """
        indices = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        batch = self._gather(indices)
        return {name: column[0] for name, column in batch.items()} if np.ndim(rows) == 0 else batch

    def _gather(self, indices: NDArray[np.int64]) -> Batch:
        firsts = self._index.firsts
        where = np.searchsorted(firsts, indices, side="right") - 1
        batch: Batch = {}
        for number in np.unique(where).tolist():
            here = where == number
            for name, column in self._group(number).items():
                values = column[indices[here] - firsts[number]]
                if here.all():
                    batch[name] = values
                    continue
                if name not in batch:
                    batch[name] = np.empty((len(indices), *values.shape[1:]), dtype=values.dtype)
                batch[name][here] = values
        return batch

    def _group(self, number: int) -> Batch:
        kept: dict[int, Batch] = self._kept.__dict__.setdefault("groups", {})
        if number not in kept:
            if len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            kept[number] = self._read(*self._index.groups[number])
        return kept[number]

    def _read(self, path: str, group: Group) -> Batch:
        rows = f"{path}, rows {group.first + 1}–{group.first + group.rows}"
        try:
            columns = {
                name: np.asarray(column) for name, column in self._index.reader.read(path, group).items()
            }
        except HeadwaterError:
            raise
        except Exception as error:
            raise DataError(f"{rows}: the reader failed with {type(error).__name__}: {error}") from error
        for name, column in columns.items():
            if len(column) != group.rows:
                raise DataError(f"{rows}: the reader gave {len(column)} values of column {name!r}")
        return columns

    @property
    def _index(self) -> _Index:
        if self._indexed is None:
            reader = self._format.reader(self.paths[0])
            groups = [(path, group) for path in self.paths for group in reader.groups(path) if group.rows]
            firsts = np.cumsum([0, *(group.rows for _, group in groups)], dtype=np.int64)
            self._indexed = _Index(reader, groups, firsts)
        return self._indexed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = threading.local()

    def __repr__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"Files({self.paths[0]!r}{more}, {self._format!r})"


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    """Every group with its file. `firsts`: int64[groups + 1], the rows before each."""

    reader: Reader
    groups: list[tuple[str, Group]]
    firsts: NDArray[np.int64]


# ── opening files ───────────────────────────────────────────────────────────────────────────────


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where its name says that they are compressed (.gz, .bz2, .xz).

    Raises:
        ConfigurationError: a URL of a kind that fsspec does not know, or whose package is missing.
        DataError: it cannot be opened or read.
    """
    try:
        with _source(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def is_compressed(path: str) -> bool:
    """Whether `opened` decompresses it."""
    return _source(path).compression is not None


def missing(package: str) -> ConfigurationError:
    """What to raise where an optional package is not there."""
    return ConfigurationError(f"Files needs {package}: pip install '.[files]' in a clone")


def _source(path: str) -> Any:
    try:
        return _fsspec().open(path, mode="rb", compression="infer")
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"Files: {path!r} cannot be opened: {error}") from error


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise missing("fsspec") from error
    return fsspec


def _matching(path: str) -> list[str]:
    """The files that a path or pattern names, sorted."""
    if not any(sign in path for sign in "*?["):
        return [path]
    system, inner = _fsspec().core.url_to_fs(path)
    found = sorted(system.glob(inner))
    if not found:
        raise ConfigurationError(f"Files: no file matches {path!r}")
    remote = "://" in path
    return [system.unstrip_protocol(one) if remote else one for one in found]
