"""The state of a model's rule as users have it, by tensor, and as it travels: one vector for each state."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import GradientError
from headwater.spec.amounts import shown
from headwater.spec.layout import Layout
from headwater.spec.rules import Rule
from headwater.worker.model_spec import as_array, named

STEP = "step"
"""The count of a tensor's updates, beside its states."""


def vectors_of(
    what: str, layout: Layout, rules: list[Rule], state: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[int, ...], dict[str, NDArray[np.float32]]]:
    """Updates of each tensor, in the order of the layout, and by state name float32[elements].

    Raises:
        GradientError: an unknown tensor or state, one that is missing, a wrong shape or dtype, an impossible
            step; names it.
    """
    if not isinstance(state, Mapping) or not all(isinstance(one, Mapping) for one in state.values()):
        raise GradientError(f"{what}: the state must be a dict of dicts by tensor name, got {shown(state)}")
    if unknown := [name for name in state if name not in layout.index]:
        raise GradientError(f"{what} has no tensor {named(unknown)}, it has {named(layout.index)}")
    names = list(dict.fromkeys(name for rule in rules for name in rule.states()))
    vectors = {name: np.zeros(layout.elements, dtype=np.float32) for name in names}
    views = {name: layout.views(vector) for name, vector in vectors.items()}
    counts = [0] * len(layout.tensors)
    for name, one in state.items():
        place = layout.index[name]
        tensor = layout.tensors[place]
        initial = rules[tensor.group].states()
        of = f"tensor {name!r} of {what}"
        if strange := [key for key in one if key != STEP and key not in initial]:
            raise GradientError(
                f"{of} has no state {named(strange)}, its rule has {named(initial) or 'none'}"
            )
        counts[place] = _count(of, one)
        for key, value in initial.items():
            if key in one:
                array = as_array(f"state {key!r} of {of}", one[key])
                if array.shape != tensor.shape:
                    raise GradientError(f"state {key!r} of {of} has shape {tensor.shape}, got {array.shape}")
                views[key][name][...] = array
            elif counts[place]:
                raise GradientError(
                    f"{of} has had {counts[place]} updates, but its state {key!r} is missing, there is "
                    f"{named(one)}"
                )
            else:
                views[key][name][...] = value
    return tuple(counts), vectors


def rows_of(
    what: str, shape: tuple[int, ...], dim: int, rule: Rule, rows: Any, state: str | Mapping[str, Any]
) -> NDArray[np.float32]:
    """Rows for ids of this shape as they travel: float32[n, …], values, then states and counts if given.

    Raises:
        GradientError: another shape or dtype, an unknown or a missing state; says what was expected.
    """
    values = _fitting(f"rows for {what}", rows, (*shape, dim)).reshape(-1, dim)
    if not isinstance(state, Mapping):
        if not isinstance(state, str) or state != "reset":
            raise GradientError(f"{what}: state must be 'reset' or the states by name, got {shown(state)}")
        return values
    states = rule.states()
    if strange := [key for key in state if key != STEP and key not in states]:
        raise GradientError(f"{what} has no state {named(strange)}, its rule has {named(states) or 'none'}")
    if missing := [key for key in states if key not in state]:
        raise GradientError(
            f"{what}: its state {named(missing)} is missing, there is {named(state) or 'none'}"
        )
    per_row = shape if rule.rows_only else (*shape, dim)
    parts = [
        _fitting(f"state {key!r} of {what}", state[key], per_row).reshape(len(values), -1) for key in states
    ]
    counts = np.broadcast_to(np.asarray(state.get(STEP, 1)), shape)
    if counts.dtype.kind not in "iu" or (counts.size and not 0 <= counts.min() <= counts.max() < 2**31):
        raise GradientError(f"{what}: {STEP!r} must be whole numbers ≥ 0, got {state.get(STEP)!r}")
    bits = np.ascontiguousarray(counts, dtype=np.int32).reshape(-1, 1).view(np.float32)
    return np.ascontiguousarray(np.hstack([values, *parts, bits]))


def _fitting(what: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = as_array(what, values)
    if array.shape != shape:
        raise GradientError(f"{what} must have shape {shape}, got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _count(of: str, state: Mapping[str, Any]) -> int:
    if STEP not in state:
        raise GradientError(
            f"{of}: its state lacks {STEP!r}, the number of its updates; it has {named(state)}"
        )
    count = state[STEP]
    whole = isinstance(count, numbers.Real) and not isinstance(count, bool) and float(count).is_integer()
    if not whole or not 0 <= int(count) < 2**53:
        raise GradientError(f"{of}: {STEP!r} must be a whole number ≥ 0, got {count!r}")
    return int(count)


def digest_of(told: object, arrays: Iterable[NDArray[np.float32]]) -> int:
    """A sum of 56 bits of arrays and of what is said of them."""
    summed = hashlib.blake2b(repr(told).encode(), digest_size=7)
    for array in arrays:
        summed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return int.from_bytes(summed.digest())
