"""The user's own settings, which every worker gets: plain data, checked where it is given.

Invariant: what `checked` accepts arrives in every worker as `checked` returned it, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from headwater.errors import ConfigurationError

_LARGEST = 1 << 20
"""Bytes that all settings together may take on their way."""
_DEEPEST = 50


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same as None, bool, int, float, str, lists and dicts: tuples become lists, NumPy's scalars
    Python's.

    Raises:
        ConfigurationError: a value of another type, a key that is no text, or too much of it; names the key.
    """
    if not isinstance(settings, Mapping):
        raise ConfigurationError(
            f"settings: got a {type(settings).__name__}, expected a dict of names and values"
        )
    plain: dict[str, Any] = _mapping(settings, "settings", 0)
    size = len(pack(plain))
    if size > _LARGEST:
        raise ConfigurationError(
            f"settings take {size:,} bytes, at most {_LARGEST:,} are passed on: "
            "put large data into a file that all workers reach, and pass its path"
        )
    return plain


def pack(settings: Mapping[str, Any]) -> bytes:
    """What `checked` returned, as bytes."""
    return msgspec.msgpack.encode(settings)


def unpack(packed: bytes) -> dict[str, Any]:
    """What `pack` packed."""
    return msgspec.msgpack.decode(packed, type=dict[str, Any])


def _mapping(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    for key in value:
        if type(key) is not str:
            raise ConfigurationError(f"{where}: the key {key!r} is a {type(key).__name__}, expected a text")
        _check_text(key, where)
    return {key: _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ConfigurationError(f"{where} is nested more than {_DEEPEST} levels deep, or contains itself")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, float, str):
        if type(value) is str:
            _check_text(value, where)
        return value
    if type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise ConfigurationError(f"{where} is {value}, expected an integer of 64 bits: pass it as a text")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _mapping(value, where, depth)
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}: expected None, a bool, a number, a text, or lists and dicts "
        "of those, since it travels to every worker: pass str(…) of it, or have train make it"
    )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as names of files may have
        raise ConfigurationError(
            f"{where}: {text!r} cannot be encoded as UTF-8, so it cannot travel"
        ) from error
