"""Codecs: each against a plain definition; what is lost stays; pieces of any cut mean the same."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater.errors import ConfigurationError, ProtocolError
from headwater.kernels.codecs import decode, encode
from headwater.spec.codecs import BLOCK, TopK, parse_codec

ml_dtypes = pytest.importorskip("ml_dtypes")

ALL = ["bf16", "fp16", "int8", "q4", "topk:0.1", "2bit:0.5", "1bit:0.0"]


def there_and_back(codec, gradient, residual, first=0, cuts=None):
    """What servers get, and what is left."""
    with np.errstate(invalid="ignore"):
        total = (gradient + residual).astype(np.float32)
    n = len(total)
    out = np.full(n, np.nan, np.float32)
    start = 0
    pieces = encode(codec, total, first, cuts or [n])
    for stop, data in zip(cuts or [n], pieces, strict=True):
        decode(codec, data, first + start, out[start:stop])
        start = stop
    return out, total


# ── plain definitions ───────────────────────────────────────────────────────────────────────────


def plain(codec, x, first):
    """What `x` is represented as, element by element, in NumPy."""
    kind = codec.kind
    if kind == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if kind == "fp16":
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    if kind in ("int8", "q4"):
        out = np.empty_like(x)
        block = (first + np.arange(len(x))) // BLOCK
        for b in np.unique(block):
            mine = block == b
            out[mine] = (plain_int8 if kind == "int8" else plain_q4)(x[mine])
        return out
    if kind == "topk":
        order = np.argsort(-np.abs(x), kind="stable")[: codec.count(len(x))]
        out = np.zeros_like(x)
        out[order] = x[order]
        return out
    t = np.float32(codec.threshold)
    if kind == "2bit":
        return np.where(x >= t, t, np.where(x <= -t, -t, 0)).astype(np.float32)
    return np.where(x > t, 1, -1).astype(np.float32)


def plain_int8(x):
    scale = np.float32(np.abs(x).max() / np.float32(127))
    return np.rint(x / scale).astype(np.float32) * scale if scale > 0 else np.zeros_like(x)


def plain_q4(x):
    most = np.abs(x).max()
    levels = np.array([0, *(most * np.float32(2.0**k) for k in range(-6, 1))], np.float32)
    far = np.abs(np.abs(x)[:, None].astype(np.float64) - levels[None].astype(np.float64))
    nearest = len(levels) - 1 - np.argmin(far[:, ::-1], axis=1)
    return np.copysign(levels[nearest], x) * (levels[nearest] > 0)


@pytest.mark.parametrize("text", ALL)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 900), offset=st.integers(0, 700))
@examples(40)
def test_each_codec_is_its_plain_definition(text, seed, n, offset):
    codec, chance = parse_codec(text), np.random.default_rng(seed)
    gradient = (chance.standard_normal(n) * 10.0 ** chance.integers(-3, 3)).astype(np.float32)
    gradient[chance.random(n) < 0.1] = 0
    got, left = there_and_back(codec, gradient, np.zeros(n, np.float32), offset)
    assert np.array_equal(got, plain(codec, gradient, offset)), text
    assert np.array_equal(left, gradient - got)


@pytest.mark.parametrize("text", ALL)
@given(seed=st.integers(0, 10_000), blocks=st.lists(st.integers(0, 6), max_size=4))
@examples(25)
def test_where_a_tensor_is_cut_between_servers_changes_nothing(text, seed, blocks):
    codec, chance = parse_codec(text), np.random.default_rng(seed)
    n, first = 1300, 100
    cuts = [*sorted({BLOCK * b - first for b in blocks if 0 < BLOCK * b - first < n}), n]
    gradient, residual = chance.standard_normal((2, n)).astype(np.float32)
    whole, left = there_and_back(codec, gradient, residual, first)
    cut, left_cut = there_and_back(codec, gradient, residual, first, cuts)
    assert whole.tobytes() == cut.tobytes()
    assert left.tobytes() == left_cut.tobytes()


@pytest.mark.parametrize("text", ["int8", "q4", "topk:0.25", "2bit:0.5", "1bit:0.0", "bf16", "fp16"])
def test_what_was_sent_and_what_is_left_are_the_sum_of_all_gradients(text):
    """Small integers and powers of two are summed exactly; the rest up to float32's rounding."""
    codec, chance = parse_codec(text), np.random.default_rng(7)
    n, steps = 600, 30
    exact = text in ("2bit:0.5", "1bit:0.0", "topk:0.25", "bf16", "fp16")
    residual, sent, total = np.zeros(n, np.float32), np.zeros(n), np.zeros(n)
    for _ in range(steps):
        gradient = chance.integers(-8, 9, n).astype(np.float32) / 4
        got, residual = there_and_back(codec, gradient, residual)
        sent += got
        total += gradient
    difference = np.abs(sent + residual - total).max()
    assert difference == 0 if exact else difference <= 1e-4


def test_every_bfloat16_is_sent_exactly_and_the_largest_stay_finite():
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    values = bits.view(np.float32)
    finite = np.isfinite(values)
    got, left = there_and_back(parse_codec("bf16"), values, np.zeros_like(values))
    assert np.array_equal(got[finite], values[finite])
    assert not left[finite].any()
    assert np.isnan(got[np.isnan(values)]).all()
    most = np.array([3.4028235e38, -3.4028235e38], np.float32)
    got, left = there_and_back(parse_codec("bf16"), most, np.zeros(2, np.float32))
    assert np.isfinite(got).all()
    assert np.array_equal(got + left, most)


def test_halves_are_clipped_and_the_rest_goes_out_later():
    codec, residual, sent = parse_codec("fp16"), np.zeros(1, np.float32), 0.0
    for gradient in (100_000.0, 0.0, 0.0):
        got, residual = there_and_back(codec, np.array([gradient], np.float32), residual)
        sent += got[0]
    assert (sent, residual[0]) == (100_000.0, 0.0)


def test_values_that_q4_can_say_come_back_exactly():
    levels = np.array([0, *(2.0**k for k in range(-6, 1))], np.float32) * np.float32(3)
    values = np.concatenate([levels, -levels])
    got, left = there_and_back(parse_codec("q4"), values, np.zeros_like(values))
    assert np.array_equal(got, values)
    assert not left.any()


def test_two_bits_are_packed_from_the_highest_on_as_mxnet_has_them():
    total = np.array([1, -1, 0, 0.5, -0.5], np.float32)
    (data,) = encode(parse_codec("2bit:0.5"), total, 0, [5])
    assert data.tolist() == [0b11_10_00_11, 0b10_00_00_00]
    assert total.tolist() == [0.5, -0.5, 0, 0, 0]


def test_one_bit_is_packed_from_the_highest_on_as_mxnet_has_it():
    total = np.array([2, -2, 0, 1, 0, 0, 0, 0, 3], np.float32)
    (data,) = encode(parse_codec("1bit:0"), total, 0, [9])
    assert data.tolist() == [0b10010000, 0b10000000]
    assert total.tolist() == [1, -1, 1, 0, 1, 1, 1, 1, 2]


def test_mxnets_sequences_of_compressed_pushes():
    """What four equal workers' pushes add up to at rate 2 (MXNet, tests/nightly/test_kvstore.py)."""
    for text, pushes, expected in (
        ("2bit:0.5", [0.4, 0.2, 0.2, 0.2], [0, 4, 4, 8]),
        ("1bit:0", [2, 0, -2], [8, 16, 8]),
    ):
        residual, value, seen = np.zeros(1, np.float32), 0.0, []
        for push in pushes:
            got, residual = there_and_back(parse_codec(text), np.array([push], np.float32), residual)
            value += 2 * 4 * float(got[0])
            seen.append(value)
        assert seen == expected, text


@pytest.mark.parametrize("text", [text for text in ALL if not text.startswith("topk")])
def test_a_value_that_is_not_finite_leaves_nothing_behind(text):
    codec = parse_codec(text)
    gradient = np.array([1, math.nan, 2, math.inf] * 4, np.float32)
    _, left = there_and_back(codec, gradient, np.zeros(16, np.float32))
    assert not np.isnan(left).any(), text


@pytest.mark.parametrize(("text", "size"), [("bf16", 2.0), ("fp16", 2.0), ("q4", 0.516), ("int8", 1.016)])
def test_bytes_an_element(text, size):
    total = np.ones(1 << 16, np.float32)
    assert sum(map(len, encode(parse_codec(text), total, 0, [1 << 16]))) / (1 << 16) == pytest.approx(
        size, abs=1e-3
    )


def test_at_least_one_element_is_sent_and_at_most_all():
    assert [TopK(0.001).count(n) for n in (1, 5, 1000, 1001)] == [1, 1, 1, 2]
    assert TopK(1).count(7) == 7


@pytest.mark.parametrize("text", ALL)
def test_damaged_bytes_are_refused(text):
    codec = parse_codec(text)
    (data,) = encode(codec, np.ones(100, np.float32), 0, [100])
    with pytest.raises(ProtocolError):
        decode(codec, data[:-1], 0, np.empty(100, np.float32))
    with pytest.raises(ProtocolError):
        decode(codec, np.concatenate([data, data[:1]]), 0, np.empty(100, np.float32))


def test_a_position_beyond_the_tensor_is_refused():
    data = np.frombuffer(np.array([1, 100], "<u4").tobytes() + np.float32(1).tobytes(), np.uint8)
    with pytest.raises(ProtocolError, match="names element 100 of 100"):
        decode(TopK(0.1), data, 0, np.empty(100, np.float32))


def test_a_codec_is_written_as_it_is_read():
    for text in ALL:
        assert str(parse_codec(text)) == text
        assert parse_codec(parse_codec(text)) == parse_codec(text)
    assert parse_codec(None) is None


@pytest.mark.parametrize(
    "text", ["zip", "topk", "topk:0", "topk:2", "topk:x", "2bit:0", "2bit:-1", "int8:3", 7, ""]
)
def test_an_impossible_codec_is_refused(text):
    with pytest.raises(ConfigurationError, match="codec"):
        parse_codec(text)
