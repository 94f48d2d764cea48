"""The time of a small pull: 256 float32 from one server process, against a plain echo of as many bytes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from headwater.bench import peer
from headwater.bench.figures import Effort, Figure, complain
from headwater.bench.plain import connect_peer, peers
from headwater.cluster import Cluster
from headwater.spec.rules import SGD
from headwater.worker import Worker

_ELEMENTS = 256
_CALLS = 40
"""Calls in a turn for each round of the effort."""

_PINNINGS = {"one core": (0, 0), "two cores": (0, 1)}
"""Which of the allowed cores the worker and the other side run on."""


def measure_latency(effort: Effort) -> list[Figure]:
    """Medians in microseconds, for each pinning that this machine allows."""
    figures = []
    for pinning, cores in _PINNINGS.items():
        if len(os.sched_getaffinity(0)) > max(cores):
            figures += _measure(pinning, cores, effort)
    return figures


def _measure(pinning: str, cores: tuple[int, int], effort: Effort) -> list[Figure]:
    with (
        peers("unix", 1, 4 * _ELEMENTS) as [(echo, echo_pid)],
        Cluster(workers=1, servers=1, sync="async", engine="local", output=complain) as cluster,
    ):
        cluster.parameters()  # returns when the server is up
        pids = [node.pid for node in cluster.statistics().nodes if node.role == "server"]
        cluster.start_worker(0, functools.partial(_train, effort, cores, (*pids, echo_pid), echo))
        while (outcome := cluster.next_outcome(1.0)) is None:
            pass
    if outcome.failure is not None:
        raise outcome.as_error()
    raw, limit = median(outcome.value["raw"]), "Unix ping-pong, 1 KB"
    pull, unchanged = median(outcome.value["pull"]), median(outcome.value["unchanged"])
    return [
        Figure(f"pull of 1 KB, {pinning}", pull, "µs", limit, raw, pull / raw, 2.5),
        Figure(f"pull, unchanged, {pinning}", unchanged, "µs", limit, raw, unchanged / raw),
    ]


# ── in the worker ───────────────────────────────────────────────────────────────────────────────


def _train(
    effort: Effort, cores: tuple[int, int], pids: tuple[int, ...], echo: str, worker: Worker
) -> dict[str, list[float]]:
    """Microseconds of each call, by case."""
    model = worker.model("small", {"w": np.zeros(_ELEMENTS, np.float32)}, SGD(lr=0.1))
    connection, memory = connect_peer(echo), memoryview(bytearray(4 * _ELEMENTS))
    _pin(os.getpid(), cores[0])
    for pid in pids:
        _pin(pid, cores[1])

    def pull() -> None:
        model.local.changed_here()  # or the server would find nothing new to write
        model.pull()

    def raw() -> None:
        connection.sendall(memory)
        peer.receive_all(connection, memory)

    cases: dict[str, Callable[[], object]] = {"pull": pull, "unchanged": model.pull, "raw": raw}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(effort.repeats):
        for name, case in cases.items():
            case()
            times[name] += _microseconds(case, _CALLS * effort.rounds)
    return times


def _microseconds(case: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        case()
        times.append((time.perf_counter_ns() - began) / 1000)
    return times


def _pin(pid: int, core: int) -> None:
    """Put every thread of a process on one of the cores that it may use."""
    allowed = sorted(os.sched_getaffinity(pid))
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {allowed[core]})
