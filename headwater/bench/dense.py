"""Rounds of a dense model: two workers, two servers, plain SGD, everything pushed and pulled every round."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from headwater.bench.figures import Effort, Figure, complain, rounds_per_second
from headwater.bench.plain import (
    make_meeting,
    make_socket_copy,
    new_meeting_name,
    peers,
    shared_vectors,
)
from headwater.bench.turns import Times, take_turns
from headwater.driver import run
from headwater.kernels import dense
from headwater.messages import TensorSpec
from headwater.spec.layout import Layout
from headwater.spec.rules import SGD
from headwater.worker import Worker

_WORKERS = 2
_SERVERS = 2


@dataclass(frozen=True, slots=True)
class _Plan:
    """What both workers are told. `peers`: for a plain socket copy, without them memory is the limit.

    `alone`: no limit is measured.
    """

    effort: Effort
    elements: int
    meeting: str
    peers: tuple[str, ...] = ()
    alone: bool = False


def measure_dense(effort: Effort) -> list[Figure]:
    """The three dense cases; takes about a minute at full effort, and 2 GB of memory."""
    return [*_windows("sync", effort), *_windows("async", effort), *_sockets(effort)]


def _windows(sync: str, effort: Effort) -> list[Figure]:
    plan = _Plan(effort, elements_of(effort), new_meeting_name())
    times = _run(sync, "unix", plan)
    target = 1.15 if sync == "sync" else 1.2
    placed, pushed = f"dense, {sync}, windows, gradients in place", f"dense, {sync}, windows, arrays pushed"
    return [
        rounds_per_second(placed, times["placed"], "bare kernel", times["kernel"], target),
        rounds_per_second(placed, times["placed"], "plain loop", times["loop"]),
        rounds_per_second(placed, times["placed"], "copy of the model", times["copy"]),
        rounds_per_second(pushed, times["pushed"], "bare kernel", times["kernel"]),
    ]


def _sockets(effort: Effort) -> list[Figure]:
    elements = elements_of(effort)
    with peers("tcp", _SERVERS, 4 * elements // _SERVERS) as addresses:
        places = tuple(address for address, _ in addresses)
        times = _run("sync", "tcp", _Plan(effort, elements, new_meeting_name(), places))
    socket, placed = median(times["socket"]), median(times["placed"])
    return [
        Figure(
            case="dense, sync, loopback TCP",
            figure=1 / placed,
            unit="rounds/s",
            limit_name="plain socket copy",
            limit=1 / socket,
            ratio=socket / placed,
            target=0.8,
            at_most=False,
        )
    ]


def pushed_rounds(effort: Effort) -> list[float]:
    """Seconds of synchronous rounds over windows, gradients pushed as arrays; nothing else is measured."""
    return list(
        _run("sync", "unix", _Plan(effort, elements_of(effort), new_meeting_name(), alone=True))["pushed"]
    )


def elements_of(effort: Effort) -> int:
    """Of the vector that the model is."""
    specs = [TensorSpec(name, shape, "float32") for name, shape in effort.shapes.items()]
    return Layout(specs).elements


def _run(sync: str, transport: str, plan: _Plan) -> Times:
    train = functools.partial(_train, plan)
    result = run(train, workers=_WORKERS, servers=_SERVERS, sync=sync, transport=transport, output=complain)
    times: Times = result.values[0]
    return times


# ── in the workers ──────────────────────────────────────────────────────────────────────────────


def _train(plan: _Plan, worker: Worker) -> Times:
    gradients = plan.effort.tensors(1e-6)
    model = worker.model("resnet50", plan.effort.tensors(1.0), SGD(lr=0.01))
    model.push(gradients)
    worker.step()
    meet = make_meeting(plan.meeting, worker.rank, worker.barrier)

    def placed() -> None:
        for name in model.gradients:
            model.local.carry(name)
        worker.step()

    def pushed() -> None:
        model.push(gradients)
        worker.step()

    cases: dict[str, Callable[[], object]] = {"placed": placed}
    if plan.alone:
        cases = {"pushed": pushed}
    elif not plan.peers:
        cases |= {"pushed": pushed, **_bare(plan, worker, meet)}
    else:
        cases["socket"] = make_socket_copy(list(plan.peers), 4 * plan.elements // _SERVERS)
    return take_turns(cases, repeats=plan.effort.repeats, rounds=plan.effort.rounds, meet=meet)


def _bare(plan: _Plan, worker: Worker, meet: Callable[[], None]) -> dict[str, Callable[[], object]]:
    """What a server does in a round, done here by each worker for one half of the vector."""
    from headwater.bench.loops import fused, update  # numba takes half a second

    half, lr = plan.elements // _WORKERS, np.float32(0.01)
    a, b, first, second = shared_vectors(4, half)
    values, rule = np.ones(half, np.float32), SGD(lr=0.01)
    kernel, scalars = dense(rule), rule.scalars(0, 1)

    def both_at_once() -> None:
        fused(a, b, values, first, second, lr)
        meet()

    def one_by_one() -> None:
        update(a, values, first, lr)
        update(b, values, second, lr)
        meet()

    def kernel_at_once() -> None:
        kernel(_addresses(a, b), 2.0, values, (), scalars, _addresses(first, second))
        meet()

    def kernel_one_by_one() -> None:
        kernel(_addresses(a), 1.0, values, (), scalars, _addresses(first))
        kernel(_addresses(b), 1.0, values, (), scalars, _addresses(second))
        meet()

    def copy() -> None:
        np.copyto(values, a)
        meet()

    if worker.sync == "sync":
        return {"kernel": kernel_at_once, "loop": both_at_once, "copy": copy}
    return {"kernel": kernel_one_by_one, "loop": one_by_one, "copy": copy}


def _addresses(*vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.array([vector.ctypes.data for vector in vectors], dtype=np.int64)
