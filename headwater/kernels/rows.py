"""Passes over a table's rows: read, sum repeats, begin, apply a rule.

Invariants:
- The rule's scalar function is the same source as in the dense pass (`headwater.kernels.source`).
- Arrays named here are C-contiguous and stay the caller's.
- One compilation a rule, whatever the dim, the number of chunks and of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.kernels.cache import load
from headwater.kernels.slabs import Slabs
from headwater.kernels.source import float32_source, generated_name
from headwater.spec.initializers import Initializer
from headwater.spec.rules import Rule

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
Rows = NDArray[np.int32]

_NARROW = 32
"""Elements of a row from which on a misprediction costs less than another pass over sums."""

TEMPLATE = '''"""Row loop of a rule."""
import math

import numpy as np
from numba import float32
from headwater.kernels.memory import inlined, place_of, prefetch
from headwater.kernels.primitives import LINE, VALUES, WINDOWS, add_line, copy_line, inner, load, outer, store

AHEAD = 16

{rule}


@inner
def total(sources, start, stop, dim, sums):
    """Address of the sum, in order, of float32[dim] at sources[start:stop]: `sums`, or the only one."""
    if stop - start == 1:
        return sources[start]
    lines = dim - dim % LINE
    for j in range(0, lines, LINE):
        copy_line(sums, sources[start], j)
    for j in range(lines, dim):
        store(sums, j, load(sources[start], j, WINDOWS), WINDOWS)
    for k in range(start + 1, stop):
        for j in range(0, lines, LINE):
            add_line(sums, sources[k], j)
        for j in range(lines, dim):
            store(sums, j, load(sums, j, WINDOWS) + load(sources[k], j, WINDOWS), WINDOWS)
    return sums


@inlined
def ask_for(row, addresses, shift, size):
{prefetches}


@inlined
def update(row, line, gradient, scale, addresses, shift, dim, size, scalars):
{unpack}
{loop}


@outer(
    "void(int32[::1], int64[::1], int64[::1], float64, int64[:, ::1], int64, int64, float32[:, ::1], "
    "int32[::1])"
)
def apply(rows, sources, bounds, divisor, addresses, shift, dim, scalars, lines):
    scale = float32(divisor)
    size = 4 * dim
    memory = np.empty(dim, np.float32)
    sums = np.int64(memory.ctypes.data)  # unsigned, it would make every address a float64
    if len(bounds) == 0:
        for i in range(len(rows)):
            if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
                ask_for(np.int64(rows[i + AHEAD]), addresses, shift, size)
            if rows[i] >= 0:
                line = np.int64(lines[i]) if len(lines) > 0 else 0
                gradient = sources[0] + i * size
                update(np.int64(rows[i]), line, gradient, scale, addresses, shift, dim, size, scalars)
    else:
        for i in range(len(rows)):
            if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
                ask_for(np.int64(rows[i + AHEAD]), addresses, shift, size)
                for k in range(bounds[i + AHEAD], bounds[i + AHEAD + 1]):
                    for far in range(0, size, 4 * LINE):
                        prefetch(sources[k] + far)
            if rows[i] >= 0:
                line = np.int64(lines[i]) if len(lines) > 0 else 0
                gradient = total(sources, bounds[i], bounds[i + 1], dim, sums)
                update(np.int64(rows[i]), line, gradient, scale, addresses, shift, dim, size, scalars)
'''

EACH = """\
    for j in range(dim):
        {targets} = {name}({arguments})
{writes}
"""

SQUARE = """\
@inner
def square(gradient, j, scale):
    g = load(gradient, j, WINDOWS) / scale
    return g * g


"""

ROWWISE = """\
    a, b, c, d = float32(0), float32(0), float32(0), float32(0)
    for j in range(0, dim - 3, 4):
        a += square(gradient, j, scale)
        b += square(gradient, j + 1, scale)
        c += square(gradient, j + 2, scale)
        d += square(gradient, j + 3, scale)
    for j in range(dim // 4 * 4, dim):
        a += square(gradient, j, scale)
    squares = load(place1, 0, 2) + ((a + b) + (c + d)) / float32(dim)
    store(place1, 0, squares, 2)
    for j in range(dim):
        store(place0, j, {name}({arguments}), VALUES)
"""


def row_source(rule: Rule) -> str:
    """The module text whose `apply` is the row pass of `rule`.

    Raises:
        ConfigurationError: its function is not one that a rule may have.
    """
    function, states, scalars = rule.function(), len(rule.states()), len(rule.scalars(0, 1))
    places = range(1 + states)
    sizes = ["size", *(["4"] if rule.rows_only else ["size"] * states)]
    passed = ["squares"] if rule.rows_only else [f"load(place{k}, j, {1 + k})" for k in places[1:]]
    arguments = ["load(place0, j, VALUES)", "load(gradient, j, WINDOWS) / scale", *passed]
    targets = [f"new{k}" for k in places]
    writes = ["store(place0, j, new0, VALUES)", *(f"store(place{k}, j, new{k}, {1 + k})" for k in places[1:])]
    loop = (ROWWISE if rule.rows_only else EACH).format(
        name=generated_name(function),
        arguments=", ".join([*arguments, *(f"scalar{k}" for k in range(scalars))]),
        targets=", ".join(targets),
        writes="\n".join(" " * 8 + write for write in writes),
    )
    prefetches = [
        f"    address = place_of(row, addresses[{k}], shift, {size})\n"
        f"    for far in range(0, {size}, 4 * LINE):\n"
        f"        prefetch(address + far)"
        for k, size in zip(places, sizes, strict=True)
    ]
    unpack = [
        f"    place{k} = place_of(row, addresses[{k}], shift, {size})"
        for k, size in zip(places, sizes, strict=True)
    ]
    unpack += [f"    scalar{k} = scalars[line, {k}]" for k in range(scalars)]
    shape = (0, 1 + scalars) if rule.rows_only else (states, scalars)
    definitions = (SQUARE if rule.rows_only else "") + float32_source(function, *shape)
    return TEMPLATE.format(
        rule=definitions,
        prefetches="\n".join(prefetches),
        unpack="\n".join(unpack),
        loop=loop.rstrip(),
    )


_compiled: dict[tuple[object, int, int], Callable[..., None]] = {}


def row_rule(rule: Rule) -> Callable[..., None]:
    """The compiled row pass of `rule`; blocks while it is compiled the first time.

    It takes rows int32[n]; `sources` and `bounds`; the divisor; the addresses of the slabs (values, then
    states), their shift; dim; scalars float32[m, k] and, unless m is 1, which of the m each row takes,
    int32[n]. The gradient of row i is the sum, in order, of those at the addresses
    sources[bounds[i] : bounds[i + 1]], of which there is at least one; or, where `bounds` is empty, stands at
    place i of float32[n, dim] at sources[0].
    """
    key = rule.function(), len(rule.states()), len(rule.scalars(0, 1))
    if key not in _compiled:
        _compiled[key] = load(row_source(rule)).apply
    return _compiled[key]


def gather(rows: Rows, slabs: Slabs, width: int, out: NDArray[Any], slab: int = 0) -> None:
    """Copy rows of a slab to `out` (4 bytes [n, width]); where a row is −1, `out` stays as it was."""
    compiled().gather(rows, slabs.addresses[slab], slabs.shift, width, out.ctypes.data)


def scatter(rows: Rows, slabs: Slabs, width: int, source: NDArray[Any], slab: int = 0) -> None:
    """Copy `source` (4 bytes [n, width], contiguous) to rows of a slab, each of which appears once."""
    compiled().scatter(rows, slabs.addresses[slab], slabs.shift, width, source.ctypes.data)


def spread(inverse: Ids, rows: Array, out: Array) -> None:
    """Copy rows[inverse[i]] to out[i]; float32[u, dim] and float32[n, dim], both contiguous."""
    compiled().spread(inverse, rows.ctypes.data, rows.shape[1], out.ctypes.data)


def combine(parts: Iterable[tuple[Ids, Array]], sums: Array) -> None:
    """Set row k of `sums` to the sum of all gradients[i] with inverse[i] = k, in order of parts and of i.

    `parts`: inverse, int64[n], and gradients, float32[n, dim], contiguous. `sums`: float32[u, dim],
    contiguous; each row is that of some inverse[i].

    A wide row is copied the first time. Narrow ones begin as −0.0, to which x is added without changing a bit
    of it: the branch costs more, since it is often mispredicted.
    """
    narrow = sums.shape[1] < _NARROW
    if narrow:
        sums.fill(-0.0)
    seen = np.full(len(sums), narrow, dtype=np.uint8)
    for inverse, gradients in parts:
        compiled().combine(inverse, gradients.ctypes.data, sums.shape[1], sums.ctypes.data, seen)


def begin(ids: Ids, places: Ids, dim: int, initializer: Initializer, seed: int) -> None:
    """Write the initial row of each id, `dim` float32, at each address of `places`."""
    compiled().initial(ids, places, dim, seed, *initializer.distribution())


def fill(places: Ids, width: int, value: float) -> None:
    """Write `width` float32 of `value` at each address of `places`."""
    compiled().fill(places, width, value)


def stamp(rows: Rows, slabs: Slabs, slab: int, now: int) -> None:
    """Set the rows' int32 in `slab` to `now`, modulo 2³²."""
    compiled().stamp(rows, slabs.addresses[slab], slabs.shift, np.uint32(now & 0xFFFFFFFF).astype(np.int32))


def ages(rows: Rows, slabs: Slabs, slab: int, now: int) -> NDArray[np.uint32]:
    """uint32[n]: `now` minus what `stamp` set, modulo 2³²; 0 for rows of −1."""
    out = np.empty(len(rows), dtype=np.uint32)
    compiled().ages(rows, slabs.addresses[slab], slabs.shift, np.uint32(now & 0xFFFFFFFF), out)
    return out


def oldest(ids: Ids, ages: NDArray[np.uint32], bounds: Ids, kept: int) -> Ids:
    """All but `kept` of each run ids[bounds[i] : bounds[i + 1]]: the oldest; of one age, the smallest."""
    out = np.empty(len(ids), dtype=np.int64)
    count = compiled().oldest(ids, ages, bounds, kept, out)
    return out[:count]


@functools.cache
def compiled() -> ModuleType:
    """The loops; blocks while they are compiled."""
    return load(Path(__file__).with_name("row_loops.py").read_text())
