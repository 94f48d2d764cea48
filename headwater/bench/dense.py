"""Rounds of a dense model: two workers, two servers, plain SGD, everything pushed and pulled every round."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure, rounds_per_second
from headwater.bench.plain import (
    make_meeting,
    make_socket_copy,
    new_meeting_name,
    peers,
    shared_file,
    shared_vectors,
)
from headwater.bench.turns import Times, take_turns
from headwater.layout import Layout
from headwater.messages import TensorSpec
from headwater.nodes.worker import Worker
from headwater.rules import SGD
from headwater.run import run

_WORKERS = 2
_SERVERS = 2


@dataclass(frozen=True, slots=True)
class _Plan:
    """What both workers are told. `file`: five vectors shared by them; `peers`: of a plain socket copy."""

    effort: Effort
    elements: int
    meeting: str
    file: str
    peers: tuple[str, ...] = ()


def measure_dense(effort: Effort) -> list[Figure]:
    """The three dense cases; takes about a minute at full effort, and 2 GB of memory."""
    return [*_windows("sync", effort), *_windows("async", effort), *_sockets(effort)]


def _windows(sync: str, effort: Effort) -> list[Figure]:
    elements = _elements(effort)
    with shared_file(5 * 4 * elements) as file:
        times = _run(sync, "unix", _Plan(effort, elements, new_meeting_name(), file))
    name = f"dense, {sync}, windows"
    bare, target = ("bare fused loop", 1.15) if sync == "sync" else ("bare update and write-back", 1.2)
    return [
        rounds_per_second(f"{name}, gradients in place", times["ready"], bare, times["bare"], target),
        rounds_per_second(f"{name}, gradients in place", times["ready"], "copy of the model", times["copy"]),
        rounds_per_second(f"{name}, arrays pushed", times["pushed"], bare, times["bare"]),
    ]


def _sockets(effort: Effort) -> list[Figure]:
    elements = _elements(effort)
    with peers("tcp", _SERVERS, 4 * elements // _SERVERS) as addresses:
        places = tuple(address for address, _ in addresses)
        times = _run("sync", "tcp", _Plan(effort, elements, new_meeting_name(), "", places))
    socket, ready = median(times["socket"]), median(times["ready"])
    return [
        Figure(
            case="dense, sync, loopback TCP",
            figure=1 / ready,
            unit="rounds/s",
            limit_name="plain socket copy",
            limit=1 / socket,
            ratio=socket / ready,
            target=0.8,
            at_most=False,
        )
    ]


def _elements(effort: Effort) -> int:
    specs = [TensorSpec(name, shape, "float32") for name, shape in effort.shapes.items()]
    return Layout(specs).elements


def _run(sync: str, transport: str, plan: _Plan) -> Times:
    train = functools.partial(_train, plan)
    result = run(train, workers=_WORKERS, servers=_SERVERS, sync=sync, transport=transport)
    times: Times = result.values[0]
    return times


# ── in the workers ──────────────────────────────────────────────────────────────────────────────


def _train(plan: _Plan, worker: Worker) -> Times:
    gradients = plan.effort.tensors(1e-6)
    model = worker.model("resnet50", plan.effort.tensors(1.0), SGD(lr=0.01))
    model.push(gradients)
    worker.step()
    meet = make_meeting(plan.meeting, worker.rank, worker.barrier)

    def ready() -> None:
        for name in model.gradients:
            model.carry(name)
        worker.step()

    def pushed() -> None:
        model.push(gradients)
        worker.step()

    cases: dict[str, Callable[[], object]] = {"ready": ready}
    if plan.file:
        cases |= {"pushed": pushed, **_bare_loops(plan, worker, meet)}
    else:
        cases["socket"] = make_socket_copy(list(plan.peers), 4 * plan.elements // _SERVERS)
    return take_turns(cases, repeats=plan.effort.repeats, rounds=plan.effort.rounds, meet=meet)


def _bare_loops(plan: _Plan, worker: Worker, meet: Callable[[], None]) -> dict[str, Callable[[], object]]:
    """What the servers do, done here by each worker for one half of the vector."""
    half = slice(worker.rank * plan.elements // _WORKERS, (worker.rank + 1) * plan.elements // _WORKERS)
    a, b, values, first, second = (vector[half] for vector in shared_vectors(plan.file, 5, plan.elements))
    from headwater.bench.loops import fused, update  # numba takes half a second

    lr = np.float32(0.01)

    def both_at_once() -> None:
        fused(a, b, values, first, second, lr)
        meet()

    def one_by_one() -> None:
        update(a, values, first, lr)
        update(b, values, second, lr)
        meet()

    def copy() -> None:
        np.copyto(values, a)
        meet()

    return {"bare": both_at_once if worker.sync == "sync" else one_by_one, "copy": copy}
