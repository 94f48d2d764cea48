"""Reads published versions: a full one, then each delta on its declared base, every digest checked.

Invariants:
- What a reader holds is one complete version: a version that does not verify changes nothing.
- A delta is applied once, to its base and to nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.store import Folder, Location, open_folder
from headwater.checkpoint.tensors import TensorFile, open_tensors
from headwater.errors import CheckpointError, ConfigurationError, WeightsError
from headwater.weights.bfloat16 import to_float32
from headwater.weights.layout import (
    DIALECTS,
    EXTRA,
    INDEX,
    Extra,
    Index,
    TableFile,
    digest_of,
    folder_name,
    folder_number,
    number_of,
    zstd,
)

_LONGEST_INDEX = 64 << 20
_PREFIXES = sorted({dialect.full_digest for dialect in DIALECTS.values()}, key=len, reverse=True)


class Weights(dict[str, NDArray[Any]]):
    """Tensor name → array, all of one version. bfloat16 tensors are arrays of `ml_dtypes.bfloat16`.

    Attributes:
        version: number of the published version.
        training_version: (generation, number) of the training's version, where the publisher said so.
        positions: what data that version has seen, as plain data; None where nothing is said.
        tables: table name → `ids` int64[n] and `values` float32[n, dim], row by row.
    """

    version: int
    training_version: tuple[int, int] | None = None
    positions: Any = None
    tables: dict[str, dict[str, NDArray[Any]]]


def load_weights(directory: Location, version: int | None = None) -> Weights:
    """The tensors of a published version; blocks to read and verify it and all that it builds on.

    Args:
        directory: what `headwater publish` writes to, a path or a URL that fsspec knows.
        version: number of the published version; None: the newest complete one.

    Raises:
        ConfigurationError: there is no such version; the text lists those that there are.
        WeightsError: a file is damaged, a tensor's digest does not match, or a link of the chain is missing.
    """
    reader = WeightsReader(directory)
    reader.load(version)
    return reader.weights()


def versions(directory: Location) -> list[int]:
    """The numbers of the complete versions, ascending; blocks for the file system.

    Raises:
        WeightsError: the directory cannot be read.
    """
    folder = open_folder(directory)
    try:
        named = {folder_number(name): name for name, size in folder.entries().items() if size is None}
        return sorted(
            number for number, name in named.items() if number and INDEX in folder.inside(name).entries()
        )
    except CheckpointError as error:
        raise WeightsError(str(error)) from error


class WeightsReader:
    """A receiver of versions, which holds one and moves on by deltas. Not for several threads at once.

    Attributes:
        version: number of the version that it holds; 0 for none.
    """

    def __init__(self, directory: Location) -> None:
        self._directory = directory
        self._folder = open_folder(directory)
        self.version = 0
        self._tensors: dict[str, tuple[str, NDArray[Any]]] = {}
        self._tables: dict[str, _Rows] = {}
        self._extra: Extra | None = None

    def load(self, version: int | None = None) -> None:
        """Hold that version (None: the newest), by as few files as the chain needs.

        Raises:
            ConfigurationError: there is no such version.
            WeightsError: as `load_weights`; what was held before stays.
        """
        known = versions(self._directory)
        if not known or (version is not None and version not in known):
            there = f"{known[0]} to {known[-1]}" if known else "none"
            raise ConfigurationError(
                f"{self._folder.url} has no complete version{'' if version is None else f' {version}'}: "
                f"there are {there}"
            )
        target = known[-1] if version is None else version
        chain = self._chain(target)
        held = self._held()
        try:
            for number in chain:
                self.apply(number)
        except BaseException:
            self.version, self._tensors, self._tables, self._extra = held
            raise

    def apply(self, number: int) -> None:
        """Move on to a version: a full one always, a delta only from its base.

        Raises:
            WeightsError: the version is a delta of another base, was applied already, or does not verify.
                Nothing changes then.
        """
        index, folder = self._index(number), self._folder.inside(folder_name(number))
        base = index.metadata.base_version
        if base is not None:
            needed = number_of(base, f"{folder.url}/{INDEX}")
            if self.version == number:
                raise WeightsError(f"version {number} was applied already: a delta is applied once")
            if self.version != needed:
                raise WeightsError(
                    f"version {number} is a delta of version {needed}, but this reader holds "
                    f"{self.version or 'none'}: apply {needed} first, or load a full version"
                )
        try:
            tensors = self._verified(index, folder, base is not None)
            extra = _read_json(folder, EXTRA, Extra) if EXTRA in folder.entries() else None
            tables = _with_rows(folder, {} if base is None else self._tables, extra)
        except CheckpointError as error:
            raise WeightsError(f"version {number} cannot be read: {error}") from error
        self.version, self._tensors, self._tables, self._extra = number, tensors, tables, extra

    def weights(self) -> Weights:
        """What is held, in new arrays of the caller's.

        Raises:
            WeightsError: nothing is held yet.
        """
        if not self.version:
            raise WeightsError("this reader holds no version: load one first")
        weights = Weights(
            {name: _as_array(kind, array) for name, (kind, array) in sorted(self._tensors.items())}
        )
        weights.version = self.version
        weights.tables = {
            name: {"ids": rows.ids.copy(), "values": rows.values.copy()}
            for name, rows in self._tables.items()
        }
        extra = self._extra
        if extra is not None and extra.generation is not None and extra.number is not None:
            weights.training_version = extra.generation, extra.number
        weights.positions = None if extra is None else extra.positions
        return weights

    # ── the chain ───────────────────────────────────────────────────────────────────────────────

    def _held(self) -> tuple[int, dict[str, tuple[str, NDArray[Any]]], Any, Extra | None]:
        return self.version, self._tensors, self._tables, self._extra

    def _chain(self, target: int) -> list[int]:
        """What to apply, first to last: from what is held, or from a full version."""
        chain: list[int] = []
        number = target
        while number != self.version or not chain:
            if number in chain:
                raise WeightsError(f"version {number} is its own base: the directory is damaged")
            chain.append(number)
            base = self._index(number, wanted_by=chain[-2] if len(chain) > 1 else None).metadata.base_version
            if base is None:
                break
            number = number_of(base, f"the index of version {number}")
        return [] if target == self.version else chain[::-1]

    def _index(self, number: int, wanted_by: int | None = None) -> Index:
        folder = self._folder.inside(folder_name(number))
        try:
            there = INDEX in folder.entries()
            index: Index | None = _read_json(folder, INDEX, Index) if there else None
        except CheckpointError as error:
            raise WeightsError(f"version {number} cannot be read: {error}") from error
        if index is None:
            link = f", which version {wanted_by} is a delta of," if wanted_by else ""
            raise WeightsError(
                f"version {number}{link} is missing in {self._folder.url}: a link of the chain was removed; "
                "load a later full version, or have the publisher keep more versions"
            )
        said = index.metadata.version
        if said is not None and number_of(said, f"the index of version {number}") != number:
            raise WeightsError(f"the folder of version {number} holds an index of version {said}")
        return index

    # ── a version's content ─────────────────────────────────────────────────────────────────────

    def _verified(self, index: Index, folder: Folder, delta: bool) -> dict[str, tuple[str, NDArray[Any]]]:
        """The new state of all tensors; the old one is not touched."""
        state = dict(self._tensors) if delta else {}
        sizes = folder.entries()
        for file in sorted(set(index.weight_map.values())):
            size = sizes.get(file)
            if size is None:
                raise WeightsError(f"{folder.url} lacks {file}, which its index names")
            with open_tensors(folder, file, size) as opened:
                expected = {name for name, one in index.weight_map.items() if one == file}
                found = opened.tensors()
                if expected - found.keys():
                    raise WeightsError(f"{opened.url} lacks the tensor {min(expected - found.keys())!r}")
                for name in sorted(expected):
                    kind, array = self._new_state(opened, name, found[name][0], index, delta)
                    _check(opened, name, array, index, delta)
                    state[name] = kind, array
        return state

    def _new_state(
        self, opened: TensorFile, name: str, kind: str, index: Index, delta: bool
    ) -> tuple[str, NDArray[Any]]:
        if not delta:
            return kind, opened.read(name) if opened.tensors()[name][1] else opened.read_scalar(name)
        if name not in self._tensors:
            raise WeightsError(f"{opened.url} changes the tensor {name!r}, which its base does not have")
        kind, old = self._tensors[name]
        encoding, compression = index.metadata.delta_encoding, index.metadata.compression_format
        if compression != "zstd":
            raise WeightsError(f"{opened.url} is compressed by {compression!r}, expected 'zstd'")
        new = old.copy()
        raw = new.reshape(-1).view(np.uint8)
        if encoding == "xor":
            raw ^= _decompressed(opened, name, raw.nbytes, exact=True)
        elif encoding == "overwrite":
            _overwrite(raw, _decompressed(opened, name, 4 + 5 * raw.nbytes, exact=False), opened.url, name)
        else:
            raise WeightsError(f"{opened.url} is encoded as {encoding!r}, expected 'xor' or 'overwrite'")
        return kind, new


def _read_json(folder: Folder, name: str, kind: Any) -> Any:
    with folder.read(name) as source:
        data = bytearray()
        piece = bytearray(1 << 16)
        while got := source.readinto(memoryview(piece)):
            data += piece[:got]
            if len(data) > _LONGEST_INDEX:
                raise WeightsError(f"{folder.url}/{name} is longer than {_LONGEST_INDEX} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WeightsError(f"{folder.url}/{name} is no index of a version: {error}") from error


def _decompressed(opened: TensorFile, name: str, limit: int, *, exact: bool) -> NDArray[np.uint8]:
    package = zstd()
    data = opened.read(name).tobytes()
    try:
        announced = package.frame_content_size(data)
        if announced > limit:
            raise WeightsError(f"{opened.url}: the delta of {name!r} has {announced} bytes, at most {limit}")
        plain = package.ZstdDecompressor().decompress(data, max_output_size=limit)
    except package.ZstdError as error:
        raise WeightsError(f"{opened.url}: the delta of {name!r} is damaged: {error}") from error
    if exact and len(plain) != limit:
        raise WeightsError(f"{opened.url}: the delta of {name!r} has {len(plain)} bytes, expected {limit}")
    return np.frombuffer(plain, dtype=np.uint8)


def _overwrite(raw: NDArray[np.uint8], data: NDArray[np.uint8], url: str, name: str) -> None:
    """Put the values of an `overwrite` delta, a count, positions and bytes, in their places."""
    count = int(data[:4].view("<u4")[0]) if len(data) >= 4 else -1
    if count < 0 or len(data) != 4 + 5 * count:
        raise WeightsError(f"{url}: the delta of {name!r} has {len(data)} bytes for {count} values")
    places = data[4 : 4 + 4 * count].view("<u4")
    if count and int(places.max()) >= len(raw):
        raise WeightsError(f"{url}: the delta of {name!r} names byte {int(places.max())} of {len(raw)}")
    raw[places] = data[4 + 4 * count :]


def _check(opened: TensorFile, name: str, array: NDArray[Any], index: Index, delta: bool) -> None:
    """Refuse a tensor whose digest differs. A full version of a foreign writer may have none."""
    algorithm = index.metadata.checksum_format or "adler32"
    keys = [prefix + name for prefix in _PREFIXES]
    said = next((opened.metadata[key] for key in keys if key in opened.metadata), None)
    if said is None:
        if delta:
            raise WeightsError(f"{opened.url} has no checksum of {name!r}, so the delta cannot be trusted")
        return
    got = digest_of(algorithm)(array.reshape(-1).view(np.uint8).data)
    if got != said:
        raise WeightsError(
            f"{opened.url}: the {algorithm} of {name!r} is {got}, expected {said}: the file is damaged, or "
            "was applied to another base"
        )


def _as_array(kind: str, array: NDArray[Any]) -> NDArray[Any]:
    if kind != "BF16":
        return array.copy()
    try:
        import ml_dtypes
    except ImportError as error:
        raise ConfigurationError(
            "bfloat16 weights need the package ml-dtypes: install Headwater with its extra `weights`"
        ) from error
    return array.copy().view(ml_dtypes.bfloat16)


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


class _Rows(NamedTuple):
    """A table's rows, by ascending id: int64[n] and float32[n, dim]. The arrays are never written to."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def _with_rows(folder: Folder, before: Mapping[str, _Rows], extra: Extra | None) -> dict[str, _Rows]:
    """The tables after a version."""
    tables = dict(before)
    for name, table in (extra.tables if extra is not None else {}).items():
        ids, values, deleted = _read_rows(folder, table)
        old = None if table.full else tables.get(name)
        if old is not None and len(old.ids):
            stays = ~(np.isin(old.ids, ids) | np.isin(old.ids, deleted))
            ids = np.concatenate([old.ids[stays], ids])
            values = np.concatenate([old.values[stays], values])
        order = np.argsort(ids, kind="stable")
        tables[name] = _Rows(ids[order], values[order])
    return tables


def _read_rows(
    folder: Folder, table: TableFile
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    size = folder.entries().get(table.file)
    if size is None:
        raise WeightsError(f"{folder.url} lacks {table.file}, which its index names")
    digest = hashlib.sha256()
    with folder.read(table.file) as source:
        piece = bytearray(1 << 20)
        while got := source.readinto(memoryview(piece)):
            digest.update(memoryview(piece)[:got])
    if digest.hexdigest() != table.sha256:
        raise WeightsError(f"{folder.url}/{table.file} is damaged: its sha256 is not that of the index")
    with open_tensors(folder, table.file, size) as opened:
        values = opened.read("values")
        floats = to_float32(values) if opened.tensors()["values"][0] == "BF16" else values
        return opened.read("ids"), floats, opened.read("deleted")
