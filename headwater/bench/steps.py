"""What a worker waits for in a step and in a pull, with one server and with two: small models, many tables.

Each case is one worker alone, in asynchronous mode, so that it waits for messages and for nobody else.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

from headwater.bench.figures import Effort, Figure, complain
from headwater.cluster import Cluster
from headwater.spec.initializers import Normal
from headwater.spec.rules import SGD, Adagrad
from headwater.worker import Worker
from headwater.worker.table import Table

_ELEMENTS, _TENSORS = 256, 5_000
_TABLES, _IDS, _DIM = 26, 100, 16
_ALLOWED: dict[tuple[str, int], float] = {
    ("pull of 1 KB", 1): 40.0,
    ("pull of 1 KB", 2): 120.0,
    ("step of a 1 KB model", 1): 150.0,
    ("step of a 1 KB model", 2): 350.0,
    ("step that pushes 5,000 tensors", 1): 6_000.0,
    ("step of 26 tables, 100 ids each", 1): 1_500.0,
    ("the same, rows with the step before", 1): 1_500.0,
}
"""Microseconds that a case may take on a quiet machine, by its servers."""


def measure_steps(effort: Effort) -> list[Figure]:
    """Medians in microseconds, for one server and for two, against what is allowed where that was set."""
    figures = []
    for servers in (1, 2):
        with Cluster(workers=1, servers=servers, sync="async", engine="local", output=complain) as cluster:
            cluster.start_worker(0, functools.partial(_train, effort))
            while (outcome := cluster.next_outcome(1.0)) is None:
                pass
        if outcome.failure is not None:
            raise outcome.as_error()
        for case, times in outcome.value.items():
            figures.append(_figure(case, servers, median(times)))
    return figures


def _figure(case: str, servers: int, microseconds: float) -> Figure:
    shown = f"{case}, {servers} server{'s' if servers > 1 else ''}"
    allowed = _ALLOWED.get((case, servers))
    if allowed is None:
        return Figure(shown, microseconds, "µs", "–", microseconds, 1.0)
    return Figure(shown, microseconds, "µs", "what is allowed", allowed, microseconds / allowed, 1.0)


# ── in the worker ───────────────────────────────────────────────────────────────────────────────


def _train(effort: Effort, worker: Worker) -> dict[str, list[float]]:
    """Microseconds of each call, by case."""
    small = worker.model("small", {"w": np.zeros(_ELEMENTS, np.float32)}, SGD(lr=0.1))
    many = {f"w{i}": np.zeros(64, np.float32) for i in range(_TENSORS)}
    large = worker.model("many", many, SGD(lr=0.1))
    tables = [
        worker.table(f"table {i}", _DIM, Adagrad(lr=0.1), initializer=Normal(std=0.1)) for i in range(_TABLES)
    ]
    gradient = {"w": np.ones(_ELEMENTS, np.float32)}

    def pull() -> None:
        small.local.changed_here()  # or the server would find nothing new to write
        small.pull()

    def step() -> None:
        small.push(gradient)
        worker.step(read=[small])

    def push_many() -> None:
        large.push(many)
        worker.step(read=[large])

    cases: dict[str, Callable[[], object]] = {
        "pull of 1 KB": pull,
        "step of a 1 KB model": step,
        "step that pushes 5,000 tensors": push_many,
        "step of 26 tables, 100 ids each": _of_tables(worker, tables, ahead=False),
        "the same, rows with the step before": _of_tables(worker, tables, ahead=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(effort.repeats + 1):
        for name, case in cases.items():
            for _ in range(effort.rounds):
                began = time.perf_counter_ns()
                case()
                if turn:
                    times[name].append((time.perf_counter_ns() - began) / 1000)
    return times


def _of_tables(worker: Worker, tables: list[Table], *, ahead: bool) -> Callable[[], None]:
    """A step of all tables. `ahead`: its rows came with the one before."""
    random = np.random.default_rng(5)
    batches: list[list[NDArray[np.int64]]] = [
        [random.integers(0, 10_000, _IDS) for _ in tables] for _ in range(8)
    ]
    turns = 0

    def step() -> None:
        nonlocal turns
        now, following = batches[turns % 8], batches[(turns + 1) % 8]
        turns += 1
        rows = worker.pull(dict(zip(tables, now, strict=True)))
        for table, ids, after in zip(tables, now, following, strict=True):
            table.push(ids, rows[table])
            if ahead:
                table.prefetch(after)
        worker.step(read=False)

    return step
