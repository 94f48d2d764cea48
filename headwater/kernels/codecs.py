"""Gradients to bytes and back, with what is lost left behind; one pass each, which releases the GIL.

`encode` takes the sum of a gradient and what earlier ones lost, and leaves there what this one loses. Servers
and the worker's own window both get what `decode` makes of the bytes, so no result depends on whether they
travelled.

Formats, little-endian, of n elements from number `first` of a model's vector on:

- bf16, fp16: n values of 2 bytes.
- int8: a float32 scale for each block that is touched, then n signed bytes.
- q4: a float32 magnitude for each block that is touched, then n half bytes, the lower half first: the sign in
  the highest bit, the level in the other three.
- topk: a uint32 count, so many uint32 positions from 0, so many float32 values.
- 2bit: four to a byte from the highest bits on: 11 is +threshold, 10 is −threshold, 00 is 0.
- 1bit: eight to a byte from the highest bit on: 1 is +1, 0 is −1.
- Rows of a table: bf16 and fp16 as above, one row after the other; int8: a float32 scale for each row, then
  the signed bytes of all.

A block of int8 or q4 with a value that is not finite decodes to NaN. Such a value leaves nothing behind; only
topk may keep it for later. (Both MXNet forms: gradient_compression-inl.h.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError
from headwater.kernels.cache import load
from headwater.spec.codecs import BLOCK, Codec, RowCodec, TopK, blocks

_HALF_MOST = np.float32(65504)


def encode(
    codec: Codec, total: NDArray[np.float32], first: int, cuts: Sequence[int]
) -> list[NDArray[np.uint8]]:
    """Represent a tensor in pieces, one for each server that has a part of it.

    Args:
        total: float32[n], contiguous: a gradient and what is left of earlier ones. Afterwards it is what
            this one leaves.
        first: number of the tensor's first element in the model's vector.
        cuts: where pieces end, ascending, the last one n; a cut inside of the tensor is a multiple of `BLOCK`
            in the vector.

    Returns:
        the bytes of each piece, in new arrays.
    """
    chosen = _largest(total, codec.count(len(total))) if isinstance(codec, TopK) else None
    pieces = []
    start = 0
    for stop in cuts:
        part = total[start:stop]
        if chosen is not None:
            pieces.append(_encode_sparse(part, chosen[start:stop]))
        else:
            out = np.zeros(codec.size(first + start, stop - start), dtype=np.uint8)
            _encode_dense(codec, part, first + start, out)
            pieces.append(out)
        start = stop
    return pieces


def decode(codec: Codec, data: NDArray[np.uint8], first: int, out: NDArray[np.float32]) -> None:
    """Write what `data` stands for to `out`, float32[n] and contiguous, from number `first` of the vector on.

    Raises:
        ProtocolError: `data` is no representation of n elements; `out` may have been written to.
    """
    if isinstance(codec, TopK):
        _decode_sparse(data, out)
        return
    expected = codec.size(first, len(out))
    if len(data) != expected:
        raise ProtocolError(f"{len(out)} elements as {codec} take {expected} bytes, got {len(data)}")
    if len(out) == 0:
        return
    if codec.kind == "fp16":
        out[:] = data.view(np.float16)
    elif codec.kind == "bf16":
        np.left_shift(data.view(np.uint16).astype(np.uint32), 16, out=out.view(np.uint32))
    elif codec.kind in ("int8", "q4"):
        scales, codes = _split(data, first, len(out))
        getattr(compiled(), f"decode_{codec.kind}")(scales, codes, first % BLOCK, out)
    else:
        getattr(compiled(), f"decode_{_NAMES[codec.kind]}")(data, _threshold(codec), out)


def represent(codec: Codec, values: NDArray[np.float32], first: int) -> None:
    """Make `values`, float32[n] and contiguous, what their bytes stand for, in place."""
    (data,) = encode(codec, values.copy(), first, [len(values)])
    decode(codec, data, first, values)


def encode_rows(codec: RowCodec, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Represent `rows`, float32[n, dim] and contiguous, each by itself; uint8[n · codec.row_size(dim)]."""
    count, dim = rows.shape
    out = np.zeros(count * codec.row_size(dim), dtype=np.uint8)
    if codec.kind == "int8":
        scales, codes = out[: 4 * count].view(np.float32), out[4 * count :].reshape(count, dim)
        compiled().encode_rows_int8(rows, scales, codes)
    else:
        _encode_dense(codec, rows.reshape(-1).copy(), 0, out)
    return out


def decode_rows(codec: RowCodec, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Write what `data` stands for to `out`, float32[n, dim] and contiguous.

    Raises:
        ProtocolError: `data` is no representation of so many rows.
    """
    count, dim = out.shape
    if len(data) != count * codec.row_size(dim):
        raise ProtocolError(f"{count} rows of {dim} as {codec}, got {len(data)} bytes")
    if codec.kind == "int8":
        scales, codes = _aligned(data[: 4 * count]), data[4 * count :].reshape(count, dim)
        compiled().decode_rows_int8(scales, codes, out)
    else:
        decode(codec, data, 0, out.reshape(-1))


def _encode_dense(codec: Codec, part: NDArray[np.float32], first: int, out: NDArray[np.uint8]) -> None:
    if len(part) == 0:
        return
    if codec.kind in ("fp16", "bf16"):
        if codec.kind == "fp16":
            out.view(np.float16)[:] = np.clip(part, -_HALF_MOST, _HALF_MOST)
        else:
            compiled().encode_bf16(part.view(np.uint32), out.view(np.uint16))
        sent = np.empty_like(part)
        decode(codec, out, first, sent)
        with np.errstate(invalid="ignore"):
            np.subtract(part, sent, out=part)
        part[np.isnan(part)] = 0
    elif codec.kind in ("int8", "q4"):
        scales, codes = _split(out, first, len(part))
        getattr(compiled(), f"encode_{codec.kind}")(part, first % BLOCK, scales, codes)
    else:
        getattr(compiled(), f"encode_{_NAMES[codec.kind]}")(part, _threshold(codec), out)


_NAMES = {"2bit": "two_bit", "1bit": "one_bit"}


def _threshold(codec: Any) -> float:
    return float(codec.threshold)


def _split(data: NDArray[np.uint8], first: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The scales and the codes behind them; scales of data that came from elsewhere may lie unaligned."""
    end = 4 * blocks(first, n)
    return _aligned(data[:end]), data[end:]


def _aligned(scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (scales if scales.ctypes.data % 4 == 0 else scales.copy()).view(np.float32)


# ── the largest of a tensor ─────────────────────────────────────────────────────────────────────


def _largest(total: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Which `count` elements are largest in magnitude; of equal ones the first. NaN counts as largest."""
    size = np.abs(total)
    size[np.isnan(size)] = np.inf
    edge = np.partition(size, len(size) - count)[len(size) - count] if len(size) else np.float32(0)
    chosen: NDArray[np.bool_] = size > edge
    equal = np.flatnonzero(size == edge)[: count - int(chosen.sum())]
    chosen[equal] = True
    return chosen


def _encode_sparse(part: NDArray[np.float32], chosen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    places = np.flatnonzero(chosen).astype("<u4")
    values = part[places].astype("<f4")
    part[places] = 0
    count = np.array([len(places)], dtype="<u4")
    return np.concatenate([count.view(np.uint8), places.view(np.uint8), values.view(np.uint8)])


def _decode_sparse(data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    count = int.from_bytes(data[:4].tobytes(), "little")
    if len(data) != 4 + 8 * count or count > len(out):
        raise ProtocolError(f"{len(data)} bytes of topk for {count} of {len(out)} elements")
    places = data[4 : 4 + 4 * count].copy().view("<u4")
    if count and int(places.max()) >= len(out):
        raise ProtocolError(f"topk names element {int(places.max())} of {len(out)}")
    out[:] = 0
    out[places] = data[4 + 4 * count :].copy().view("<f4")


@functools.cache
def compiled() -> ModuleType:
    """The loops; blocks while they are compiled."""
    return load(TEXT)


TEXT = f'''"""Generated by headwater.kernels.codecs: gradients to bytes and back."""

import math

from numba import float32, int32, uint8, uint16, uint32

from headwater.kernels.primitives import *

SHARED = {BLOCK}


@inner
def round_to_even(value):
    """Adding and taking away 1.5 · 2^23 leaves the nearest integer; magnitudes here are at most 127."""
    return (value + float32(12582912)) - float32(12582912)


@inner
def largest(total, start, stop):
    """The largest magnitude; NaN where there is a value that is not finite."""
    most = float32(0)
    strange = int32(0)
    for i in range(start, stop):
        most = max(most, abs(total[i]))
        strange |= int32(not math.isfinite(total[i]))
    return most if strange == 0 else float32(math.nan)


@outer("void(uint32[::1], uint16[::1])")
def encode_bf16(bits, out):
    for i in range(len(bits)):
        word = bits[i]
        if word & uint32(0x7FFFFFFF) > uint32(0x7F800000):
            half = (word >> uint32(16)) | uint32(0x40)
        else:
            half = (word + uint32(0x7FFF) + ((word >> uint32(16)) & uint32(1))) >> uint32(16)
            if half & uint32(0x7FFF) == uint32(0x7F80) and word & uint32(0x7FFFFFFF) != uint32(0x7F800000):
                half -= uint32(1)
        out[i] = uint16(half)


@outer("void(float32[::1], int64, float32[::1], uint8[::1])")
def encode_int8(total, first, scales, codes):
    start = 0
    for block in range(len(scales)):
        stop = min((block + 1) * SHARED - first, len(total))
        scale = largest(total, start, stop) / float32(127)
        scales[block] = scale
        for i in range(start, stop):
            code = float32(0)
            if scale > float32(0):
                code = min(max(round_to_even(total[i] / scale), float32(-127)), float32(127))
            codes[i] = uint8(int32(code) & 0xFF)
            total[i] = float32(0) if math.isnan(scale) else total[i] - code * scale
        start = stop


@outer("void(float32[::1], uint8[::1], int64, float32[::1])")
def decode_int8(scales, codes, first, out):
    for i in range(len(out)):
        code = int32(codes[i])
        code = code - 256 if code > 127 else code
        out[i] = float32(code) * scales[(first + i) // SHARED]


@outer("void(float32[:, ::1], float32[::1], uint8[:, ::1])")
def encode_rows_int8(rows, scales, codes):
    for row in range(len(rows)):
        most = float32(0)
        strange = int32(0)
        for i in range(rows.shape[1]):
            most = max(most, abs(rows[row, i]))
            strange |= int32(not math.isfinite(rows[row, i]))
        scale = most / float32(127) if strange == 0 else float32(math.nan)
        scales[row] = scale
        for i in range(rows.shape[1]):
            code = float32(0)
            if scale > float32(0):
                code = min(max(round_to_even(rows[row, i] / scale), float32(-127)), float32(127))
            codes[row, i] = uint8(int32(code) & 0xFF)


@outer("void(float32[::1], uint8[:, ::1], float32[:, ::1])")
def decode_rows_int8(scales, codes, out):
    for row in range(len(out)):
        for i in range(out.shape[1]):
            code = int32(codes[row, i])
            out[row, i] = float32(code - 256 if code > 127 else code) * scales[row]


@outer("void(float32[::1], int64, float32[::1], uint8[::1])")
def encode_q4(total, first, scales, codes):
    start = 0
    for block in range(len(scales)):
        stop = min((block + 1) * SHARED - first, len(total))
        most = largest(total, start, stop)
        scales[block] = most
        for i in range(start, stop):
            size = abs(total[i])
            step = most
            level = 7
            while level > 1 and size < float32(0.75) * step:
                step *= float32(0.5)
                level -= 1
            if most == float32(0) or (level == 1 and size < float32(0.5) * step):
                step = float32(0)
                level = 0
            negative = total[i] < float32(0) and level > 0
            nibble = level | (8 if negative else 0)
            if i % 2 == 0:
                codes[i // 2] = uint8(nibble)
            else:
                codes[i // 2] |= uint8(nibble << 4)
            lost = total[i] + step if negative else total[i] - step
            total[i] = float32(0) if math.isnan(most) else lost
        start = stop


@outer("void(float32[::1], uint8[::1], int64, float32[::1])")
def decode_q4(scales, codes, first, out):
    for i in range(len(out)):
        nibble = int32(codes[i // 2])
        nibble = nibble >> 4 if i % 2 else nibble & 15
        level = nibble & 7
        step = scales[(first + i) // SHARED]
        if level == 0:
            step = step * float32(0)
        else:
            for k in range(7 - level):
                step *= float32(0.5)
        out[i] = -step if nibble & 8 else step


@outer("void(float32[::1], float64, uint8[::1])")
def encode_two_bit(total, threshold_, out):
    threshold = float32(threshold_)
    for i in range(len(total)):
        code = 0
        if total[i] >= threshold:
            code = 3
            total[i] -= threshold
        elif total[i] <= -threshold:
            code = 2
            total[i] += threshold
        elif math.isnan(total[i]):
            total[i] = float32(0)
        out[i // 4] |= uint8(code << (6 - 2 * (i % 4)))


@outer("void(uint8[::1], float64, float32[::1])")
def decode_two_bit(data, threshold_, out):
    threshold = float32(threshold_)
    for i in range(len(out)):
        code = (int32(data[i // 4]) >> (6 - 2 * (i % 4))) & 3
        out[i] = threshold if code == 3 else -threshold if code == 2 else float32(0)


@outer("void(float32[::1], float64, uint8[::1])")
def encode_one_bit(total, threshold_, out):
    threshold = float32(threshold_)
    for i in range(len(total)):
        if total[i] > threshold:
            out[i // 8] |= uint8(128 >> (i % 8))
            total[i] -= float32(1)
        elif math.isnan(total[i]):
            total[i] = float32(0)
        else:
            total[i] += float32(1)


@outer("void(uint8[::1], float64, float32[::1])")
def decode_one_bit(data, threshold_, out):
    for i in range(len(out)):
        out[i] = float32(1) if int32(data[i // 8]) & (128 >> (i % 8)) else float32(-1)
'''
