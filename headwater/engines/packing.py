"""What crosses between an engine and the processes it starts, pickled: `train` one way, outcomes the other.

It goes over what the engine has for its processes alone (a pipe; Ray's own calls), never over the wire.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

from headwater.engines.engine import Failure
from headwater.errors import EngineError


def pack_train(train: Callable[..., Any]) -> bytes:
    """`train` by reference where a fresh interpreter can import its module, by value otherwise.

    Raises:
        EngineError: it, or something that it refers to, cannot be pickled.
    """
    module = sys.modules.get(getattr(train, "__module__", ""))
    by_value = module is not None and module.__name__ != "__main__" and not _importable(module.__name__)
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled: bytes = cloudpickle.dumps(train)
    except Exception as error:
        raise EngineError(f"train cannot be sent to a worker process: {error}") from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return pickled


def pack_outcome(value: Any, failure: Failure | None) -> bytes:
    """Pickle how a node ended; an exception or a value that cannot be pickled becomes its text."""
    try:
        packed: bytes = cloudpickle.dumps((value, failure))
        cloudpickle.loads(packed)
    except Exception as error:  # noqa: BLE001 - whatever a user's object raises while it is pickled
        if failure is None:
            failure = Failure(f"the value that train returned cannot be pickled: {error}", "", None)
        packed = cloudpickle.dumps((None, Failure(failure.summary, failure.trace, None)))
    return packed


def _importable(name: str) -> bool:
    """Whether a fresh interpreter with this one's path finds the module: being loaded here proves nothing."""
    package = name.partition(".")[0]
    specs = (finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next((spec for spec in specs if spec is not None), None)
    if spec is None:
        return False
    inside = spec.origin in ("built-in", "frozen")
    return inside or bool(spec.submodule_search_locations) or os.path.exists(spec.origin or "")
