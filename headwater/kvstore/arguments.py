"""What calls of a store are given: keys and values, row ids, arrays to write to."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import GradientError, UsageError
from headwater.spec.amounts import path as path_of
from headwater.spec.amounts import shown
from headwater.worker.model_spec import as_array

Key: TypeAlias = int | str
Value: TypeAlias = Any
"""An array: whatever `numpy.asarray` takes, of float32, float16 or float64."""


def pairs_of(key: Any, value: Any) -> list[tuple[Key, Any]]:
    """Keys with what is given for each."""
    if not isinstance(key, list | tuple):
        return [(key, value)]
    if not isinstance(value, list | tuple) or len(value) != len(key):
        got = len(value) if isinstance(value, list | tuple) else "one value"
        raise UsageError(
            f"got {len(key)} keys and {got}: pass a list with one value, or list of values, a key"
        )
    return list(zip(key, value, strict=True))


def array_of(key: Key, value: Any) -> NDArray[Any]:
    """A key's value as an array of floating point numbers. Raises GradientError."""
    array = as_array(f"key {key!r}", value)
    if array.dtype.kind != "f":
        raise GradientError(f"key {key!r}: got an array of {array.dtype}, expected floating point numbers")
    return array


def check_key(key: Any, others: Iterable[Key]) -> Key:
    """A key, of the kind of those that there are. Raises UsageError."""
    if isinstance(key, bool) or not isinstance(key, numbers.Integral | str):
        raise UsageError(f"keys are integers or texts, got {shown(key)}")
    found: Key = str(key) if isinstance(key, str) else int(key)
    other = next(iter(others), found)
    if isinstance(found, int) != isinstance(other, int):
        raise UsageError(f"key {key!r} is of another type than {other!r}: use integers only, or texts only")
    return found


def rows_of(key: Key, shape: tuple[int, ...], ids: Any) -> NDArray[np.int64]:
    """Row ids as int64[n]. Raises GradientError: out of range, or of another kind."""
    if not shape:
        raise GradientError(f"key {key!r} is a scalar and has no rows")
    given = as_array(f"row ids of key {key!r}", ids)
    if given.size == 0:
        return np.empty(0, dtype=np.int64)
    if given.dtype.kind == "f" and not (np.isfinite(given) & (np.trunc(given) == given)).all():
        raise GradientError(f"key {key!r}: row ids must be integers, got {given.dtype}")
    whole = given.reshape(-1).astype(np.int64)
    if whole.min() < 0 or whole.max() >= shape[0]:
        raise GradientError(
            f"key {key!r} has rows 0 to {shape[0] - 1}, got ids from {whole.min()} to {whole.max()}"
        )
    return whole


def targets_of(out: Any) -> list[NDArray[Any]]:
    """The arrays that `out` names."""
    return list(out) if isinstance(out, list | tuple) else [out]


def check_out(key: Key, shape: tuple[int, ...], out: Any) -> None:
    """Whether a value of this shape can be written to `out`. Raises GradientError."""
    for target in targets_of(out) if out is not None else ():
        got = getattr(target, "shape", None)
        if got is None or tuple(got) != shape or not hasattr(target, "__setitem__"):
            what = f"of shape {tuple(got)}" if got is not None else f"a {type(target).__name__}"
            raise GradientError(f"key {key!r} has shape {shape}, got out= {what}: pass an array of its shape")


def in_place(value: Any) -> Any:
    """MXNet's pushpull without `out` writes to the pushed arrays; read-only ones get a new array."""
    arrays = targets_of(value)
    writable = all(isinstance(one, np.ndarray) and one.flags.writeable for one in arrays)
    return value if writable else None


def written_to(value: NDArray[Any], out: Any) -> Any:
    """The value, in `out` where there is one."""
    if out is None:
        return value
    for target in targets_of(out):
        target[...] = value
    return out


def npz(fname: str) -> Path:
    """The name that NumPy gives the file."""
    path = Path(path_of("the file of optimizer states", fname))
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
