"""What it costs to be seen: training steps with and without metrics, the frontier and a trace.

A small convolutional network is trained by one worker and one server in this process, so that the CPU time of
the process is that of all who take part: the worker, the server, the coordinator, the thread that answers
scrapes and the one that writes the trace. Turns without and with what is measured come in the order
A B B A, which cancels a machine's drift within each four of them. A sample is the ratio of both after some
fours; the figure is the median of the samples, with its interval.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

from headwater.bench.figures import Effort, Figure
from headwater.bench.real_models import convolutions
from headwater.bench.turns import median_interval
from headwater.cluster import Cluster
from headwater.errors import EnvironmentFailure, StalledError
from headwater.observe.tracer import Tracer
from headwater.runtime.stage_clock import StageClock
from headwater.spec.rules import SGD
from headwater.worker import Worker

_SAMPLES = 2
"""Samples for each repeat of the effort."""
_METRICS, _TRACE = "frontier, scraped each second", "trace"
_TARGETS = {_METRICS: 1.01, _TRACE: 1.02}
_BATCH = 64
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


@dataclass(frozen=True, slots=True)
class _Turn:
    """Seconds of CPU of all threads, seconds that passed, and the steps made in them."""

    cpu: float
    wall: float
    steps: int

    def __add__(self, other: _Turn) -> _Turn:
        return _Turn(self.cpu + other.cpu, self.wall + other.wall, self.steps + other.steps)


@dataclass(frozen=True, slots=True)
class _Case:
    """What is compared: turns of so many seconds, A B B A so many times over in a sample.

    `seen`: called for each turn that is seen, with its number in the sample.
    """

    seconds: float
    fours: int
    bare: Callable[[], AbstractContextManager[_Apart]]
    seen: Callable[[int], AbstractContextManager[_Apart]]


def measure_observe(effort: Effort) -> list[Figure]:
    """Time of a training step when it is seen, beside that of one that is not.

    Raises:
        EnvironmentFailure: torch is not installed.
    """
    whole = effort.repeats > 1
    with Cluster(workers=1, metrics="127.0.0.1:0") as cluster, cluster.worker() as worker:
        step, url = _training(worker), cluster.metrics_url or ""
        cases = {
            # a second of turns that are seen has one scrape
            _METRICS: _Case(
                0.05,
                10 if whole else 1,
                lambda: _unobserved(worker),
                lambda turn: _unseen() if turn else _scraped(url),
            ),
            _TRACE: _Case(2.0 if whole else 0.1, 1, _unseen, lambda turn: _traced(cluster.address, worker)),
        }
        samples = {
            name: [_sample(case, step) for _ in range(_SAMPLES * effort.repeats)]
            for name, case in cases.items()
        }
    return [figure for name, found in samples.items() for figure in _figures(name, found)]


def _sample(case: _Case, step: Callable[[], None]) -> tuple[_Turn, _Turn]:
    """All turns that are not seen together, and all that are."""
    bare = seen = _Turn(0.0, 0.0, 0)
    for four in range(case.fours):
        bare += _take(step, case.seconds, case.bare())
        seen += _take(step, case.seconds, case.seen(2 * four))
        seen += _take(step, case.seconds, case.seen(2 * four + 1))
        bare += _take(step, case.seconds, case.bare())
    return bare, seen


def _figures(case: str, samples: list[tuple[_Turn, _Turn]]) -> list[Figure]:
    """Of CPU time, which the target is for, and of wall time, which depends on what else the machine does."""
    figures = []
    for kind, name, target in (("cpu", "CPU time", _TARGETS[case]), ("wall", "wall time", None)):
        bare, seen = (
            [1e3 * getattr(one, kind) / one.steps for one in side] for side in zip(*samples, strict=True)
        )
        ratios = [b / a for a, b in zip(bare, seen, strict=True)]
        figures.append(
            Figure(
                f"{case}: {name}",
                median(seen),
                "ms/step",
                "the same without",
                median(bare),
                median(ratios),
                target,
                interval=median_interval(ratios),
            )
        )
    return figures


def _training(worker: Worker) -> Callable[[], None]:
    """A step of the network of examples/digits.py on `_BATCH` made-up images."""
    try:
        import torch
        from torch.nn import functional

        from headwater.torch import DistributedOptimizer
    except ImportError as error:
        raise EnvironmentFailure(f"bench observe trains a network of torch: {error}") from error
    torch.set_num_threads(1)  # threads that wait for each other in a spin would be most of the CPU time
    torch.manual_seed(0)
    net = convolutions()
    images, labels = torch.rand(_BATCH, 1, 8, 8), torch.randint(10, (_BATCH,))
    opt = DistributedOptimizer(worker, net, SGD(lr=1e-3))

    def step() -> None:
        opt.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        worker.log(loss=loss.item())

    for _ in range(20):  # what is made at the first use is made
        step()
    return step


@dataclass(slots=True)
class _Apart:
    """Seconds of CPU in this process that are another's in a cluster: the scraper's."""

    cpu: float = 0.0


def _take(step: Callable[[], None], seconds: float, seen: AbstractContextManager[_Apart]) -> _Turn:
    """Steps for so many seconds. What `seen` does at its beginning and end counts as CPU time, not as wall
    time: a trace is written to its end after the steps."""
    steps, before = 0, time.process_time()
    with seen as apart:
        began = now = time.perf_counter()
        while now < began + seconds:
            step()
            steps += 1
            now = time.perf_counter()
    return _Turn(time.process_time() - before - apart.cpu, now - began, steps)


def _unseen() -> AbstractContextManager[_Apart]:
    return nullcontext(_Apart())


@contextmanager
def _unobserved(worker: Worker) -> Iterator[_Apart]:
    session, clock = worker._session, worker.stages
    session.stages = worker.stages = _Silent()
    try:
        yield _Apart()
    finally:
        session.stages = worker.stages = clock


@contextmanager
def _scraped(url: str) -> Iterator[_Apart]:
    """One scrape beside the steps, by a thread whose own CPU time is the scraper's."""
    apart = _Apart()

    def scrape() -> None:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
            answer.read()
        apart.cpu = time.thread_time()

    thread = threading.Thread(target=scrape, name="scraper", daemon=True)
    thread.start()
    try:
        yield apart
    finally:
        thread.join()


@contextmanager
def _traced(address: str, worker: Worker) -> Iterator[_Apart]:
    with tempfile.TemporaryDirectory() as directory:
        tracer = Tracer(address, os.path.join(directory, "trace.json"))
        try:
            _wait_for_recording(worker, True)
            yield _Apart()
        finally:
            tracer.close()
        _wait_for_recording(worker, False)


def _wait_for_recording(worker: Worker, on: bool) -> None:
    until = time.monotonic() + _PATIENCE_S
    while worker.stages.trace.on is not on:
        if time.monotonic() > until:
            raise StalledError(f"the worker was not told to {'begin' if on else 'end'} recording a trace")
        time.sleep(0.001)
