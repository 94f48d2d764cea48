"""Writes versions of a model as files: a full version, then what changed, and a full one again.

Invariants:
- A version appears whole or not at all: it is written under a temporary name, its index last, then renamed.
  Behind fsspec, where nothing is renamed, the index makes it complete.
- A delta's base is the version before it. A version that failed to be written is none, and the next one is
  full, since nobody knows how much of it was seen.
- What is pruned is never a link that a kept version needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.lock import DirectoryLock
from headwater.checkpoint.store import Location, open_folder, write_all
from headwater.checkpoint.tensors import Tensor, write_tensors
from headwater.errors import CheckpointError, ConfigurationError, WeightsError
from headwater.loggers import logger
from headwater.spec.amounts import one_of, shown, whole
from headwater.weights.bfloat16 import to_bfloat16
from headwater.weights.layout import (
    EXTRA,
    INDEX,
    Extra,
    Index,
    IndexMetadata,
    TableFile,
    dialect_of,
    digest_of,
    folder_name,
    folder_number,
    zstd,
)

_log = logger("headwater.weights")

_LEVEL = 1  # of compression: the fastest, since most of a delta is zeros
_FILE_BYTES = 4 << 30
_DTYPES = ("float32", "bfloat16")


class TableDelta(NamedTuple):
    """Rows of a table for a version.

    `ids`: int64[n]; `values`: float32[n, dim]; `deleted`: int64[k], ids that have no row any more. `full`:
    whether these are all rows, so that a reader forgets every other.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    deleted: NDArray[np.int64]
    full: bool


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """A version that is complete.

    Attributes:
        number: of the version, from 1.
        full: whether it needs no other.
        path: its folder.
        size: bytes of its tensors' files.
        changed: bytes of the tensors that differ from the version before; all of them in a full version.
        total: bytes of all tensors in the published dtype.
    """

    number: int
    full: bool
    path: str
    size: int
    changed: int
    total: int


class WeightsWriter:
    """The one writer of a directory or fsspec URL; a context manager. Not for several threads at once.

    Args:
        to: where versions go; made where it is missing. Numbers continue those that are there.
        dtype: "float32" or "bfloat16" (rounded to nearest, ties to even).
        dialect: "sglang" (slime, Miles, SGLang) or "modelexpress" (NVIDIA).
        full_every: every so many versions one is full; the first after construction always is, and any whose
            delta would be no smaller.
        keep: how many versions stay, besides those that the oldest of them needs.
        names: the training's name of a tensor → the engine's; others keep theirs.
        checksum: "xxh3-128", "blake3" or "adler32"; the dialect's own by default.

    The writer keeps one copy of the last version in the published dtype.

    Raises:
        ConfigurationError: an impossible setting, a missing package, or a directory that another one writes.
        WeightsError: the directory cannot be made or read.
    """

    def __init__(
        self,
        to: Location,
        *,
        dtype: str = "float32",
        dialect: str = "sglang",
        full_every: int = 20,
        keep: int = 40,
        names: Mapping[str, str] | None = None,
        checksum: str | None = None,
    ) -> None:
        one_of("dtype", dtype, _DTYPES)
        if names is not None and not isinstance(names, Mapping):
            raise ConfigurationError(f"names must be a dict from tensor to name, got {shown(names)}")
        full_every, keep = whole("full_every", full_every), whole("keep", keep)
        self._dialect = dialect_of(dialect)
        self._checksum = checksum or self._dialect.checksum
        self._digest = digest_of(self._checksum)
        self._compress = zstd().ZstdCompressor(level=_LEVEL).compress
        self._dtype, self._full_every, self._keep, self._names = dtype, full_every, keep, dict(names or {})
        self._folder = open_folder(to)
        try:
            self._lock = DirectoryLock(to, "publisher")
            found = _numbers(self._folder.entries())
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
        self._number = max(found, default=0)
        self._kept: dict[int, int] = dict.fromkeys(found, 0)  # version → its full one; 0: of another writer
        self._base: dict[str, NDArray[Any]] | None = None
        self._anchor = 0

    def write(
        self,
        tensors: Mapping[str, NDArray[Any]],
        *,
        version: tuple[int, int] | None = None,
        positions: Any = None,
        tables: Mapping[str, TableDelta | Callable[[bool], TableDelta]] | None = None,
    ) -> PublishedVersion:
        """Publish the next version; blocks until it is durable.

        Args:
            tensors: name → float32 array of any shape; read during the call only. The same names and shapes
                in every call.
            version: (generation, number) of the training's version, told to readers.
            positions: plain data, what of the data that version has seen.
            tables: rows beside the tensors; or what gives them, told whether the version is full, so that it
                must give all rows.

        Raises:
            ConfigurationError: other names or shapes than before, or a dtype that is not float32.
            WeightsError: the file system refuses, or is full. Versions that were complete stay readable.
        """
        new = self._cast(tensors)
        number = self._number + 1
        delta = self._delta(new) if self._may_be_delta(tables) else None
        full = delta is None
        rows = {
            name: one if isinstance(one, TableDelta) else one(full) for name, one in (tables or {}).items()
        }
        if full and (partial := [name for name, one in rows.items() if not one.full]):
            raise ConfigurationError(
                f"version {number} is full, and of table {partial[0]!r} only some rows came: give a function "
                f"that gives all rows when it is told so"
            )
        try:
            size = self._write(number, new, delta, version, positions, rows)
        except CheckpointError as error:
            self._base = None
            self._discard(folder_name(number))
            raise WeightsError(str(error)) from error
        self._number, self._base = number, new
        self._anchor = number if full else self._anchor
        self._kept[number] = self._anchor
        total = sum(array.nbytes for array in new.values())
        changed = total if delta is None else sum(new[name].nbytes for name in delta)
        self._prune()
        return PublishedVersion(
            number, full, self._folder.inside(folder_name(number)).url, size, changed, total
        )

    def close(self) -> None:
        """Let another writer have the directory; idempotent."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ── what is written ─────────────────────────────────────────────────────────────────────────

    def _cast(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        cast: dict[str, NDArray[Any]] = {}
        for name, array in tensors.items():
            published = self._names.get(name, name)
            if published in cast:
                raise ConfigurationError(f"two tensors are to be published as {published!r}: rename one")
            if array.dtype != np.float32:
                raise ConfigurationError(f"tensor {name!r} is {array.dtype}, expected float32")
            cast[published] = to_bfloat16(array) if self._dtype == "bfloat16" else np.array(array, order="C")
        if self._base is not None:
            before = {name: array.shape for name, array in self._base.items()}
            after = {name: array.shape for name, array in cast.items()}
            if before != after:
                differs = sorted(before.items() ^ after.items())[0][0]
                raise ConfigurationError(
                    f"tensor {differs!r} was {before.get(differs, 'absent')} and is "
                    f"{after.get(differs, 'absent')}: publish another model to another directory"
                )
        return cast

    def _may_be_delta(self, tables: Mapping[str, Any] | None) -> bool:
        """A full version holds whole tables, so rows that come whole make it one."""
        whole = (table.full for table in (tables or {}).values() if isinstance(table, TableDelta))
        if self._base is None or any(whole):
            return False
        return self._number + 1 - self._anchor < self._full_every

    def _delta(self, new: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]] | None:
        """The compressed differences of what changed; None where they are no smaller than the tensors."""
        assert self._base is not None
        delta: dict[str, NDArray[np.uint8]] = {}
        for name, array in new.items():
            difference = _bytes(array) ^ _bytes(self._base[name])
            if difference.any():
                delta[name] = np.frombuffer(self._compress(difference), dtype=np.uint8)
        small = sum(map(len, delta.values())) < sum(array.nbytes for array in new.values())
        return delta if small or not delta else None

    def _write(
        self,
        number: int,
        new: Mapping[str, NDArray[Any]],
        delta: Mapping[str, NDArray[np.uint8]] | None,
        version: tuple[int, int] | None,
        positions: Any,
        tables: Mapping[str, TableDelta],
    ) -> int:
        name = folder_name(number)
        self._discard(name)
        folder = self._folder.inside(self._folder.draft(name))
        folder.make()
        carried: Mapping[str, NDArray[Any]] = new if delta is None else delta
        parts = list(_split({one: array.nbytes for one, array in carried.items()}))
        weight_map: dict[str, str] = {}
        size = 0
        for place, names in enumerate(parts, start=1):
            file = f"model-{place:05d}-of-{len(parts):05d}.safetensors"
            prefix = "" if delta is not None else self._dialect.full_digest
            metadata = {prefix + one: self._digest(_bytes(new[one]).data) for one in names}
            if delta is None:
                metadata["format"] = "pt"  # loaders of full checkpoints ask for it
            written = write_tensors(folder, file, [Tensor.of(n, carried[n]) for n in names], metadata)
            weight_map |= dict.fromkeys(names, file)
            size += written.size
        base = None if delta is None else number - 1
        extra = Extra(
            number,
            base,
            version[0] if version else None,
            version[1] if version else None,
            positions,
            {one: _write_table(folder, one, table, number, base) for one, table in tables.items()},
        )
        _write_json(folder, EXTRA, extra)
        _write_json(folder, INDEX, Index(weight_map, self._metadata(number, base, new)))
        self._folder.publish(name)
        return size

    def _metadata(self, number: int, base: int | None, new: Mapping[str, NDArray[Any]]) -> IndexMetadata:
        text = self._dialect.text
        if base is None:
            total = sum(array.nbytes for array in new.values())
            return IndexMetadata(text(number), checksum_format=self._checksum, total_size=total)
        return IndexMetadata(text(number), text(base), "xor", "zstd", self._checksum)

    # ── what goes ───────────────────────────────────────────────────────────────────────────────

    def _discard(self, name: str) -> None:
        """Remove what a writer that died, or failed, left of a version."""
        for left in {name, self._folder.draft(name)}:
            try:
                self._folder.delete(left)
            except CheckpointError as error:
                _log.warning("%s stays: %s", left, error)

    def _prune(self) -> None:
        """Remove old versions, the newest of them last, each one's index first."""
        numbers = sorted(self._kept)
        staying = numbers[-self._keep :]
        needed = min((self._kept[number] or number for number in staying), default=0)
        for number in [one for one in numbers if one < min(needed, staying[0])]:
            name = folder_name(number)
            try:
                self._folder.inside(name).delete(INDEX)
                self._folder.delete(name)
            except CheckpointError as error:
                _log.warning("version %d could not be removed: %s", number, error)
                return
            del self._kept[number]


def _numbers(entries: Mapping[str, int | None]) -> list[int]:
    found = (folder_number(name) for name, size in entries.items() if size is None)
    return sorted(number for number in found if number is not None)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _split(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in groups of about a file's size; a larger tensor has a file of its own."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > _FILE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _write_json(folder: Any, name: str, content: msgspec.Struct) -> None:
    with folder.write(name) as sink:
        write_all(sink, memoryview(msgspec.json.encode(content)))


def _write_table(folder: Any, name: str, table: TableDelta, number: int, base: int | None) -> TableFile:
    file = f"table-{name.replace('/', '_')}.safetensors"
    metadata = {"table": name, "version": str(number), "base_version": "" if base is None else str(base)}
    arrays: dict[str, NDArray[Any]] = {
        "ids": table.ids,
        "values": table.values,
        "deleted": table.deleted,
    }
    tensors = [Tensor.of(part, array) for part, array in arrays.items()]
    written = write_tensors(folder, file, tensors, metadata)
    return TableFile(file, table.full, written.sha256)
