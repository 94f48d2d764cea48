"""Vectors on the servers against the machine's read bandwidth, and what a worker that stands still costs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.bench.figures import Effort, Figure
from headwater.bench.turns import take_turns
from headwater.kernels import finite
from headwater.kernels.combinations import DOT, BlockSum, Combination, combine
from headwater.machines.lbfgs import LBFGS
from headwater.minimization import minimize

_ELEMENTS = 8 << 20
"""Of each vector: 32 MiB, so that two of them fit no cache."""
_HISTORY = 10
_WORKERS, _PORTIONS, _PORTION_S, _STILL_S = 4, 33, 0.03, 2.0


def measure_programs(effort: Effort) -> list[Figure]:
    """Inner products and a combination of L-BFGS with a history of 10; an evaluation with a straggler."""
    return [*_measure_vectors(effort), _measure_straggler()]


def _measure_vectors(effort: Effort) -> list[Figure]:
    vectors = [np.full(_ELEMENTS, 0.5, dtype=np.float32) for _ in range(2 * _HISTORY + 1)]
    gradient, out = vectors[0], np.zeros(_ELEMENTS, dtype=np.float32)
    dots = [BlockSum(DOT, gradient, vector) for vector in vectors]
    direction = [Combination(out, vectors, [0.1] * len(vectors))]
    cases: dict[str, Callable[[], object]] = {
        "one dot": lambda: combine(_ELEMENTS, (), [BlockSum(DOT, gradient, vectors[1])]),
        f"{len(dots)} dots": lambda: combine(_ELEMENTS, (), dots),
        f"combine {len(vectors)}": lambda: combine(_ELEMENTS, direction, ()),
    }
    moved = {name: 4 * _ELEMENTS * count for name, count in zip(cases, (2, 21, 22), strict=True)}
    cases["read"] = lambda: [finite(vector) for vector in vectors]
    moved["read"] = 4 * _ELEMENTS * len(vectors)
    times = take_turns(cases, repeats=effort.repeats, rounds=max(1, effort.rounds // 4))
    speed = {name: moved[name] / median(seconds) / 1e9 for name, seconds in times.items()}
    limit = speed.pop("read")
    return [
        Figure(name, figure, "GB/s", "one pass that reads", limit, figure / limit, 0.8, False)
        for name, figure in speed.items()
    ]


def _measure_straggler() -> Figure:
    """Seconds of an evaluation in which one of four workers takes a portion and does nothing for long.

    The limit is what the others need for all portions but that one, and then for its copy.
    """
    lock, calls = threading.Lock(), 0
    first: dict[bytes, float] = {}

    def loss(params: dict[str, NDArray[Any]], samples: NDArray[Any]) -> tuple[float, dict[str, Any]]:
        nonlocal calls
        with lock:
            calls += 1
            straggles = calls == _PORTIONS + 1  # the first portion of the second evaluation
            first.setdefault(params["x"].tobytes(), time.monotonic())
        time.sleep(_STILL_S if straggles else _PORTION_S)
        away = params["x"].astype(np.float64) - samples.mean()
        return float(away @ away), {"x": 2 * away}

    minimize(
        loss,
        {"x": np.full(8, 3.0, np.float32)},
        data=np.linspace(-1, 1, _PORTIONS * 4),
        portions=_PORTIONS,
        workers=_WORKERS,
        servers=1,
        engine="inline",
        method=LBFGS(max_iter=3, max_eval=4, tolerance_change=0.0),
    )
    begun = sorted(first.values())
    took = begun[2] - begun[1]
    others = _PORTION_S * (math.ceil((_PORTIONS - 1) / (_WORKERS - 1)) + 1)
    return Figure(
        "a worker stands still", took, "s", "the others, one portion more", others, took / others, 1.3
    )
