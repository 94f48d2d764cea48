"""Does anything grow? Many small steps with all that a long training has: nothing may cost more at their end.

Two workers train a model and a table, whose settings change with every step as a scheduler changes them. They
read batches, prefetch rows, keep values, meet, and lose a connection now and then; checkpoints are taken
meanwhile. The first half of the steps is for everything to reach its size. Of the second half, the late part
is held against the early one: processor time a step of all processes together, which does not depend on what
else the machine does; memory; descriptors; threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from headwater.bench.figures import FULL, Effort, Figure, complain
from headwater.cluster import Cluster
from headwater.spec.rules import Adam
from headwater.worker import Worker

_STEPS, _QUICK_STEPS = 100_000, 5_000
_WORKERS = _SERVERS = 2
_IDS, _BATCH, _DIM = 2048, 256, 16
_LOOKS = 20
"""How often in a run it is looked what it takes."""
_LOSSES = 40
"""Connections lost in a run."""
_MEETINGS = 100


@dataclass(frozen=True, slots=True)
class Usage:
    """What all processes together had taken after some steps.

    `seconds`: of processor time since the look before; `memory`: of their own and shared, in MB.
    """

    seconds: float
    memory: float
    descriptors: int
    threads: int


def measure_soak(effort: Effort) -> list[Figure]:
    """10⁵ steps in processes of their own; takes some minutes, at little effort some seconds."""
    steps = _STEPS if effort is FULL else _QUICK_STEPS
    return judged(soak(steps, engine="local"), steps)


def judged(looks: Sequence[Usage], steps: int) -> list[Figure]:
    """The late half of what was seen in the second half of the run, against its early half."""
    seen = looks[len(looks) // 2 :]
    early, late = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    a_look = steps / len(looks)

    def figure(case: str, unit: str, name: str, most: float, factor: float = 1.0) -> Figure:
        before, after = (factor * median(getattr(one, name) for one in part) for part in (early, late))
        return Figure(case, after, unit, "earlier in the run", before, after / before, most)

    return [
        figure(f"processor time a step, of {steps:,}", "µs", "seconds", 1.1, 1e6 / a_look),
        figure("memory of all processes", "MB", "memory", 1.02),
        figure("open descriptors", "", "descriptors", 1.1),
        figure("threads", "", "threads", 1.1),
    ]


def soak(steps: int, *, engine: str, sync: str = "sync") -> list[Usage]:
    """What was seen at each look of a run of so many steps."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(
            workers=_WORKERS,
            servers=_SERVERS,
            sync=sync,
            engine=engine,
            checkpoint=folder,
            every=f"{max(steps // _LOOKS, 1)}steps",
            output=complain,
        ) as cluster,
    ):
        cluster.parameters()  # returns when the servers are up
        pids = {os.getpid(), *(node.pid for node in cluster.statistics().nodes)}
        work = functools.partial(_train, steps, sorted(pids))
        for rank in range(_WORKERS):
            cluster.start_worker(rank, work)
        values: dict[int, list[Usage]] = {}
        while len(values) < _WORKERS:
            outcome = cluster.next_outcome(1.0)
            if outcome is not None and outcome.failure is not None:
                raise outcome.as_error()
            if outcome is not None:
                values[outcome.index] = outcome.value
    return values[0]


# ── in the workers ──────────────────────────────────────────────────────────────────────────────


def _train(steps: int, pids: Sequence[int], worker: Worker) -> list[Usage]:
    model = worker.model("small", {"w": np.zeros((16, 16), np.float32)}, Adam(lr=0.01))
    table = worker.table("rows", _DIM, Adam(lr=0.01))
    processes = sorted({*pids, *(int(pid[0]) for pid in worker.gather(pid=np.array([os.getpid()]))["pid"])})
    looks: list[Usage] = []
    before = _seconds(processes)
    gradient, rows = np.full((16, 16), 1e-3, np.float32), np.full((_BATCH, _DIM), 1e-3, np.float32)
    batches = worker.batches((_ids(steps, worker.workers),), _BATCH, splits="static")
    for step, (ids,) in enumerate(batches, 1):
        model.push({"w": gradient})
        table.push(ids, rows)
        model.set(lr=0.01 / step)
        table.set(lr=0.01 / step)
        table.prefetch(ids)
        if step % max(steps // _LOSSES, 1) == worker.rank:
            _lose_a_connection(worker, step % _SERVERS)
        worker.step()
        table.pull(ids)
        if step % max(steps // _MEETINGS, 1) == 0:
            worker.keep(step=step)
            worker.sum(loss=float(step))
        if step % max(steps // _LOOKS, 1) == 0 and worker.rank == 0:
            looks.append(_usage(processes, _seconds(processes) - before))
            before = _seconds(processes)
    return looks


def _ids(steps: int, workers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Of all steps of all workers; all of them come in the first."""
    return np.arange(steps * workers * _BATCH, dtype=np.int64) * 31 % _IDS


def _lose_a_connection(worker: Worker, server: int) -> None:
    """As a network does it: the next exchange finds out, and all are made anew."""
    with contextlib.suppress(OSError):
        worker._session.channels[server]._stream.shutdown(socket.SHUT_RDWR)


def _usage(processes: Sequence[int], seconds: float) -> Usage:
    memory, descriptors = sum(map(_memory, processes)), sum(map(_descriptors, processes))
    return Usage(seconds, memory, descriptors, sum(map(_threads, processes)))


def _seconds(processes: Sequence[int]) -> float:
    """Processor time of them all."""
    return sum(map(_processor_time, processes))


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    return (int(_status(pid, "RssAnon")) + int(_status(pid, "RssShmem"))) * 1.024e-3


def _threads(pid: int) -> int:
    return int(_status(pid, "Threads"))


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _status(pid: int, field: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split()[1]
    raise RuntimeError(f"/proc/{pid}/status has no {field}")
