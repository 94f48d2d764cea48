"""Frames: what goes in comes out, and nothing a stranger sends raises anything but ProtocolError."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import messages
from headwater.errors import ProtocolError
from headwater.wire.frames import PREFIX_SIZE, VERSION, Limits, Prefix, decode_header, encode, parse_prefix

PULL = messages.Pull(number=3, models=(0, 7), have=41)
REGISTER = messages.Register(
    number=1,
    spec=messages.ModelSpec(
        name="net",
        tensors=(
            messages.TensorSpec("weight", (3, 5), "float32"),
            messages.TensorSpec("bias", (5,), "float32", 1),
        ),
        rules=(
            messages.RuleSpec("Adam", {"lr": messages.RuleSpec("Cosine", {"steps": 10, "peak": 0.1})}),
            messages.RuleSpec("SGD", {"lr": 0.5, "nesterov": True, "note": None}),
        ),
    ),
    window=messages.WindowSpec(size=8192),
)
FRAME = encode(REGISTER, request=9, payload_length=123, flags=1)


def parse(frame, limits=None):
    """Read a whole frame as a receiver does."""
    prefix = parse_prefix(frame, limits or Limits())
    return prefix, decode_header(frame[PREFIX_SIZE : PREFIX_SIZE + prefix.header_length])


def with_field(offset, layout, value):
    """Return FRAME with one field of its prefix replaced."""
    frame = bytearray(FRAME)
    struct.pack_into(layout, frame, offset, value)
    return bytes(frame)


@pytest.mark.parametrize("message", [PULL, REGISTER, messages.Ask(), messages.Entries(entries=())])
def test_a_message_comes_back_equal(message):
    frame = encode(message, request=2**64 - 1, payload_length=2**30, flags=3)
    prefix, decoded = parse(frame)
    assert prefix == Prefix(3, len(frame) - PREFIX_SIZE, 2**30, 2**64 - 1)
    assert decoded == message


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**64 - 1), st.integers(0, 8), st.text(max_size=50))
def test_every_number_and_text_comes_back_equal(number, request, flags, reason):
    message = messages.Waiting(number=number, reason=reason)
    prefix, decoded = parse(encode(message, request=request, flags=flags))
    assert (prefix.request, prefix.flags, decoded) == (request, flags, message)


def test_the_layout_is_the_documented_one():
    assert FRAME[:4] == b"HWTR"
    assert struct.unpack_from("<HHIQQ", FRAME, 4) == (VERSION, 1, len(FRAME) - PREFIX_SIZE, 123, 9)
    assert PREFIX_SIZE == 28


def test_a_prefix_cut_anywhere_is_refused():
    for length in range(PREFIX_SIZE):
        with pytest.raises(ProtocolError, match=f"got {length}"):
            parse_prefix(FRAME[:length], Limits())


def test_a_header_cut_anywhere_is_refused():
    for length in range(len(FRAME) - PREFIX_SIZE):
        with pytest.raises(ProtocolError):
            decode_header(FRAME[PREFIX_SIZE : PREFIX_SIZE + length])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: headwater\r\n", "not a Headwater node"),
        (with_field(4, "<H", VERSION + 1), f"protocol version {VERSION + 1}, expected {VERSION}"),
        (with_field(6, "<H", 0x0101), "unknown flags 0x0101"),
        (with_field(6, "<H", 9), "9 descriptors"),
        (with_field(8, "<I", 2**32 - 1), "4294967295 header bytes"),
        (with_field(12, "<Q", 2**63), "9223372036854775808 payload bytes"),
        (with_field(12, "<Q", 2**64 - 1), "18446744073709551615 payload bytes"),
    ],
)
def test_a_foreign_or_oversized_prefix_is_refused_with_the_reason(frame, reason):
    with pytest.raises(ProtocolError, match=reason):
        parse_prefix(frame, Limits())


@pytest.mark.parametrize("at", [Limits(header=10), Limits(payload=122), Limits(descriptors=0)])
def test_each_limit_is_checked(at):
    with pytest.raises(ProtocolError, match="allowed are"):
        parse_prefix(FRAME, at)
    exact = Limits(header=len(FRAME) - PREFIX_SIZE, payload=123, descriptors=1)
    assert parse_prefix(FRAME, exact).payload_length == 123


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_protocol_errors(data):
    for read in (lambda: parse_prefix(data, Limits()), lambda: decode_header(data), lambda: parse(data)):
        try:
            read()
        except ProtocolError:
            continue


@given(st.integers(0, len(FRAME) * 8 - 1), st.integers(0, len(FRAME) * 8 - 1))
def test_flipped_bits_raise_nothing_but_protocol_errors(first, second):
    frame = bytearray(FRAME)
    for bit in (first, second):
        frame[bit // 8] ^= 1 << bit % 8
    try:
        parse(bytes(frame))
    except ProtocolError:
        pass


def test_deep_nesting_and_huge_counts_are_refused_without_allocating():
    deep = b"\x81\xa1x" * 100_000
    huge = encode(PULL)[PREFIX_SIZE:].replace(b"\x92\x00\x07", b"\xdd\xff\xff\xff\xff\x00\x07")
    settings = b"\x82\xa4name\xa1r\xa8settings\x81\xa1x" * 20_000
    rules = encode(REGISTER)[PREFIX_SIZE:]
    nested = rules[: rules.index(b"\x82\xa4name\xa6Cosine")] + settings
    for header in (deep, huge, nested, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b""):
        with pytest.raises(ProtocolError):
            decode_header(header)


def test_an_unknown_message_or_field_is_refused():
    with pytest.raises(ProtocolError, match="no known message"):
        decode_header(b"\x81\xa4type\xa5Shell")
    with pytest.raises(ProtocolError, match="no known message"):
        decode_header(b"\x82\xa4type\xa3Ask\xa4code\xa1x")


def test_a_message_keeps_nothing_of_the_bytes_it_came_from():
    data = bytearray(FRAME[PREFIX_SIZE:])
    decoded = decode_header(memoryview(data))
    data[:] = bytes(len(data))
    assert decoded == REGISTER
    data.clear()  # would raise BufferError if a view of it were left
