"""Resident memory of a server and a worker, against what the model's size says it may be.

A process's own memory is what the kernel calls anonymous; a window is shared memory. Both are taken
before a model is registered and after it has been trained on, so that only the model is counted.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headwater.bench.figures import Effort, Figure, complain
from headwater.cluster import Cluster
from headwater.spec.rules import Adam
from headwater.worker import Worker

_STATES = 2
_SERVERS = 2


def measure_memory(effort: Effort) -> list[Figure]:
    """Growth in MB of one server of two, and of a worker, with Adam."""
    with Cluster(workers=1, servers=_SERVERS, engine="local", output=complain) as cluster:
        cluster.parameters()  # returns when the servers are up
        pids = [node.pid for node in cluster.statistics().nodes if node.role == "server"]
        cluster.start_worker(0, functools.partial(_train, effort, pids[0]))
        while (outcome := cluster.next_outcome(1.0)) is None:
            pass
    if outcome.failure is not None:
        raise outcome.as_error()
    server, window, worker = outcome.value
    model = 4 * sum(tensor.size for tensor in effort.tensors().values()) / 1e6
    part = model * (1 + _STATES) / _SERVERS
    return [
        Figure("server, own memory", server, "MB", "parameters and state", part, server / part, 1.1),
        Figure("worker, window", window, "MB", "twice the model", 2 * model, window / (2 * model), 1.01),
        Figure("worker, own memory", worker, "MB", "the model", model, worker / model, 0.05),
    ]


# ── in the worker ───────────────────────────────────────────────────────────────────────────────


def _train(effort: Effort, server: int, worker: Worker) -> tuple[float, float, float]:
    """Growth in MB of the server's own memory, the worker's shared and its own."""
    warm = {"w": np.zeros(1024, np.float32)}
    _use(worker, "warm", warm)
    tensors = effort.tensors()
    before = _anonymous(server), _shared("self"), _anonymous("self")
    _use(worker, "resnet50", tensors)
    after = _anonymous(server), _shared("self"), _anonymous("self")
    grown = [(late - early) / 1e3 for early, late in zip(before, after, strict=True)]
    return grown[0], grown[1], grown[2]


def _use(worker: Worker, name: str, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Register a model and take a few steps on it."""
    model = worker.model(name, tensors, Adam())
    for _ in range(3):
        model.push(tensors)
        worker.step()
        model.pull()


def _anonymous(pid: int | str) -> float:
    return _kilobytes(pid, "RssAnon")


def _shared(pid: int | str) -> float:
    return _kilobytes(pid, "RssShmem")


def _kilobytes(pid: int | str, field: str) -> float:
    """A field of /proc/PID/status, in units of 1000 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1.024
    raise RuntimeError(f"/proc/{pid}/status has no {field}")
