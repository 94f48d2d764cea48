# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""Loops over rows of any rule; compiled from this text by `headwater.kernels.rows`, never imported.

Invariants:
- Rows lie in slabs (`headwater.kernels.slabs`), whose chunks come as arrays of addresses.
- A row number of −1 is skipped.
- A row's memory is asked for `AHEAD` rows before it is used.
- Nothing is rounded but by the operations that stand here; `headwater.spec.initializers` computes the same
  bits.
"""

import math

import numpy as np

from headwater.kernels.memory import (
    bits_of,
    float_of,
    mix,
    place_of,
    prefetch,
    read_int,
    write_int,
)
from headwater.kernels.primitives import LINE, VALUES, WINDOWS, add_line, copy_line, inner, load, outer, store

AHEAD = 16
LINE_BYTES = 4 * LINE
LARGEST = np.uint64(2**63 - 1)


@inner
def ask_for(address, size):
    for line in range(0, size, LINE_BYTES):
        prefetch(address + line)


@outer("void(int32[::1], int64[::1], int64, int64, int64)")
def gather(rows, addresses, shift, dim, target):
    """Copy rows to float32[n, dim] at address `target`."""
    size = 4 * dim
    for i in range(len(rows)):
        if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
            ask_for(place_of(np.int64(rows[i + AHEAD]), addresses, shift, size), size)
        if rows[i] >= 0:
            row = place_of(np.int64(rows[i]), addresses, shift, size)
            for j in range(dim):
                store(target, i * dim + j, load(row, j, VALUES), WINDOWS)


@outer("void(int32[::1], int64[::1], int64, int64, int64)")
def scatter(rows, addresses, shift, dim, source):
    """Copy float32[n, dim] at address `source` to rows."""
    size = 4 * dim
    for i in range(len(rows)):
        row = place_of(np.int64(rows[i]), addresses, shift, size)
        for j in range(dim):
            store(row, j, load(source, i * dim + j, WINDOWS), VALUES)


@outer("void(int64[::1], int64, int64, int64)")
def spread(inverse, source, dim, target):
    """Copy row inverse[i] of `source` to row i of `target`."""
    size = 4 * dim
    for i in range(len(inverse)):
        if i + AHEAD < len(inverse):
            ask_for(source + inverse[i + AHEAD] * size, size)
        row, place = source + inverse[i] * size, target + i * size
        whole = dim - dim % LINE
        for j in range(0, whole, LINE):
            copy_line(place, row, j)
        for j in range(whole, dim):
            store(place, j, load(row, j, VALUES), WINDOWS)


@outer("void(int64[::1], int64, int64, int64, uint8[::1])")
def combine(inverse, source, dim, target, seen):
    """Add row i of `source` to row inverse[i] of `target`, in order of i; one not yet `seen` is copied."""
    size = 4 * dim
    whole = dim - dim % LINE
    for i in range(len(inverse)):
        if i + AHEAD < len(inverse):
            ask_for(target + inverse[i + AHEAD] * size, size)
        row, place = source + i * size, target + inverse[i] * size
        if seen[inverse[i]]:
            for j in range(0, whole, LINE):
                add_line(place, row, j)
            for j in range(whole, dim):
                store(place, j, load(place, j, VALUES) + load(row, j, WINDOWS), VALUES)
        else:
            seen[inverse[i]] = 1
            for j in range(0, whole, LINE):
                copy_line(place, row, j)
            for j in range(whole, dim):
                store(place, j, load(row, j, WINDOWS), VALUES)


@outer("void(int64[::1], int64, float32)")
def fill(addresses, width, value):
    """Set `width` float32 at each address."""
    for address in addresses:
        for j in range(width):
            store(address, j, value, VALUES)


@outer("void(int32[::1], int64[::1], int64, int32)")
def stamp(rows, addresses, shift, now):
    """Set the int32 of each row."""
    for i in range(len(rows)):
        if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
            prefetch(place_of(np.int64(rows[i + AHEAD]), addresses, shift, 4))
        if rows[i] >= 0:
            write_int(place_of(np.int64(rows[i]), addresses, shift, 4), 0, now)


@outer("void(int32[::1], int64[::1], int64, uint32, uint32[::1])")
def ages(rows, addresses, shift, now, out):
    """now − the row's stamp, modulo 2³²; 0 for a row of −1."""
    for i in range(len(rows)):
        if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
            prefetch(place_of(np.int64(rows[i + AHEAD]), addresses, shift, 4))
        out[i] = 0
        if rows[i] >= 0:
            out[i] = now - np.uint32(read_int(place_of(np.int64(rows[i]), addresses, shift, 4), 0))


@inner
def largest(keys, count):
    """The `count`-th largest key: its bytes are found one after the other, from the highest on."""
    found, left = np.uint64(0), count
    tally = np.empty(256, np.int64)
    for shift in range(56, -1, -8):
        tally[:] = 0
        for key in keys:
            if shift == 56 or (key ^ found) >> np.uint64(shift + 8) == 0:
                tally[(key >> np.uint64(shift)) & np.uint64(255)] += 1
        byte = 255
        while tally[byte] < left:
            left -= tally[byte]
            byte -= 1
        found |= np.uint64(byte) << np.uint64(shift)
    return found


@inner
def older(ids, ages, count, out):
    """Write the `count` oldest ids to `out`; of those as old as the youngest of them the smallest."""
    keys = np.empty(len(ids), np.uint64)
    for i in range(len(ids)):
        keys[i] = ages[i]
    limit = largest(keys, count)
    found = level = 0
    for i in range(len(ids)):
        if ages[i] > limit:
            out[found] = ids[i]
            found += 1
        elif ages[i] == limit:
            keys[level] = LARGEST - np.uint64(ids[i])  # in the order of signed ids, the smallest first
            level += 1
    if found < count:
        least = largest(keys[:level], count - found)
        for i in range(len(ids)):
            if ages[i] == limit and LARGEST - np.uint64(ids[i]) >= least:
                out[found] = ids[i]
                found += 1


@outer("int64(int64[::1], uint32[::1], int64[::1], int64, int64[::1])")
def oldest(ids, ages, bounds, kept, out):
    """Of each run, all but the `kept` youngest; returns how many."""
    found = 0
    for run in range(len(bounds) - 1):
        start, stop = bounds[run], bounds[run + 1]
        count = max(0, stop - start - kept)
        if count > 0:
            older(ids[start:stop], ages[start:stop], count, out[found : found + count])
        found += count
    return found


# ── initial values: see headwater.spec.initializers for the formulas ─────────────────────────────────

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROOT_2, LN_2 = 1.4142135623730951, 0.6931471805599453
CONSTANT, UNIFORM, NORMAL, TRUNCATED = range(4)
BELOW_2, WITHIN_2 = 0.022750131948179212, 0.9544997361036416


@inner
def uniform_of(key, column):
    bits = mix(key + np.uint64(column + 1) * GOLDEN)
    return (float(np.int64(bits >> np.uint64(33))) + 0.5) * 4.656612873077393e-10


@inner
def negative_log(p):
    """−ln p for 0 < p < 1."""
    bits = bits_of(p)
    power = float((bits >> 52) - 1023)
    mantissa = float_of((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000)
    s = (mantissa - ROOT_2) / (mantissa + ROOT_2)
    t = s * s
    series = 1.0 / 11.0 + t * (1.0 / 13.0)
    series = 1.0 / 7.0 + t * (1.0 / 9.0 + t * series)
    series = 1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * series))
    return -((power + 0.5) * LN_2 + 2.0 * s * series)


@inner
def quantile(p):
    """Both branches of AS 241, blended: a loop of it is vectorised, which a choice would prevent."""
    q = p - 0.5
    r = 0.180625 - q * q
    central = (
        q
        * (3.3871327179 + r * (50.434271938 + r * (159.29113202 + r * 59.109374720)))
        / (1.0 + r * (17.895169469 + r * (78.757757664 + r * 67.187563600)))
    )
    r = math.sqrt(negative_log(0.5 - abs(q))) - 1.6
    tail = (1.4234372777 + r * (2.7568153900 + r * (1.3067284816 + r * 0.17023821103))) / (
        1.0 + r * (0.73700164250 + r * 0.12021132975)
    )
    inside = float(np.int64(abs(q) <= 0.425))
    return inside * central + (1.0 - inside) * (1.0 - 2.0 * float(np.int64(q < 0.0))) * tail


@inner
def write_normal(address, dim, key, mean, std):
    for j in range(dim):
        store(address, j, np.float32(mean + std * quantile(uniform_of(key, j))), VALUES)


@inner
def write_truncated(address, dim, key, mean, std):
    for j in range(dim):
        z = quantile(BELOW_2 + uniform_of(key, j) * WITHIN_2)
        store(address, j, np.float32(mean + std * min(max(z, -2.0), 2.0)), VALUES)


@inner
def write_uniform(address, dim, key, low, width):
    for j in range(dim):
        store(address, j, np.float32(low + width * uniform_of(key, j)), VALUES)


@outer("void(int64[::1], int64[::1], int64, int64, int64, float64, float64)")
def initial(ids, addresses, dim, seed, kind, location, scale):
    """Write the initial row of each id at its address."""
    seeded = mix(np.uint64(seed))
    for i in range(len(ids)):
        key = mix(np.uint64(ids[i]) ^ seeded)
        if kind == NORMAL:
            write_normal(addresses[i], dim, key, location, scale)
        elif kind == TRUNCATED:
            write_truncated(addresses[i], dim, key, location, scale)
        elif kind == UNIFORM:
            write_uniform(addresses[i], dim, key, location, scale)
        else:
            for j in range(dim):
                store(addresses[i], j, np.float32(location), VALUES)
