# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""Loops that put ids in order; compiled from this text by `headwater.kernels.arrange`, never imported."""

import numpy as np

from headwater.kernels.memory import mix, prefetch
from headwater.kernels.primitives import outer

GROUP = 32
SLOTS = 4096


@outer("int64(int64[::1], int64, int32[::1], int64[::1], int64[::1])")
def number(ids, known, table, unique, inverse):
    """Number ids in order of first appearance, on from `known`; the hash table lives from call to call.

    table: int32[a power of two above the count of ids], −1 where empty; unique[k]: id number k;
    inverse[i]: number of ids[i]. Returns how many are known now.
    """
    mask = np.uint64(len(table) - 1)
    positions = np.empty(GROUP, np.int64)
    for start in range(0, len(ids), GROUP):
        stop = min(start + GROUP, len(ids))
        for i in range(start, stop):
            position = np.int64((mix(np.uint64(ids[i])) >> np.uint64(20)) & mask)
            positions[i - start] = position
            prefetch(table.ctypes.data + 4 * position)
        for i in range(start, stop):
            position = positions[i - start]
            while table[position] >= 0 and unique[table[position]] != ids[i]:
                position = np.int64(np.uint64(position + 1) & mask)
            if table[position] < 0:
                table[position] = np.int32(known)
                unique[known] = ids[i]
                known += 1
            inverse[i] = table[position]
    return known


@outer("void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def sort_by_slot(unique, inverse, ids, bounds, places):
    """Put unique ids in order of slot, within a slot as they came, and renumber `inverse` to match.

    bounds[s]: where slot s begins in `ids`, int64[SLOTS + 1]; places[k]: where unique[k] went.
    """
    bounds[:] = 0
    for k in range(len(unique)):
        places[k] = np.int64(mix(np.uint64(unique[k])) & np.uint64(SLOTS - 1))
        bounds[places[k] + 1] += 1
    for slot in range(SLOTS):
        bounds[slot + 1] += bounds[slot]
    ahead = bounds[:SLOTS].copy()
    for k in range(len(unique)):
        slot = places[k]
        places[k] = ahead[slot]
        ids[ahead[slot]] = unique[k]
        ahead[slot] += 1
    for i in range(len(inverse)):
        inverse[i] = places[inverse[i]]


@outer("void(int64[::1], int64[::1])")
def tally(numbers, counts):
    """Add to counts[k] how often k is among the numbers."""
    for k in numbers:
        counts[k] += 1


@outer("void(int64[::1], int64, int64, int64[::1], int64[::1])")
def append(numbers, address, size, ends, sources):
    """Append the address of item i, of `size` bytes from `address` on, to the run that numbers[i] ends."""
    for i in range(len(numbers)):
        place = ends[numbers[i]]
        sources[place] = address + i * size
        ends[numbers[i]] = place + 1
