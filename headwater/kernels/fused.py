"""The fused pass over a model's range: sum of gradients, rule, answers.

Invariants:
- Each element is computed alone and the same way, wherever it lies in a piece: no result depends on how
  a range is cut.
- A piece's gradients are read before its answers are written, so an answer may overwrite a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from headwater.kernels.cache import load
from headwater.kernels.source import float32_source
from headwater.rules import Rule

Update: TypeAlias = Callable[..., None]

TEMPLATE = '''"""Dense loop of a rule."""
import math

import numpy as np
from numba import float32
from headwater.kernels.primitives import floats, inner, outer

PIECE = 4096


{rule}


@inner
def apply_one(a, divisor, values, states, scalars, start, stop):
{unpack}
    for i in range(stop - start):
        gradient = a[i] / divisor
        {targets} = {name}({arguments})


@inner
def apply_two(a, b, divisor, values, states, scalars, start, stop):
{unpack}
    for i in range(stop - start):
        gradient = (a[i] + b[i]) / divisor
        {targets} = {name}({arguments})


@outer("void(int64[::1], float64, float32[::1], {states_type}, {scalars_type}, int64[::1])")
def update(gradients, divisor, values, states, scalars, answers):
    w = len(gradients)
    scale = float32(divisor)
    scratch = np.empty(PIECE if w > 2 else 0, np.float32)
    for start in range(0, len(values), PIECE):
        stop = min(start + PIECE, len(values))
        a = floats(gradients[0], start, stop)
        if w == 1:
            apply_one(a, scale, values, states, scalars, start, stop)
        else:
            for k in range(1, w - 1):
                b = floats(gradients[k], start, stop)
                for i in range(stop - start):
                    scratch[i] = a[i] + b[i]
                a = scratch[:stop - start]
            b = floats(gradients[w - 1], start, stop)
            apply_two(a, b, scale, values, states, scalars, start, stop)
        for answer in answers:
            floats(answer, start, stop)[:] = values[start:stop]
'''


def dense_source(rule: Rule) -> str:
    """The module text whose `update` is the fused pass of `rule`."""
    function, states, scalars = rule.function(), len(rule.states()), len(rule.scalars(0, 1))
    here = [f"state{k}[i]" for k in range(states)]
    unpack = [f"    value = values[start:stop]"]
    unpack += [f"    state{k} = states[{k}][start:stop]" for k in range(states)]
    unpack += [f"    scalar{k} = float32(scalars[{k}])" for k in range(scalars)]
    return TEMPLATE.format(
        rule=float32_source(function, states, scalars),
        name=function.__name__,
        unpack="\n".join(unpack),
        targets=", ".join(["value[i]", *here]),
        arguments=", ".join(["value[i]", "gradient", *here, *(f"scalar{k}" for k in range(scalars))]),
        states_type=f"UniTuple(float32[::1], {states})" if states else "Tuple(())",
        scalars_type=f"UniTuple(float64, {scalars})" if scalars else "Tuple(())",
    )


_compiling = threading.Lock()
_updates: dict[tuple[object, int, int], Update] = {}


def dense(rule: Rule) -> Update:
    """The compiled fused pass of `rule`; blocks while it is compiled the first time."""
    key = rule.function(), len(rule.states()), len(rule.scalars(0, 1))
    update = _updates.get(key)
    if update is None:
        with _compiling:  # Python 3.11 parses source in one thread at a time only
            update = _updates.setdefault(key, _updates.get(key) or load(dense_source(rule)).update)
    return update
