"""What a follower costs training, how far it is behind, and what reading it costs.

Followers are processes of their own, beside one worker and two servers. What is compared is measured in turns
of the same run: the cluster with and without the follower, again and again.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure, complain
from headwater.cluster import Cluster
from headwater.errors import ConfigurationError
from headwater.follower.public import Follower, follow
from headwater.follower.publisher import publish
from headwater.runtime.inquiry import ask
from headwater.spec.rules import SGD, Adam, Rule
from headwater.weights.writer import PublishedVersion
from headwater.worker import Worker

_ELEMENTS = 256
_PAGE = 4096
_READS = 2000
_COMMIT_S, _READ_US = 0.005, 2.0
_SLOWED = 1.02


def measure_follow(effort: Effort) -> list[Figure]:
    """Training beside a follower, lag, a pinned read, bytes of a version; see docs/benchmarks.md."""
    turn = 0.4 * effort.rounds
    large = {name: np.full(shape, 0.01, np.float32) for name, shape in effort.shapes.items()}
    small = {"w": np.zeros(_ELEMENTS, np.float32)}
    figures = []
    with _training(large, SGD(lr=0.1), 2 * effort.repeats * turn) as run:
        case = "step beside a follower each second"
        figures.append(_slowed(run, case, "the same without", effort, turn, _following(run, "1s")))
    with _training(small, SGD(lr=0.1), 2 * effort.repeats * turn) as run:
        figures += _lag(run, effort, turn)
    with _training(small, SGD(lr=0.1), 2 * effort.repeats * turn, pause=0.0) as run:
        figures += _stopped(run, effort, turn)
    figures += _bytes(effort)
    return figures


# ── a training that says when each of its steps ended ───────────────────────────────────────────


@dataclass(slots=True)
class _Run:
    """`ended`: when each step returned, and its version, once `finish` has been called."""

    address: str
    cluster: Cluster
    ended: list[tuple[int, float]]

    def finish(self) -> None:
        """Block until the worker has ended."""
        while (outcome := self.cluster.next_outcome(1.0)) is None:
            pass
        if outcome.failure is not None:
            raise outcome.as_error()
        self.ended = outcome.value

    def rate(self, windows: list[tuple[float, float]]) -> float:
        """Steps a second in these times."""
        last = self.ended[-1][1]
        full = [(begin, end) for begin, end in windows if end <= last]
        steps = sum(1 for _, at in self.ended for begin, end in full if begin <= at < end)
        return max(steps, 1) / sum(end - begin for begin, end in full)


@contextmanager
def _training(
    tensors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    rule: Rule,
    seconds: float,
    *,
    pause: float = 0.005,
) -> Iterator[_Run]:
    with Cluster(workers=1, servers=2, sync="async", engine="local", output=complain) as cluster:
        cluster.start_worker(0, functools.partial(_train, tensors, rule, seconds, pause))
        yield _Run(cluster.address, cluster, [])


def _train(
    tensors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    rule: Rule,
    seconds: float,
    pause: float,
    worker: Worker,
) -> list[tuple[int, float]]:
    """Step for so long after the first follower could be there."""
    model = worker.model("net", tensors, rule)
    gradients = {name: np.full(values.shape, 1e-3, np.float32) for name, values in tensors.items()}
    ended = []
    until = time.monotonic() + 1.5 * seconds + 10.0  # followers come and go meanwhile
    while time.monotonic() < until:
        model.push(gradients)
        worker.step(read=[model])
        ended.append((worker.version, time.monotonic()))
        if pause:
            time.sleep(pause)
    return ended


def _began(address: str) -> None:
    """Block until training has begun."""
    while ask(address).version < 2:
        time.sleep(0.05)


# ── beside training ─────────────────────────────────────────────────────────────────────────────


def _following(run: _Run, every: str) -> Callable[[bool], None]:
    """Begins to follow, or ends it."""
    followers: list[Follower] = []

    def set_following(on: bool) -> None:
        if on:
            followers.append(follow(run.address, every=every))
        elif followers:
            followers.pop().close()

    return set_following


def _slowed(
    run: _Run, case: str, beside_what: str, effort: Effort, turn: float, switch: Callable[[bool], None]
) -> Figure:
    """Time of a step while something is on, against while it is off, in turns."""
    _began(run.address)
    windows: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(effort.repeats):
        for on in (False, True):
            switch(on)
            began = time.monotonic()
            time.sleep(turn)
            windows[on].append((began, time.monotonic()))
    switch(False)
    run.finish()
    beside, alone = 1000 / run.rate(windows[True]), 1000 / run.rate(windows[False])
    return Figure(case, beside, "ms", beside_what, alone, beside / alone, _SLOWED)


def _stopped(run: _Run, effort: Effort, turn: float) -> list[Figure]:
    """As `_slowed`, of a follower's process that is stopped; and what servers' memory is then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headwater", "serve", "follower", run.address, "--every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        _began(run.address)
        process.stdout.readline()  # it is there
        servers = [node.pid for node in ask(run.address).nodes if node.role == "server"]
        before = sum(map(_resident, servers))

        after: list[int] = []

        def stop(on: bool) -> None:
            if not on:
                after.append(sum(map(_resident, servers)))
            process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

        case = "step beside a follower that is stopped"
        slowed = _slowed(run, case, "while it runs", effort, turn, stop)
        ratio, then = after[-1] / before, after[-1] / 1e6
        return [slowed, Figure("servers' memory then", then, "MB", "before", before / 1e6, ratio, 1.05)]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def _lag(run: _Run, effort: Effort, turn: float) -> list[Figure]:
    """From the end of a worker's step until a follower shows its version; and a pinned read of 1 KB."""
    shown: list[tuple[int, float]] = []
    over = threading.Event()
    _began(run.address)
    with follow(run.address, every=1) as follower:

        def look() -> None:
            while not over.is_set():
                shown.append((follower.wait(deadline=30).number, time.monotonic()))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        time.sleep(effort.repeats * turn)
        over.set()
        thread.join()
        read = _read_us(follower)
    run.finish()
    ended = dict(run.ended)
    lags = [(at - ended[version]) * 1000 for version, at in shown if version in ended]
    times = [at for _, at in run.ended]
    commit = median(np.diff(times)) * 1000
    allowed = commit + 1000 * _COMMIT_S
    lag = max(0.0, median(lags))
    return [
        Figure("lag of a follower, small model", lag, "ms", "a commit and 5 ms", allowed, lag / allowed, 1.0),
        Figure("pinned read of 1 KB", read, "µs", "what is allowed", _READ_US, read / _READ_US, 1.0),
    ]


def _read_us(follower: Follower) -> float:
    times = []
    with follower.pin() as view:
        for _ in range(_READS):
            began = time.perf_counter_ns()
            view.parameters("net")["w"]
            times.append((time.perf_counter_ns() - began) / 1000)
    return median(times)


def _bytes(effort: Effort) -> list[Figure]:
    """Of a version that is published as bfloat16 after a step of Adam with lr 3e-6, beside a full one."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in effort.shapes.items()
    }
    written: list[PublishedVersion] = []
    with (
        _training(tensors, Adam(lr=3e-6), 10.0, pause=0.5) as run,
        tempfile.TemporaryDirectory() as folder,
    ):
        _began(run.address)
        try:
            publish(
                run.address,
                folder,
                every=1,
                dtype="bf16",
                versions=4,
                wrote=lambda done, view: written.append(done),
            )
        except ConfigurationError as error:
            complain(f"bytes of a version are not measured: {error}")
            return []
        run.finish()
    full = max(done.size for done in written if done.full) / 1e6
    delta = median(done.size for done in written if not done.full) / 1e6
    return [Figure("delta of a version, Adam lr 3e-6, bf16", delta, "MB", "full", full, delta / full)]
