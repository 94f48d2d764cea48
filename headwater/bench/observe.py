"""What it costs to be seen: CPU time that the frontier, scrapes and a trace add to a step.

One worker and one server in this process, so that all that any thread does counts: the worker, the server,
the coordinator, the one that answers scrapes and the one that writes the trace. Steps that compute nothing
are made in short turns, bare (with a clock of stages that reads nothing) and observed; what is added is the
median of the differences between neighbours. It is the same for a step that trains, where it would drown in
the noise of the computing, and is held against a share of such a step.
"""

from __future__ import annotations

import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure
from headwater.cluster import Cluster
from headwater.errors import StalledError
from headwater.observe.tracer import Tracer
from headwater.runtime.stage_clock import StageClock
from headwater.spec.rules import SGD
from headwater.worker import Worker

_TURN_S = 0.1
_TURNS = 10
"""Turns of each case for each repeat of the effort."""
_STEP_US = 5000.0
_SHARES = {"frontier": 0.01, "frontier, scraped each second": 0.01, "traced": 0.02}
"""What may be added to a step of `_STEP_US` microseconds."""
_PATIENCE_S = 10.0


class _Silent(StageClock):
    """Reads no clock and counts nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda: 0)

    def begin(self, waiting: float) -> None:
        pass

    def read(self, began: int, waited: float) -> None:
        pass

    def pushed(self, began: int) -> None:
        pass

    def step(self) -> None:
        pass

    def end(self, key: int, before: float, waiting: float) -> None:
        pass


def measure_observe(effort: Effort) -> list[Figure]:
    """Microseconds of CPU added to a step, beside the share of a step of 5 ms that they may be."""
    times = _measure(_TURNS * effort.repeats, _TURN_S if effort.repeats > 1 else _TURN_S / 5)
    bare = times.pop("bare")
    figures = []
    for case, found in times.items():
        added = max(0.0, median(one - beside for one, beside in zip(found, bare, strict=True)))
        limit, name = _SHARES[case] * _STEP_US, f"{_SHARES[case]:.0%} of a step of {_STEP_US / 1000:g} ms"
        figures.append(Figure(f"{case}: added to a step", added, "µs", name, limit, added / limit, 1.0))
    return figures


def _measure(turns: int, seconds: float) -> dict[str, list[float]]:
    """CPU time of a step by case, in microseconds."""
    with Cluster(workers=1, metrics="127.0.0.1:0") as cluster, cluster.worker() as worker:
        model = worker.model("m", {"x": np.zeros(256, np.float32)}, SGD(lr=0.1))
        gradient = {"x": np.ones(256, np.float32)}

        def steps() -> float:
            """CPU microseconds of one, over a turn."""
            count, until, began = 0, time.monotonic() + seconds, time.process_time()
            while time.monotonic() < until:
                model.push(gradient)
                worker.step()
                count += 1
            return 1e6 * (time.process_time() - began) / count

        steps()
        times: dict[str, list[float]] = {case: [] for case in ("bare", *_SHARES)}
        for _ in range(turns):
            times["bare"].append(_unobserved(worker, steps))
            times["frontier"].append(steps())
            scraped = times["frontier"][-1] + _STEP_US * _scrape(cluster.metrics_url or "")
            times["frontier, scraped each second"].append(scraped)
        times["traced"] = _traced(cluster.address, worker, lambda: [steps() for _ in range(turns)])
        return times


def _unobserved(worker: Worker, steps: Callable[[], float]) -> float:
    session, clock = worker._session, worker.stages
    session.stages = worker.stages = _Silent()
    try:
        return steps()
    finally:
        session.stages = worker.stages = clock


def _scrape(url: str) -> float:
    """Seconds of CPU that a scrape takes, which with one each second is its share of any time. The scraper's
    own part is counted too, though it is another process as a rule."""
    began = time.process_time()
    with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
        answer.read()
    return time.process_time() - began


def _traced(address: str, worker: Worker, steps: Callable[[], list[float]]) -> list[float]:
    with _trace_file() as path:
        tracer = Tracer(address, path)
        until = time.monotonic() + _PATIENCE_S
        while not worker.stages.trace.on:
            if time.monotonic() > until:
                raise StalledError("the worker was not asked to record a trace")
            time.sleep(0.001)
        try:
            return steps()
        finally:
            tracer.close()


@contextmanager
def _trace_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield os.path.join(directory, "trace.json")
