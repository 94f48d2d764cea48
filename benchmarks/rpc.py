"""A parameter server made of torch RPC, as one of the rivals: two servers of half a vector each."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch.distributed import rpc

from benchmarks.rivals import LR, SERVERS, START_S, WORKERS, timed


class _Half:
    """What a server has. A step is answered once both workers' gradients are here and applied."""

    def __init__(self, elements: int) -> None:
        self._values = torch.ones(elements)
        self._waiting: list[tuple[torch.Tensor, Any]] = []
        self._lock = threading.Lock()

    def push_pull(self, gradients: torch.Tensor) -> Any:
        future: Any = torch.futures.Future()
        with self._lock:
            self._waiting.append((gradients, future))
            if len(self._waiting) == WORKERS:
                waiting, self._waiting = self._waiting, []
                for pushed, _ in waiting:
                    self._values.add_(pushed, alpha=-LR / WORKERS)
                for _, answer in waiting:
                    answer.set_result(self._values)
        return future


_halves: list[_Half] = []


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _push_pull(gradients: torch.Tensor) -> Any:
    return _halves[0].push_pull(gradients)


def node(rank: int, port: int, elements: int, rounds: int, results: Any) -> None:
    """One process: a worker, or a server after them; rank 0 puts its seconds a round into `results`."""
    torch.set_num_threads(1)
    os.environ.update(TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    half = elements // SERVERS
    _halves.append(_Half(half))
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=START_S, num_worker_threads=4
    )
    rpc.init_rpc(str(rank), rank=rank, world_size=WORKERS + SERVERS, rpc_backend_options=options)  # type: ignore[no-untyped-call]
    if rank < WORKERS:
        gradients = torch.full((half,), 1e-6)

        def step() -> list[Any]:
            servers = [str(WORKERS + server) for server in range(SERVERS)]
            answers = [rpc.rpc_async(server, _push_pull, args=(gradients,)) for server in servers]
            return [answer.wait() for answer in answers]

        times = timed(step, rounds)
        if rank == 0:
            results.put(times)
    rpc.shutdown()
