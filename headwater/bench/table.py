"""Tables in one process: lookup, gather, the rule of rows, all together, and growth."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from headwater.bench.compiled import compiled_adagrad
from headwater.bench.figures import Effort, Figure, complain
from headwater.bench.ids import (
    DRAWS,
    ROWS,
    UNIQUE,
    Ids,
    forever,
    known_ids,
    uniform_batches,
    zipf_batches,
    zipf_draws,
)
from headwater.bench.turns import take_turns
from headwater.kernels.arrange import arrange
from headwater.kernels.index import Index
from headwater.kernels.rows import gather, row_rule
from headwater.kernels.slabs import Slabs
from headwater.messages import TableSpec
from headwater.shard.table import Table
from headwater.spec.initializers import Normal
from headwater.spec.placement import SLOTS
from headwater.spec.rules import Adagrad

Array = NDArray[np.float32]
Cases = dict[str, Callable[[], object]]

_BATCHES = 20
_RULE = Adagrad(lr=0.01)
_GROWN = 5_000_000


def measure_lookup(effort: Effort) -> list[Figure]:
    """Ids a second found in 2 M rows by one thread, and put in order by a worker."""
    ids = known_ids()
    index = Index(range(SLOTS))
    for start in range(0, ROWS, UNIQUE):
        index.claim(ids[start : start + UNIQUE])
    return [
        _lookup("uniform", index, uniform_batches(ids, _BATCHES), effort),
        _lookup("zipf", index, zipf_batches(ids, _BATCHES), effort),
        _arrange(ids, effort),
    ]


def measure_table(effort: Effort) -> list[Figure]:
    """Rows a second by one thread in 2 M rows of dim 16 and 64, and growth to 5 M rows."""
    ids = known_ids()
    shapes = {"uniform": uniform_batches(ids, _BATCHES), "zipf": zipf_batches(ids, _BATCHES)}
    figures = []
    for dim in (16, 64):
        for name, batches in shapes.items():
            figures += _row_passes(name, dim, batches, effort)
        figures.append(_whole(dim, ids, shapes["zipf"], effort))
    return figures + [figure for dim in (16, 64) for figure in _growth(dim)]


def _in_turn(action: Callable[[int], object], batches: list[Ids]) -> Callable[[], object]:
    turn = forever(len(batches))
    return lambda: action(next(turn))


def _rates(cases: Cases, effort: Effort, count: int) -> dict[str, float]:
    """Millions a second of each case, which does `count` at a time."""
    times = take_turns(cases, repeats=effort.repeats, rounds=_BATCHES)
    return {name: count / median(seconds) / 1e6 for name, seconds in times.items()}


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────


def _lookup(name: str, index: Index, batches: list[Ids], effort: Effort) -> Figure:
    """Against as many reads of 8 bytes at random places of 64 MB, which is what an index of 2 M takes."""
    memory, out = np.ones(1 << 23, dtype=np.int64), np.empty(UNIQUE * 2, dtype=np.int64)
    places = [np.random.default_rng(k).integers(0, len(memory), len(b)) for k, b in enumerate(batches)]
    cases: Cases = {
        "lookup": _in_turn(lambda k: index.find(batches[k]), batches),
        "read": _in_turn(
            lambda k: np.take(memory, places[k], mode="clip", out=out[: len(places[k])]), batches
        ),
    }
    rates = _rates(cases, effort, sum(map(len, batches)) // len(batches))
    ratio = rates["lookup"] / rates["read"]
    return Figure(f"lookup, {name}", rates["lookup"], "M ids/s", "random reads", rates["read"], ratio)


def _arrange(ids: Ids, effort: Effort) -> Figure:
    """Against NumPy's own way to ids without repeats and how they map."""
    batches = zipf_draws(ids, _BATCHES)
    cases: Cases = {
        "arrange": _in_turn(lambda k: arrange(batches[k], 2), batches),
        "unique": _in_turn(lambda k: np.unique(batches[k], return_inverse=True), batches),
    }
    rates = _rates(cases, effort, DRAWS)
    ratio = rates["arrange"] / rates["unique"]
    return Figure("arrange, zipf draws", rates["arrange"], "M ids/s", "np.unique", rates["unique"], ratio)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


def _row_passes(name: str, dim: int, batches: list[Ids], effort: Effort) -> list[Figure]:
    """Gather and Adagrad over rows that are found already, against np.take and the loop of a C compiler."""
    slabs, places = Slabs([4 * dim, 4 * dim]), _places(batches)
    slabs.reserve(ROWS)
    flat = [_aligned(ROWS, dim) for _ in range(2)]
    _touch(slabs, dim)
    longest = max(map(len, places))
    gradients, out = np.ones((longest, dim), dtype=np.float32), np.empty((longest, dim), dtype=np.float32)
    lines, none = np.array([_RULE.scalars(0, 1)], dtype=np.float32), np.empty(0, dtype=np.int32)
    wide, kernel = [rows.astype(np.int64) for rows in places], row_rule(_RULE)
    beside = _beside(gradients)
    cases: Cases = {
        "gather": _in_turn(lambda k: gather(places[k], slabs, dim, out), batches),
        "take": _in_turn(
            lambda k: np.take(flat[0], wide[k], axis=0, mode="clip", out=out[: len(wide[k])]), batches
        ),
        "adagrad": _in_turn(
            lambda k: kernel(places[k], *beside, 1.0, slabs.addresses, slabs.shift, dim, lines, none), batches
        ),
    }
    compiled = compiled_adagrad(dim)
    if compiled is None:
        complain("no gcc here: Adagrad of rows is measured without its limit")
    else:
        cases["compiled"] = _in_turn(
            lambda k: compiled(places[k], gradients, flat[0], flat[1], 0.01, 1e-10), batches
        )
    rates = _rates(cases, effort, sum(map(len, places)) // len(places))
    shown = f"dim {dim}, {name}"
    ratio = rates["gather"] / rates["take"]
    figures = [
        Figure(f"gather, {shown}", rates["gather"], "M rows/s", "np.take", rates["take"], ratio, 0.8, False)
    ]
    if "compiled" in rates:
        ratio, limit = rates["adagrad"] / rates["compiled"], rates["compiled"]
        case = f"Adagrad, {shown}"
        figures.append(Figure(case, rates["adagrad"], "M rows/s", "C, prefetched", limit, ratio, 0.7, False))
    return figures


def _aligned(rows: int, dim: int) -> Array:
    """float32[rows, dim], all written, that starts a cache line as slabs do."""
    room = np.full(rows * dim + 16, 0.5, dtype=np.float32)
    start = -room.ctypes.data // 4 % 16
    return room[start : start + rows * dim].reshape(rows, dim)


def _places(batches: list[Ids]) -> list[NDArray[np.int32]]:
    """Each batch's rows, as a table that saw the ids in random order would have numbered them."""
    index = Index(range(SLOTS))
    ids = np.random.default_rng(3).permutation(known_ids())
    for start in range(0, ROWS, UNIQUE):
        index.claim(ids[start : start + UNIQUE])
    return [index.find(batch)[0] for batch in batches]


def _beside(gradients: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a row pass takes for gradients that lie one after the other."""
    return np.array([gradients.ctypes.data]), np.empty(0, dtype=np.int64)


def _touch(slabs: Slabs, dim: int) -> None:
    """Write every row: reads of memory that was never written would all find one page of zeros."""
    ones = np.ones((UNIQUE, dim), dtype=np.float32)
    lines, none = np.array([_RULE.scalars(0, 1)], dtype=np.float32), np.empty(0, dtype=np.int32)
    for start in range(0, ROWS, UNIQUE):
        rows = np.arange(start, min(start + UNIQUE, ROWS), dtype=np.int32)
        row_rule(_RULE)(rows, *_beside(ones), 1.0, slabs.addresses, slabs.shift, dim, lines, none)


def _table(dim: int) -> Table:
    spec = TableSpec("bench", dim, _RULE.to_spec(), Normal(std=0.01).to_spec(), 0, None, None)
    return Table(spec, range(SLOTS))


def _whole(dim: int, ids: Ids, batches: list[Ids], effort: Effort) -> Figure:
    """A table's pull and apply of one batch, against its loops alone; both count rows twice."""
    table = _table(dim)
    ones = np.ones((max(map(len, [*batches, ids[:UNIQUE]])), dim), dtype=np.float32)
    for start in range(0, ROWS, UNIQUE):
        part = ids[start : start + UNIQUE]
        table.apply([(part, ones[: len(part)])], 1.0, 1, 0)
    out = np.empty_like(ones)
    index, slabs = table._index, table._slabs
    lines, none = np.array([_RULE.scalars(0, 1)], dtype=np.float32), np.empty(0, dtype=np.int32)

    def turn(k: int) -> None:
        ids = batches[k]
        table.pull(ids, out[: len(ids)], 1)
        table.apply([(ids, ones[: len(ids)])], 1.0, 1, 0)

    def loops(k: int) -> None:
        rows, _ = index.find(batches[k])
        gather(rows, slabs, dim, out)
        rows, _ = index.find(batches[k])
        row_rule(_RULE)(rows, *_beside(ones), 1.0, slabs.addresses, slabs.shift, dim, lines, none)

    cases: Cases = {"turn": _in_turn(turn, batches), "loops": _in_turn(loops, batches)}
    rates = _rates(cases, effort, 2 * sum(map(len, batches)) // len(batches))
    ratio = rates["turn"] / rates["loops"]
    return Figure(f"pull and apply, dim {dim}", rates["turn"], "M rows/s", "its loops", rates["loops"], ratio)


# ── growth ──────────────────────────────────────────────────────────────────────────────────────


def _growth(dim: int) -> list[Figure]:
    """The longest push, and resident bytes a row, while a table grows from nothing to 5 M rows.

    Between pushes the table prepares memory, as a server's does when nobody waits for it. It grows twice, and
    the first time is shown without a target: a virtual machine's host backs memory at its first use, which
    costs milliseconds a MB that are not the table's.
    """
    ids = np.random.default_rng(4).integers(-(2**63), 2**63 - 1, _GROWN)
    first, row = _grow(dim, ids)
    longest, _ = _grow(dim, ids)
    allowed = 8.0 * dim + 36
    shown = f"dim {dim}, 0 to 5 M rows"
    return [
        Figure(f"longest push, {shown}, memory new", first, "ms", "what is allowed", 20.0, first / 20.0),
        Figure(f"longest push, {shown}", longest, "ms", "what is allowed", 20.0, longest / 20.0, 1.0),
        Figure(f"resident, {shown}", row, "bytes/row", "state and 36", allowed, row / allowed, 1.0),
    ]


def _grow(dim: int, ids: Ids) -> tuple[float, float]:
    """Milliseconds of the longest push, and bytes a row at the end."""
    ones = np.ones((UNIQUE, dim), dtype=np.float32)
    before, longest, table = _resident(), 0.0, _table(dim)
    push = functools.partial(table.apply, divisor=1.0, step=1, updates_of_schedule=0)
    for start in range(0, len(ids), UNIQUE):
        part = ids[start : start + UNIQUE]
        began = time.perf_counter()
        push([(part, ones[: len(part)])])
        longest = max(longest, (time.perf_counter() - began) * 1e3)
        table.prepare()
    return longest, (_resident() - before) / len(table)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
