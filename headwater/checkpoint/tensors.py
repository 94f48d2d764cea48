"""Safetensors files, written and read in pieces: nothing is held twice, and any part can be read alone.

Invariants:
- Bytes are hashed as they are written, so the sum is that of what was meant to be written, not of what a
  disk gave back.
- A header is checked against the size of the file before anything it announces is allocated; whatever is
  wrong with a file raises CheckpointError.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the header's length, the
header (JSON), then the arrays, one after another. Its library writes arrays that are whole in memory, to
paths only, and hashes nothing; it reads what is written here, and the reverse.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.store import Folder, Sink, Source, write_all
from headwater.errors import CheckpointError

Array: TypeAlias = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
"""Name in a file → dtype in memory. NumPy has no bfloat16: its bits are read and written as uint16."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA = "__metadata__"
"""The one name that no tensor can have."""

_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # what the library accepts
_PIECE = 8 << 20  # bytes hashed while they are written: long enough that handing over costs nothing


class Written(NamedTuple):
    """A file that was written."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor to be written: `pieces` are contiguous arrays whose bytes, in order, fill it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterable[Array]

    @classmethod
    def of(cls, name: str, array: Array) -> Tensor:
        """A whole array; it is read while it is written, not copied."""
        return cls(name, array.dtype, array.shape, (np.ascontiguousarray(array),))

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# ── writing ─────────────────────────────────────────────────────────────────────────────────────


def write_tensors(
    folder: Folder, name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a safetensors file; blocks until it is durable.

    Raises:
        CheckpointError: the file system refuses, or is full.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so each is aligned
    with ThreadPoolExecutor(1, thread_name_prefix="headwater-sha256") as pool, folder.write(name) as sink:
        hashed = _HashedSink(sink, pool)
        hashed.write(memoryview(_header(ordered, metadata or {})))
        for tensor in ordered:
            end = hashed.size + tensor.size
            for piece in tensor.pieces:
                assert piece.dtype == tensor.dtype, f"{tensor.name}: {piece.dtype}, not {tensor.dtype}"
                hashed.write(piece.reshape(-1).view(np.uint8).data)
            assert hashed.size == end, f"{tensor.name}: {hashed.size - end} bytes too many"
    return Written(hashed.sha256, hashed.size)


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {METADATA: metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        dtype = _NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % _LENGTH)
    return len(header).to_bytes(_LENGTH, "little") + header


class _HashedSink:
    """Hashes in another thread what it writes in this one; both are done when `write` returns."""

    def __init__(self, sink: Sink, pool: ThreadPoolExecutor) -> None:
        self._sink = sink
        self._pool = pool
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: memoryview) -> None:
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            hashing = self._pool.submit(self._digest.update, piece)
            try:
                write_all(self._sink, piece)
            finally:
                hashing.result()
        self.size += len(data)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@contextmanager
def open_tensors(folder: Folder, name: str, size: int) -> Iterator[TensorFile]:
    """Open a safetensors file of `size` bytes.

    Raises:
        CheckpointError: it is not there, is no safetensors file or of another size.
    """
    with folder.read(name) as source:
        yield TensorFile(source, f"{folder.url}/{name}", size)


class TensorFile:
    """An open safetensors file. Not for several threads at once.

    Attributes:
        url: where it lies.
        metadata: the texts that its writer added.
    """

    metadata: dict[str, str]

    def __init__(self, source: Source, url: str, size: int) -> None:
        self.url = url
        self._source = source
        length = int.from_bytes(self._bytes(0, _LENGTH), "little")
        if length > min(_LONGEST_HEADER, size - _LENGTH):
            raise self._damaged(f"announces a header of {length} bytes, but has {size} in all")
        self._data = _LENGTH + length
        self._entries = self._parsed(self._bytes(_LENGTH, length), size - self._data)

    def _parsed(self, header: bytes, available: int) -> dict[str, _Entry]:
        try:
            raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            metadata = raw.pop(METADATA, None)
            self.metadata = msgspec.json.decode(metadata, type=dict[str, str]) if metadata else {}
            entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged(f"has no readable header ({error})") from error
        for name, entry in entries.items():
            start, stop = entry.data_offsets
            if entry.dtype not in DTYPES:
                raise self._damaged(f"has a tensor {name!r} of {entry.dtype}, expected {', '.join(DTYPES)}")
            expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
            if not (
                0 <= start <= stop <= available
                and stop - start == expected
                and min(entry.shape, default=0) >= 0
            ):
                raise self._damaged(
                    f"has a tensor {name!r} of {expected} bytes at {start}–{stop} of {available}"
                )
        return entries

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → dtype, as the file names it, and shape."""
        return {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}

    def expect(self, name: str, dtype: str, shape: Sequence[int | None]) -> tuple[int, ...]:
        """Check that a tensor is what the manifest says (None: any size); return its shape.

        Raises:
            CheckpointError: it is not.
        """
        entry = self._entries.get(name)
        fits = entry is not None and entry.dtype == dtype and len(entry.shape) == len(shape)
        if (
            entry is None
            or not fits
            or any(want is not None and want != got for want, got in zip(shape, entry.shape, strict=True))
        ):
            got = f"{entry.dtype}{list(entry.shape)}" if entry else f"only {', '.join(self._entries)}"
            raise self._damaged(f"should hold {name} {dtype}{list(shape)}, got {got}")
        return entry.shape

    def read_into(self, name: str, first: int, out: Array) -> None:
        """Read rows [first, first + len(out)) of a tensor into `out`, C-contiguous, of its dtype.

        Raises:
            CheckpointError: the file ends before.
        """
        entry = self._entries[name]
        assert out.dtype == DTYPES[entry.dtype]
        assert first + len(out) <= entry.shape[0]
        row = math.prod(entry.shape[1:]) * out.dtype.itemsize
        self._fill(self._data + entry.data_offsets[0] + first * row, out.reshape(-1).view(np.uint8).data)

    def read_scalar(self, name: str) -> Array:
        """A tensor of no dimensions, in a new array."""
        entry = self._entries[name]
        out = np.empty((), DTYPES[entry.dtype])
        self._fill(self._data + entry.data_offsets[0], out.reshape(-1).view(np.uint8).data)
        return out

    def read(self, name: str, first: int = 0, stop: int | None = None) -> Array:
        """Rows [first, stop) of a tensor, in a new array."""
        entry = self._entries[name]
        rows = (entry.shape[0] if stop is None else stop) - first
        out = np.empty((rows, *entry.shape[1:]), DTYPES[entry.dtype])
        self.read_into(name, first, out)
        return out

    def _bytes(self, at: int, count: int) -> bytes:
        out = bytearray(count)
        self._fill(at, memoryview(out))
        return bytes(out)

    def _fill(self, at: int, out: memoryview) -> None:
        self._source.seek(at)
        done = 0
        while done < len(out):
            got = self._source.readinto(out[done : done + _PIECE])
            if not got:
                raise self._damaged(f"ends at byte {at + done}, expected {at + len(out)} and more")
            done += got

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.url} {what}: it is damaged, use another checkpoint")
