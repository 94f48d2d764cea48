"""What other systems make of a synchronous round on this machine: the same vector, two workers, plain SGD.

Each is used as its own documentation would have it, in processes of its own: gloo's all-reduce on the whole
vector at once, torch RPC and Ray as parameter servers of two halves. All begin with gradients in ordinary
arrays and end with parameters in ordinary arrays.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import EngineError

WORKERS = SERVERS = 2
LR = 0.01
START_S = 120.0

Vector = NDArray[np.float32]


def gloo(elements: int, rounds: int) -> list[float]:
    """Seconds of each round: all-reduce of the gradients, then every worker applies them."""
    return _processes(_gloo_worker, WORKERS, elements, rounds)


def torch_rpc(elements: int, rounds: int) -> list[float]:
    """Seconds of each round: two servers wait for both halves, apply them and answer."""
    from benchmarks.rpc import node  # it imports torch

    return _processes(node, WORKERS + SERVERS, elements, rounds)


def ray(elements: int, rounds: int) -> list[float]:
    """The same with actors of Ray, whose object store carries the arrays."""
    import ray as ray_

    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # so that it binds loopback alone
    ray_.init(num_cpus=WORKERS + SERVERS, include_dashboard=False, log_to_driver=False)
    try:
        half = elements // SERVERS
        server = ray_.remote(_Half).options(max_concurrency=WORKERS, num_cpus=0)
        servers = [server.remote(half) for _ in range(SERVERS)]
        worker = ray_.remote(_ray_worker).options(num_cpus=1)
        times: list[list[float]] = ray_.get(
            [worker.remote(servers, half, rounds) for _ in range(WORKERS)], timeout=START_S + 10 * rounds
        )
        return times[0]
    finally:
        ray_.shutdown()


RIVALS: dict[str, tuple[str, Callable[[int, int], list[float]]]] = {
    "gloo all-reduce": ("torch", gloo),
    "torch RPC": ("torch", torch_rpc),
    "Ray": ("ray", ray),
}
"""By name: the package that must be installed, and what measures it."""


def measure(name: str, elements: int, rounds: int) -> list[float]:
    """Seconds of each round of that rival, in a process whose children all end with it.

    Raises:
        EngineError: it failed; what it printed says why.
    """
    command = [sys.executable, "-m", "benchmarks.rivals", name, str(elements), str(rounds)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, start_new_session=True, text=True, cwd=root
    ) as process:
        try:
            output, _ = process.communicate(timeout=2 * START_S + 30 * rounds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise EngineError(f"{name} ended with {process.returncode}, expected 0: what it printed says why")
    times: list[float] = json.loads(output.splitlines()[-1])
    return times


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def _processes(target: Callable[..., None], count: int, elements: int, rounds: int) -> list[float]:
    """Run `target(rank, port, elements, rounds, results)` in so many processes; what rank 0 says."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    nodes = [
        context.Process(target=target, args=(rank, port, elements, rounds, results), daemon=True)
        for rank in range(count)
    ]
    for node in nodes:
        node.start()
    try:
        for node in nodes:
            node.join(START_S + 10 * rounds)
            if node.exitcode != 0:
                raise EngineError(f"{target.__name__} ended with {node.exitcode}, expected 0")
    finally:
        for node in nodes:
            node.kill()
    times: list[float] = results.get()
    return times


def timed(step: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, but for the first."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times[1:]  # the first one connects and finds memory


def _gloo_worker(rank: int, port: int, elements: int, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    gradients, parameters = torch.full((elements,), 1e-6), torch.ones(elements)

    def step() -> None:
        dist.all_reduce(gradients)
        parameters.add_(gradients, alpha=-LR / WORKERS)

    times = timed(step, rounds)
    if rank == 0:
        results.put(times)
    dist.destroy_process_group()


# ── Ray ─────────────────────────────────────────────────────────────────────────────────────────


class _Half:
    """An actor: half of the parameters."""

    def __init__(self, elements: int) -> None:
        self._values: Vector = np.ones(elements, np.float32)
        self._both = threading.Barrier(WORKERS)
        self._lock = threading.Lock()

    def push_pull(self, gradients: Vector) -> Vector:
        """Apply, and answer once both workers' gradients are applied."""
        with self._lock:
            self._values -= np.float32(LR / WORKERS) * gradients
        self._both.wait(START_S)
        return self._values


def _ray_worker(servers: Sequence[Any], half: int, rounds: int) -> list[float]:
    import ray as ray_

    gradients = np.full(half, 1e-6, np.float32)
    return timed(lambda: ray_.get([one.push_pull.remote(gradients) for one in servers]), rounds)


if __name__ == "__main__":
    print(json.dumps(RIVALS[sys.argv[1]][1](int(sys.argv[2]), int(sys.argv[3]))))
