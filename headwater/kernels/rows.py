"""Passes over a table's rows: read, sum repeats, begin, apply a rule.

Invariants:
- The rule's scalar function is the same source as in the dense pass (`headwater.kernels.source`).
- Arrays named here are C-contiguous and stay the caller's.
- One compilation a rule, whatever the dim, the number of chunks and of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from headwater.initializers import Initializer
from headwater.kernels.cache import load
from headwater.kernels.slabs import Slabs
from headwater.kernels.source import float32_source, generated_name
from headwater.rules import Rule

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
Rows = NDArray[np.int32]

TEMPLATE = '''"""Row loop of a rule."""
import math

import numpy as np
from numba import float32
from headwater.kernels.memory import place_of, prefetch
from headwater.kernels.primitives import VALUES, WINDOWS, inner, load, outer, store

AHEAD = 16
LINE = 64

{rule}


@outer("void(int32[::1], int64, float64, int64[:, ::1], int64, int64, float32[:, ::1], int32[::1])")
def apply(rows, gradients, divisor, addresses, shift, dim, scalars, lines):
    scale = float32(divisor)
    size = 4 * dim
    for i in range(len(rows)):
        if i + AHEAD < len(rows) and rows[i + AHEAD] >= 0:
            ahead = np.int64(rows[i + AHEAD])
{prefetches}
        if rows[i] < 0:
            continue
        line = np.int64(lines[i]) if len(lines) > 0 else 0
        row = np.int64(rows[i])
        gradient = gradients + i * size
{unpack}
{loop}
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
        writes="\n".join(" " * 12 + write for write in writes),
    )
    prefetches = [
        f"            address = place_of(ahead, addresses[{k}], shift, {size})\n"
        f"            for far in range(0, {size}, LINE):\n"
        f"                prefetch(address + far)"
        for k, size in zip(places, sizes, strict=True)
    ]
    unpack = [
        f"        place{k} = place_of(row, addresses[{k}], shift, {size})"
        for k, size in zip(places, sizes, strict=True)
    ]
    unpack += [f"        scalar{k} = scalars[line, {k}]" for k in range(scalars)]
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

    It takes rows int32[n], the address of float32[n, dim] gradients, their divisor, the addresses of the
    slabs (values, then states), their shift, dim, scalars float32[m, k] and, unless m is 1, which of the m
    each row takes, int32[n].
    """
    key = rule.function(), len(rule.states()), len(rule.scalars(0, 1))
    if key not in _compiled:
        _compiled[key] = load(row_source(rule)).apply
    return _compiled[key]


def gather(rows: Rows, slabs: Slabs, dim: int, out: Array) -> None:
    """Copy rows of slab 0 to `out` (float32[n, dim]); where a row is −1, `out` stays as it was."""
    _loops().gather(rows, slabs.addresses[0], slabs.shift, dim, out.ctypes.data)


def combine(inverse: Ids, gradients: Array, sums: Array, seen: NDArray[np.uint8]) -> None:
    """Add gradients[i] to sums[inverse[i]] in order of i; the first for a sum that is not `seen` sets it.

    `gradients`: float32[n, dim]; `sums`: float32[u, dim]; `seen`: uint8[u], updated.
    """
    _loops().combine(inverse, gradients.ctypes.data, sums.shape[1], sums.ctypes.data, seen)


def begin(ids: Ids, places: Ids, dim: int, initializer: Initializer, seed: int) -> None:
    """Write the initial row of each id, `dim` float32, at each address of `places`."""
    _loops().initial(ids, places, dim, seed, *initializer.distribution())


def fill(places: Ids, width: int, value: float) -> None:
    """Write `width` float32 of `value` at each address of `places`."""
    _loops().fill(places, width, value)


def stamp(rows: Rows, slabs: Slabs, slab: int, now: int) -> None:
    """Set the rows' int32 in `slab` to `now`, modulo 2³²."""
    _loops().stamp(rows, slabs.addresses[slab], slabs.shift, np.uint32(now & 0xFFFFFFFF).astype(np.int32))


def ages(rows: Rows, slabs: Slabs, slab: int, now: int) -> NDArray[np.uint32]:
    """uint32[n]: `now` minus what `stamp` set, modulo 2³²; 0 for rows of −1."""
    out = np.empty(len(rows), dtype=np.uint32)
    _loops().ages(rows, slabs.addresses[slab], slabs.shift, np.uint32(now & 0xFFFFFFFF), out)
    return out


@functools.cache
def _loops() -> ModuleType:
    return load(Path(__file__).with_name("row_loops.py").read_text())
