"""The kernels in plain NumPy: what they are tested against, and the quickest way to see what they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.spec.layout import LINE, PAGE
from headwater.spec.rules import Rule

Array = NDArray[np.float32]


def update(
    rule: Rule,
    gradients: Sequence[Array],
    divisor: float,
    values: Array,
    states: Sequence[Array],
    scalars: Sequence[float],
    answers: Sequence[Array],
) -> None:
    """What `dense(rule)` does, with arrays for addresses; changes `values`, `states`, `answers` in place."""
    function = _in_float32(rule.function())
    rounded = [np.float32(scalar) for scalar in scalars]
    with np.errstate(all="ignore"):
        total = gradients[0].copy()
        for gradient in gradients[1:]:
            total += gradient
        total /= np.float32(divisor)
        for i in range(len(values)):
            result = function(values[i], total[i], *(state[i] for state in states), *rounded)
            new = result if states else (result,)
            for vector, element in zip((values, *states), new, strict=True):
                vector[i] = element
    copy_out(values, answers)


def copy_out(values: Array, answers: Sequence[Array]) -> None:
    """What `kernels.copy_out` does, with arrays for addresses."""
    for answer in answers:
        answer[:] = values


def add_up(gradients: Sequence[Array], total: Array) -> None:
    """What `kernels.add_up` does, with arrays for addresses."""
    with np.errstate(all="ignore"):
        total[:] = gradients[0]
        for gradient in gradients[1:]:
            total += gradient


def square_up(
    gradients: Sequence[Array], divisor: float, first: int, n: int, lanes: NDArray[np.float64]
) -> None:
    """What `kernels.square_up` does, with arrays for addresses."""
    total = np.empty(n, np.float32)
    add_up(gradients, total)
    with np.errstate(all="ignore"):
        total /= np.float32(divisor)
        for start in range(0, n, LINE):
            lanes[(first + start) // PAGE] += total[start : start + LINE].astype(np.float64) ** 2


def stage(source: Array, destination: Array, add: bool) -> bool:
    """What `kernels.stage` does."""
    with np.errstate(all="ignore"):
        destination[:] = destination + source if add else source
    return finite(destination)


def finite(array: Array) -> bool:
    """What `kernels.finite` does."""
    return bool(np.isfinite(array).all())


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a square root that gives float32, as every other operation of NumPy's float32 does."""
    assert isinstance(function, FunctionType)
    names: dict[str, Any] = {}
    for name, value in function.__globals__.items():
        if value is math:
            names[name] = SimpleNamespace(sqrt=_sqrt)
        elif value is math.sqrt:
            names[name] = _sqrt
        elif isinstance(value, FunctionType) and not value.__closure__:
            names[name] = FunctionType(value.__code__, names)
        else:
            names[name] = value
    return FunctionType(function.__code__, names)


def _sqrt(number: float) -> np.float32:
    return np.float32(np.sqrt(np.float32(number)))
