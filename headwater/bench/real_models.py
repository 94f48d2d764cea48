"""What training through a server costs three real models, beside the same step of torch alone.

One worker and one server, synchronous. Both steps are made by the worker's process in turn, on the same
batches with the same number of torch's threads, so that what else the machine does falls on both: a
convolutional network on images of 8 × 8, a perceptron, and a table of embeddings under a small perceptron.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from headwater.bench.figures import Effort, Figure, complain
from headwater.cluster import Cluster
from headwater.spec.rules import SGD, Adagrad, Adam
from headwater.worker import Worker

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]
    Step = Callable[[Batch], None]

_THREADS = (1, 2)
_BATCHES = 16
_IDS, _BAG, _DIM = 100_000, 8, 16
_ALLOWED = {("convolutions, batches of 16", 1): 1.08}
"""How many times as long as torch's a step may take, by model and torch's threads."""


def measure_models(effort: Effort) -> list[Figure]:
    """Median milliseconds of a step, each beside torch's alone; needs torch.

    Raises:
        ImportError: torch is not installed.
    """
    with Cluster(workers=1, servers=1, engine="local", output=complain) as cluster:
        cluster.start_worker(0, functools.partial(_measure, effort))
        while (outcome := cluster.next_outcome(1.0)) is None:
            pass
    if outcome.failure is not None:
        raise outcome.as_error()
    figures = []
    for (model, threads), (ours, alone) in outcome.value.items():
        shown = f"{model}, {threads} thread{'s' if threads > 1 else ''} of torch"
        allowed = _ALLOWED.get((model, threads))
        figures.append(Figure(shown, ours, "ms", "torch alone", alone, ours / alone, allowed))
    return figures


def _measure(effort: Effort, worker: Worker) -> dict[tuple[str, int], tuple[float, float]]:
    """Medians by model and threads: a step with the server, and one of torch alone."""
    import torch

    torch.manual_seed(0)
    pairs = {
        "convolutions, batches of 16": (_images(16), _convolutions(worker)),
        "perceptron of 0.7 M, batches of 64": (_images(64, side=28), _perceptron(worker)),
        f"{_IDS:,} embeddings, batches of 256": (_bags(256), _embeddings(worker)),
    }
    found = {}
    for model, (batches, steps) in pairs.items():
        for threads in _THREADS:
            torch.set_num_threads(threads)
            found[model, threads] = _in_turns(effort, batches, steps)
    return found


def _in_turns(effort: Effort, batches: list[Batch], steps: tuple[Step, Step]) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * effort.repeats + 1):  # the first warms up
        for which in (0, 1) if turn % 2 else (1, 0):
            for number in range(4 * effort.rounds):
                began = time.perf_counter_ns()
                steps[which](batches[number % _BATCHES])
                if turn:
                    times[which].append((time.perf_counter_ns() - began) / 1e6)
    return median(times[0]), median(times[1])


# ── data ────────────────────────────────────────────────────────────────────────────────────────


def _images(size: int, side: int = 8) -> list[Batch]:
    import torch

    return [(torch.rand(size, 1, side, side), torch.randint(10, (size,))) for _ in range(_BATCHES)]


def _bags(size: int) -> list[Batch]:
    import torch

    return [(torch.randint(_IDS, (size, _BAG)), torch.randint(10, (size,))) for _ in range(_BATCHES)]


def convolutions() -> torch.nn.Module:
    """From float32[n, 1, 8, 8] to float32[n, 10]: that of examples/digits.py. Needs torch."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


# ── each model twice: through the server, and alone ─────────────────────────────────────────────


def _convolutions(worker: Worker) -> tuple[Step, Step]:
    from torch import optim

    import headwater.torch as hw_torch

    ours, alone = convolutions(), convolutions()
    shared = hw_torch.DistributedOptimizer(worker, ours, Adam(lr=3e-3), name="convolutions")
    return _trained(ours, shared), _trained(alone, optim.Adam(alone.parameters(), 3e-3))


def _perceptron(worker: Worker) -> tuple[Step, Step]:
    from torch import nn, optim

    import headwater.torch as hw_torch

    def network() -> nn.Module:
        layers = nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(512, 10))

    ours, alone = network(), network()
    shared = hw_torch.DistributedOptimizer(worker, ours, SGD(lr=0.1), name="perceptron")
    return _trained(ours, shared), _trained(alone, optim.SGD(alone.parameters(), 0.1))


def _embeddings(worker: Worker) -> tuple[Step, Step]:
    """Rows by Adagrad and sparse gradients, what is above them by SGD, on both sides."""
    from torch import nn, optim

    import headwater.torch as hw_torch

    def network(embedding: nn.Module) -> nn.Module:
        layers = nn.Flatten(), nn.Linear(_BAG * _DIM, 64), nn.ReLU(), nn.Linear(64, 10)
        return nn.Sequential(embedding, *layers)

    ours = network(hw_torch.Embedding(worker, "embeddings", _DIM, Adagrad(lr=0.1)))
    shared = hw_torch.DistributedOptimizer(worker, ours, SGD(lr=0.1), name="above embeddings")
    rows = nn.Embedding(_IDS, _DIM, sparse=True)
    alone = network(rows)
    above = [tensor for tensor in alone.parameters() if tensor is not rows.weight]
    optimizers = optim.Adagrad(rows.parameters(), 0.1), optim.SGD(above, 0.1)
    return _trained(ours, shared), _trained(alone, *optimizers)


def _trained(net: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> Step:
    from torch.nn import functional

    def step(batch: Batch) -> None:
        inputs, labels = batch
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = functional.cross_entropy(net(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()

    return step
