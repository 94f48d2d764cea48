"""Update loops of dense rules, against a copy, in bytes read and written a second.

The copy is of twice as many bytes: where it fits the cache, the C library copies at half the speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure
from headwater.bench.turns import take_turns
from headwater.kernels import dense
from headwater.spec.rules import SGD, Adagrad, Adam, Rule

_RULES: tuple[Rule, ...] = (SGD(lr=0.01), Adagrad(lr=0.01), Adam(lr=0.001))
_NOBODY = np.empty(0, dtype=np.int64)


def measure_kernels(effort: Effort) -> list[Figure]:
    """One figure for each rule, in GB read and written a second, by one thread."""
    elements = sum(tensor.size for tensor in effort.tensors().values())
    return [_measure(rule, elements, effort) for rule in _RULES]


def _measure(rule: Rule, elements: int, effort: Effort) -> Figure:
    moved = 4 * elements * (3 + 2 * len(rule.states()))
    source, target = (np.ones(moved // 4, dtype=np.float32) for _ in range(2))
    cases: dict[str, Callable[[], object]] = {
        "kernel": _update(rule, elements),
        "copy": functools.partial(np.copyto, target, source),
    }
    times = take_turns(cases, repeats=effort.repeats, rounds=max(1, effort.rounds // 4))
    figure, limit = moved / median(times["kernel"]) / 1e9, 2 * moved / median(times["copy"]) / 1e9
    return Figure(f"kernel {rule.name}", figure, "GB/s", "copy of memory", limit, figure / limit, 0.85, False)


def _update(rule: Rule, elements: int) -> Callable[[], None]:
    """One update of values and states by one gradient, all of it touched before."""
    values, gradient = (np.full(elements, 0.5, dtype=np.float32) for _ in range(2))
    states = tuple(np.full(elements, 0.5, dtype=np.float32) for _ in rule.states())
    kernel, scalars = dense(rule), rule.scalars(0, 1)

    def update() -> None:
        gradients = np.array([gradient.ctypes.data], dtype=np.int64)
        kernel(gradients, 1.0, values, states, scalars, _NOBODY)

    return update
