"""Classes and functions of a script, pickled on from a worker to processes that it starts.

A worker has those of the user's script by value: no module of its own, or one that nobody else can import.
`multiprocessing` pickles by reference, so a data set whose class the script defines could not go to the
processes of a DataLoader that are spawned, or come from a fork server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

import cloudpickle


def hand_on_by_value() -> None:
    """From now on this process's `multiprocessing` pickles by value what a new process could not import."""
    ForkingPickler.reducer_override = _reduced  # type: ignore[assignment, method-assign]


def _reduced(pickler: ForkingPickler, value: Any) -> Any:
    if isinstance(value, type | FunctionType) and not _can_be_imported(value):
        return _loads(), (cloudpickle.dumps(value),)
    return NotImplemented


def _loads() -> Callable[[bytes], Any]:
    return cloudpickle.loads  # type: ignore[no-any-return]


def _can_be_imported(value: type | FunctionType) -> bool:
    """Whether a new process finds it by its module and name."""
    module = sys.modules.get(value.__module__ or "")
    if module is None or (module.__name__ != "__main__" and getattr(module, "__spec__", None) is None):
        return False
    found: Any = module
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value
