"""Named tensors ↔ one flat float32 vector ↔ equal ranges, one a server.

Invariants:
- Tensors lie one after another, ordered by (parameter group, name), so every worker that declares
  the same tensors in any order gets the same vector.
- A tensor starts at a multiple of 64 bytes (a cache line and a vector register); the gap stays zero.
- Ranges are multiples of 4,096 bytes (a page), so that a server can map just its own.
- The vector does not depend on the number of servers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headwater.errors import RegistrationError
from headwater.messages import TensorSpec

Value = TypeVar("Value")

PAGE = 1024
"""Elements in a page of 4,096 bytes: ranges start and stop at multiples of it."""

LINE = 16
"""Elements in a cache line of 64 bytes: tensors start at multiples of it."""

LARGEST = 2**40
"""Most elements a model may have: 4 TiB, so that no product of sizes overflows."""

_MASKS = 8
"""Masks whose arrays are kept: steps carry the same tensors again and again."""

DTYPES = ("float32", "float16", "bfloat16")
"""What a parameter may be; all are float32 in the vector."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Layout:
    """Where each tensor of a model lies in its vector.

    Attributes:
        tensors: in vector order.
        starts, stops: int64[tensors], each tensor's elements, without the gap after it.
        groups: int64[tensors], each tensor's parameter group.
        elements: length of the vector, a multiple of `PAGE`.
        index: tensor name → position in `tensors`.

    Raises:
        RegistrationError: no tensors, a repeated name, an impossible shape, size, group or dtype.
    """

    __slots__ = ("_masks", "_whole", "elements", "groups", "index", "starts", "stops", "tensors")

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self.tensors = tuple(sorted(tensors, key=lambda tensor: (tensor.group, tensor.name)))
        if not self.tensors:
            raise RegistrationError("a model needs at least one tensor, got none")
        self.index = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        names = [name for tensor in self.tensors for name in (tensor.name, *tensor.aliases)]
        if len(set(names)) < len(names):
            raise RegistrationError(f"tensor names must differ, got {names}")
        starts, stops, end = [], [], 0
        for tensor in self.tensors:
            _check(tensor)
            starts.append(end)
            stops.append(end + math.prod(tensor.shape))
            end = _round_up(stops[-1], LINE)
            if end > LARGEST:
                raise RegistrationError(f"a model may have {LARGEST} elements at most, got {end} and more")
        self.starts = np.array(starts, dtype=np.int64)
        self.stops = np.array(stops, dtype=np.int64)
        self.groups = np.array([tensor.group for tensor in self.tensors], dtype=np.int64)
        self.elements = _round_up(max(end, 1), PAGE)
        self._masks: dict[bytes, NDArray[np.bool_]] = {}
        self._whole = np.packbits(np.ones(len(self.tensors), np.uint8), bitorder="little").tobytes()

    def cut(self, servers: int) -> list[tuple[int, int]]:
        """The vector's ranges [start, stop) for that many servers, in order.

        Some are empty where there are fewer pages than servers.
        """
        return ranges(self.elements, servers)

    def counted(self) -> int:
        """Elements of the tensors alone, which is what a person is told: the vector has gaps and a rest."""
        return int((self.stops - self.starts).sum())

    def views(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Each tensor as a view of `vector` (float32[elements]) in its shape; `vector` owns the memory."""
        return {
            tensor.name: vector[start:stop].reshape(tensor.shape)
            for tensor, start, stop in zip(self.tensors, self.starts, self.stops, strict=True)
        }

    def with_aliases(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What there is by tensor name, under the tensors' other names too."""
        named = dict(values)
        for tensor in self.tensors:
            named.update(dict.fromkeys(tensor.aliases, values[tensor.name]))
        return named

    def mask(self, names: Iterable[str]) -> bytes:
        """A bit a tensor, little-endian, set for the given ones."""
        if isinstance(names, set) and len(names) == len(self.tensors):
            return self._whole
        bits = np.zeros(len(self.tensors), dtype=np.uint8)
        for name in names:
            bits[self.index[name]] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def unmask(self, mask: bytes) -> NDArray[np.bool_]:
        """bool[tensors]: the inverse of `mask`; read-only, the same array for the same mask of lately."""
        known = self._masks.get(mask)
        if known is None:
            bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
            known = bits[: len(self.tensors)].astype(np.bool_)
            known.flags.writeable = False
            if len(self._masks) == _MASKS:
                self._masks.clear()
            self._masks[mask] = known
        return known

    def runs(self, carried: NDArray[np.bool_], start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches within [start, stop) that cover the carried tensors, merged where they touch."""
        merged: list[tuple[int, int]] = []
        for i in np.flatnonzero(carried):
            low = max(int(self.starts[i]), start)
            high = min(_round_up(int(self.stops[i]), LINE), stop)
            if low >= high:
                continue
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        return merged


def ranges(elements: int, servers: int) -> list[tuple[int, int]]:
    """Cut `elements` (a multiple of `PAGE`) into `servers` ranges that differ by a page at most."""
    pages = elements // PAGE
    bounds = [i * pages // servers * PAGE for i in range(servers + 1)]
    return list(itertools.pairwise(bounds))


def describe(tensors: Sequence[TensorSpec]) -> str:
    """`weight float32[10, 64], bias float32[10] of group 1`, shortened after the fourth."""
    shown = [f"{t.name} {t.dtype}{list(t.shape)}{_group(t)}" for t in tensors[:4]]
    return ", ".join(shown) + (f" and {len(tensors) - 4} more" if len(tensors) > 4 else "")


def _group(tensor: TensorSpec) -> str:
    return f" of group {tensor.group}" if tensor.group else ""


def _check(tensor: TensorSpec) -> None:
    if any(size < 0 for size in tensor.shape):
        raise RegistrationError(f"tensor {tensor.name!r} has an impossible shape {tensor.shape}")
    if not 0 <= tensor.group <= LARGEST:
        raise RegistrationError(f"tensor {tensor.name!r} has an impossible parameter group {tensor.group}")
    if tensor.dtype == "float64":
        raise RegistrationError(
            f"tensor {tensor.name!r} is float64, but models are kept in float32: "
            f"convert it first, for example array.astype('float32') or module.float()"
        )
    if tensor.dtype not in DTYPES:
        raise RegistrationError(f"tensor {tensor.name!r} has dtype {tensor.dtype}, expected {DTYPES}")
