"""A worker's half of the way to the servers: ids without repeats, in the order of the servers.

Invariants:
- Repeats are found once; pulled rows and pushed gradients go through the same plan.
- Ids are ordered by virtual slot, within a slot by first occurrence, whatever the number of servers.
- Gradients of a repeated id are summed in order of occurrence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import UsageError
from headwater.kernels.cache import load
from headwater.kernels.rows import combine, spread
from headwater.spec.placement import SLOTS, slot_bounds

Ids = NDArray[np.int64]
Array = NDArray[np.float32]


_MOST = 2**31 - 2


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How ids of any shape, with repeats, map to the ids that the servers see.

    Attributes:
        shape: of the ids that were given.
        ids: int64[u], each once, in the order of the servers.
        bounds: int64[servers + 1]: server i gets ids[bounds[i] : bounds[i + 1]].
        inverse: int64[n]: the i-th given id is ids[inverse[i]].
    """

    shape: tuple[int, ...]
    ids: Ids
    bounds: Ids
    inverse: Ids

    def scatter(self, rows: Array) -> Array:
        """float32[*shape, dim], new: the row of each given id; `rows`: float32[u, dim], of each of `ids`."""
        out = np.empty((len(self.inverse), rows.shape[1]), dtype=np.float32)
        spread(self.inverse, np.ascontiguousarray(rows, dtype=np.float32), out)
        return out.reshape(*self.shape, rows.shape[1])

    def combine(self, gradients: Array, sums: Array) -> None:
        """Write the sum of the gradients of each of `ids` to `sums`, float32[u, dim] and contiguous.

        `gradients`: float32[n, dim], contiguous, in the order of the ids that were given.
        """
        combine([(self.inverse, gradients)], sums)


def arrange(ids: Any, servers: int) -> Plan:
    """Plan the way of `ids` (integers of any shape) to that many servers; blocks for a pass over them.

    Raises:
        UsageError: not integers, or beyond int64.
    """
    given = as_ids(ids)
    unique, inverse = unite([given.reshape(-1)])
    ordered, bounds = np.empty_like(unique), np.empty(SLOTS + 1, dtype=np.int64)
    compiled().sort_by_slot(unique, inverse[0], ordered, bounds, np.empty_like(unique))
    return Plan(given.shape, ordered, bounds[slot_bounds(servers)], inverse[0])


def as_ids(ids: Any) -> Ids:
    """`ids` as a contiguous int64 array of the same shape, without a copy where it is one.

    Raises:
        UsageError: not integers, or beyond int64.
    """
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"ids: cannot read a {type(ids).__name__} as an array: {error}") from error
    if array.size == 0 and array.dtype == np.float64 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise UsageError(f"ids must be integers, got {array.dtype}: convert them, for example by hashing")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise UsageError(f"ids must fit int64, got {int(array.max())}: subtract 2**64 or hash them")
    return np.ascontiguousarray(array, dtype=np.int64).reshape(array.shape)


def unite(lists: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
    """The ids of several lists, int64[n] each, once each in order of first appearance.

    Returns them, int64[u], and for each list where its ids stand among them, int64[n].

    Raises:
        UsageError: more than 2³¹ − 2 ids.
    """
    total = sum(map(len, lists))
    if total > _MOST:
        raise UsageError(f"{total} ids are too many for one call: pass at most {_MOST}, in several calls")
    table = np.full(1 << max(4, (2 * total - 1).bit_length()), -1, dtype=np.int32)
    unique = np.empty(total, dtype=np.int64)
    inverses = [np.empty(len(ids), dtype=np.int64) for ids in lists]
    known = 0
    for ids, inverse in zip(lists, inverses, strict=True):
        known = compiled().number(ids, known, table, unique, inverse)
    return unique[:known], inverses


class Numbering:
    """Numbers ids in order of first appearance, list after list; time and memory follow the different ids.

    Attributes:
        known: how many different ids there were.
    """

    def __init__(self) -> None:
        self.known = 0
        self._unique = np.empty(0, dtype=np.int64)
        self._table = np.empty(0, dtype=np.int32)

    @property
    def ids(self) -> Ids:
        """int64[known]: the ids by their number; a view."""
        return self._unique[: self.known]

    def add(self, ids: Ids) -> Ids:
        """int64[n]: the number of each of int64[n] ids.

        Raises:
            UsageError: more than 2³¹ − 2 different ids.
        """
        most = self.known + len(ids)
        if most > _MOST:
            raise UsageError(f"{most} ids are too many for one step: step in between")
        if 2 * most > len(self._table):
            self._make_room(2 * most)
        inverse = np.empty(len(ids), dtype=np.int64)
        self.known = compiled().number(ids, self.known, self._table, self._unique, inverse)
        return inverse

    def truncate(self, known: int) -> None:
        """Forget the ids from this number on."""
        self.known = known
        self._make_room(max(known, 1))

    def _make_room(self, ids: int) -> None:
        table = np.full(1 << max(4, (2 * ids - 1).bit_length()), -1, dtype=np.int32)
        unique = np.empty(len(table), dtype=np.int64)
        compiled().number(self.ids, 0, table, unique, np.empty(self.known, dtype=np.int64))
        self._unique, self._table = unique, table


def trace(lists: Sequence[tuple[Ids, int]], size: int) -> tuple[Ids, Ids, Ids]:
    """Unite lists of ids, each given with the address of its items of `size` bytes, and find them again.

    Returns the ids, once each in order of first appearance, int64[u]; `sources`, int64[n], the addresses of
    their items, id by id, in order of the lists; and `bounds`, int64[u + 1]: those of ids[k] are
    sources[bounds[k] : bounds[k + 1]].
    """
    ids, inverses = unite([part for part, _ in lists])
    sources = np.empty(sum(map(len, inverses)), dtype=np.int64)
    bounds = np.zeros(len(ids) + 2, dtype=np.int64)
    for inverse in inverses:
        compiled().tally(inverse, bounds[2:])
    np.cumsum(bounds, out=bounds)
    for inverse, (_, address) in zip(inverses, lists, strict=True):
        compiled().append(inverse, address, size, bounds[1:], sources)
    return ids, sources, bounds[:-1]


@functools.cache
def compiled() -> ModuleType:
    """The loops; blocks while they are compiled."""
    return load(Path(__file__).with_name("arrange_loops.py").read_text())
