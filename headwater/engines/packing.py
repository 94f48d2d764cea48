"""What crosses between an engine and the processes it starts, pickled: `train` one way, outcomes the other.

It goes over what the engine has for its processes alone (a pipe; Ray's own calls), never over the wire.

Invariant: an outcome always arrives. What of it cannot be pickled, or cannot be unpickled here because a
module is missing, becomes an error that says so; the text and the traceback of an exception travel as text.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

from headwater.engines.engine import Failure, Trained, words_of
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


def pack_outcome(trained: Trained | None, failure: Failure | None) -> bytes:
    """How a node ended, in parts of which each can be lost without the others."""
    value, error = b"", b""
    if trained is not None:
        try:
            value = cloudpickle.dumps(trained.value)
        except Exception as raised:  # noqa: BLE001 - whatever a user's object raises while it is pickled
            failure = Failure(
                f"the value that train returned cannot be pickled "
                f"({_kind(trained.value)}: {words_of(raised)})",
                "",
                None,
            )
    if failure is not None and failure.error is not None:
        try:
            error = cloudpickle.dumps(failure.error)
            cloudpickle.loads(error)  # some exceptions can be written and not be read: their text is enough
        except Exception:  # noqa: BLE001 - as above
            error = b""
    told = ("", 0) if trained is None else (_kind(trained.value), trained.generation)
    words = None if failure is None else (failure.summary, failure.trace, failure.died)
    return pickle.dumps((value, told, words, error))


def unpack_outcome(packed: bytes) -> tuple[Trained | None, Failure | None]:
    """What `pack_outcome` packed in another process."""
    value, (kind, generation), words, error = pickle.loads(packed)
    if words is not None:
        return None, Failure(words[0], words[1], _exception(error), words[2])
    try:
        return Trained(cloudpickle.loads(value), generation), None
    except Exception as raised:  # noqa: BLE001 - whatever a user's object raises while it is unpickled
        return None, Failure(
            f"the value that train returned, a {kind}, cannot be read in the process that called run "
            f"({words_of(raised)}): "
            "return plain data or arrays, or objects of modules that both can import",
            "",
            None,
        )


def _exception(packed: bytes) -> BaseException | None:
    """An exception as an object, where this process can have it: its text and traceback are there anyway."""
    try:
        found = cloudpickle.loads(packed) if packed else None
    except Exception:  # noqa: BLE001 - as above
        return None
    return found if isinstance(found, BaseException) else None


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _importable(name: str) -> bool:
    """Whether a fresh interpreter with this one's path finds the module: being loaded here proves nothing."""
    package = name.partition(".")[0]
    specs = (finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next((spec for spec in specs if spec is not None), None)
    if spec is None:
        return False
    inside = spec.origin in ("built-in", "frozen")
    return inside or bool(spec.submodule_search_locations) or os.path.exists(spec.origin or "")
