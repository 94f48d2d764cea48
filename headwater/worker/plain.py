"""Plain data and arrays as bytes and back: what a program keeps, gathers and broadcasts.

Numbers, texts, bytes, None, lists, tuples, dicts, arrays and tensors come back as what they were; arrays of
other libraries come back as NumPy arrays. Nothing that is decoded runs code. MessagePack, with one extension
type for each kind that it does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.errors import UsageError

_ARRAY, _SCALAR, _TENSOR, _TUPLE, _PAIRS, _LARGE = range(1, 7)
_DEEPEST = 100

_encode = msgspec.msgpack.Encoder().encode


def encode(value: Any, name: str) -> bytes:
    """`value` as bytes; `name`: what to call it in an error.

    Raises:
        UsageError: it holds something that is neither plain data nor an array; names where.
    """
    return _encode(_plain(value, name, 0))


def decode(data: bytes) -> Any:
    """The inverse of `encode`; arrays are copies of the caller's own."""
    return _decoder.decode(data)


def _plain(value: Any, name: str, depth: int) -> Any:
    """The same in what the encoder knows."""
    if depth > _DEEPEST:
        raise UsageError(f"{name} is nested more than {_DEEPEST} levels deep: keep something flatter")
    if value is None or (isinstance(value, bool | float | str | bytes | bytearray) and _is_own(value)):
        if isinstance(value, str) and not _is_text(value):
            raise UsageError(
                f"{name} is {value!r}, which is no text that UTF-8 has; nothing was kept or sent"
            )
        return value
    if isinstance(value, int) and type(value) is int:
        fits = -(2**63) <= value < 2**64
        return value if fits else msgspec.msgpack.Ext(_LARGE, str(value).encode())
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else msgspec.msgpack.Ext(_TUPLE, _encode(items))
    if isinstance(value, Mapping):
        return _mapping(value, name, depth)
    return _array(value, name)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, as names of files may have
        return False
    return True


def _is_own(value: Any) -> bool:
    """NumPy's float64 and str_ are floats and strings too, and are to come back as what they are."""
    return not isinstance(value, np.generic)


def _mapping(value: Mapping[Any, Any], name: str, depth: int) -> Any:
    items = [(key, _plain(item, f"{name}[{key!r}]", depth + 1)) for key, item in value.items()]
    if all(type(key) is str and _is_text(key) for key, _ in items):
        return dict(items)
    pairs = [[_plain(key, f"a key of {name}", depth + 1), item] for key, item in items]
    return msgspec.msgpack.Ext(_PAIRS, _encode(pairs))


def _array(value: Any, name: str) -> msgspec.msgpack.Ext:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, np.generic):
        return msgspec.msgpack.Ext(_SCALAR, _packed(np.asarray(value), name))
    if isinstance(value, np.ndarray) or hasattr(value, "__array__") or hasattr(value, "__dlpack__"):
        return msgspec.msgpack.Ext(_ARRAY, _packed(np.asarray(value), name))
    raise UsageError(
        f"{name} is a {type(value).__name__}: expected plain data (numbers, texts, bytes, lists, tuples, "
        f"dicts) or arrays; nothing was kept or sent"
    )


def _packed(array: NDArray[Any], name: str) -> bytes:
    if array.dtype.hasobject or array.dtype.kind == "V":
        raise UsageError(f"{name} is an array of {array.dtype}: expected numbers, texts or bytes")
    return _encode((array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()))


def _tensor(value: Any) -> msgspec.msgpack.Ext:
    torch = sys.modules["torch"]
    own = value.detach().cpu().contiguous()
    data = own.reshape(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b""
    packed = _encode((str(own.dtype).removeprefix("torch."), tuple(own.shape), data))
    return msgspec.msgpack.Ext(_TENSOR, packed)


def _extension(code: int, data: memoryview) -> Any:
    if code == _LARGE:
        return int(bytes(data))
    content = _decoder.decode(data)
    if code == _TUPLE:
        return tuple(content)
    if code == _PAIRS:
        return {key: item for key, item in content}  # noqa: C416 - keys may be tuples, which `dict` takes
    dtype, shape, raw = content
    if code == _TENSOR:
        import torch  # whoever kept a tensor has it

        flat = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)) if raw else torch.empty(0)
        return flat.to(getattr(torch, dtype)).reshape(shape)
    array = np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
    return array[()] if code == _SCALAR else array


_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Any, ext_hook=_extension)
