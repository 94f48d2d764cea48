"""One worker that computes five times as long as the other: how long an epoch takes, beside the ideal.

The ideal is what both would need if each worked at its own pace until the end. The paces are those of
the asynchronous run with dynamic splits: from a batch to the end of its step, which waits for nobody.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure, complain
from headwater.driver import run
from headwater.spec.rules import SGD
from headwater.worker import Worker
from headwater.worker.model import Model
from headwater.worker.plan import SplitKind

_SLOWER = 5
_BATCHES = 24
"""Batches of an epoch for each round of the effort."""

_ELEMENTS = 100_000
_SINES = 8
"""A fast batch computes that many sines of that many values: some milliseconds."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What a worker saw of one. `began`, `ended`: monotonic; `working`: with a batch. All in seconds."""

    began: float
    ended: float
    batches: int
    working: float


def measure_splits(effort: Effort) -> list[Figure]:
    """Milliseconds an epoch: dynamic splits and static parts in turns, and synchronous rounds."""
    dynamic, static = _measure(effort, "async", "dynamic", "static")
    (synchronous,) = _measure(effort, "sync", "static")
    ideals = [
        sum(one.batches for one in epoch) / sum(one.batches / one.working for one in epoch)
        for epoch in dynamic
    ]
    limit, ideal = f"both at their own pace, one {_SLOWER} × slower", median(ideals)
    return [
        Figure(
            f"epoch, {case}",
            1000 * _seconds(epochs),
            "ms",
            limit,
            1000 * ideal,
            _seconds(epochs) / ideal,
            target,
        )
        for case, epochs, target in (
            ("asynchronous, dynamic splits", dynamic, 1.15),
            ("asynchronous, static parts", static, None),
            ("synchronous", synchronous, None),
        )
    ]


def _seconds(epochs: list[tuple[_Epoch, ...]]) -> float:
    """The median epoch, from the first worker's begin to the last one's end."""
    return median(max(one.ended for one in epoch) - min(one.began for one in epoch) for epoch in epochs)


def _measure(effort: Effort, sync: str, *cases: SplitKind) -> list[list[tuple[_Epoch, ...]]]:
    """For each case, what both workers saw of each epoch."""
    train = functools.partial(_train, effort.repeats, effort.rounds * _BATCHES, cases)
    values: list[list[list[_Epoch]]] = run(train, workers=2, sync=sync, output=complain).values
    return [list(zip(*workers, strict=True)) for workers in zip(*values, strict=True)]


# ── in a worker ─────────────────────────────────────────────────────────────────────────────────


def _train(repeats: int, batches: int, cases: tuple[SplitKind, ...], worker: Worker) -> list[list[_Epoch]]:
    model = worker.model("w", {"w": np.zeros(1000, np.float32)}, SGD(lr=0.1))
    seen: list[list[_Epoch]] = [[] for _ in cases]
    for _ in range(repeats):
        for splits, epochs in zip(cases, seen, strict=True):
            worker.barrier()
            epochs.append(_read(worker, model, batches, splits))
    return seen


def _read(worker: Worker, model: Model, batches: int, splits: SplitKind) -> _Epoch:
    gradient = {"w": np.ones(1000, np.float32)}
    began, working, count = time.monotonic(), 0.0, 0
    for _ in worker.batches(np.arange(batches), 1, splits=splits):
        started = time.monotonic()
        _compute(_SLOWER if worker.rank == 1 else 1)
        model.push(gradient)
        worker.step()
        working, count = working + time.monotonic() - started, count + 1
    return _Epoch(began, time.monotonic(), count, working)


def _compute(times: int) -> None:
    """Work, not sleep, so that it competes for the cores as training does."""
    values = np.linspace(0, 1, _ELEMENTS, dtype=np.float64)
    for _ in range(_SINES * times):
        np.sin(values, out=values)
