"""The frame: a fixed prefix, an encoded message, then raw payload bytes. No socket here.

    bytes  0–3    magic "HWTR"
           4–5    protocol version (all numbers little-endian)
           6–7    flags: bits 0–7 count the descriptors that travel with the frame, the rest are 0
           8–11   length of the header
          12–19   length of the payload
          20–27   request id, chosen by whoever asks and repeated in what answers it
          28–     header: one struct of `messages.AnyMessage`, as MessagePack
           …      payload: array bytes; the header says which arrays

A prefix is checked against `Limits` before anything is allocated for what it announces, and every
malformed byte raises ProtocolError, nothing else: these bytes may come from a stranger.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import msgspec

from headwater.errors import ProtocolError, UsageError
from headwater.messages import AnyMessage

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"HWTR"
VERSION = 1

_DESCRIPTOR_COUNT = 0xFF  # mask of `flags`
_new_prefix = tuple.__new__  # a NamedTuple's own constructor takes a third of the time of parsing one
_START = MAGIC + VERSION.to_bytes(2, "little")
_PREFIX = struct.Struct("<6sHIQQ")
PREFIX_SIZE = _PREFIX.size

LONGEST_HEADER = 16 << 20
"""Bytes of an encoded message that a peer takes."""

_encode_message = msgspec.msgpack.Encoder().encode
_decode_message: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one frame may announce; more is a protocol error.

    Attributes:
        header: bytes of encoded message.
        payload: bytes of arrays.
        descriptors: open files that travel with the frame, at most 255.
    """

    header: int = LONGEST_HEADER
    payload: int = 64 << 30
    descriptors: int = 8


class Prefix(NamedTuple):
    """The fixed part of a frame: lengths in bytes, `flags` as in the module's table."""

    flags: int
    header_length: int
    payload_length: int
    request: int


def encode(message: msgspec.Struct, *, request: int = 0, payload_length: int = 0, flags: int = 0) -> bytes:
    """Return prefix and header of a frame; `payload_length` bytes must follow them on the wire.

    Raises:
        UsageError: the message holds what cannot travel, or is longer than a peer takes.
    """
    try:
        header = _encode_message(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{type(message).__name__} cannot be sent: {error}") from error
    length = len(header)
    if length > LONGEST_HEADER:
        raise UsageError(
            f"{type(message).__name__} cannot be sent: it has {length:,} bytes, "
            f"at most {LONGEST_HEADER:,} are taken"
        )
    return _PREFIX.pack(_START, flags, length, payload_length, request) + header


def check(message: msgspec.Struct) -> None:
    """Whether a peer will take it: what a caller gave may have a type that travels but is not the message's.

    Raises:
        UsageError: it will not.
    """
    header = encode(message)[PREFIX_SIZE:]
    try:
        _decode_message.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{type(message).__name__} cannot be sent: {error}; nothing was sent") from error


def parse_prefix(data: Bytes, limits: Limits, at: int = 0) -> Prefix:
    """Read and check the PREFIX_SIZE bytes of `data` from `at` on, the start of a frame.

    Raises:
        ProtocolError: too few bytes, another magic or version, unknown flags, or more announced
            than `limits` allow.
    """
    try:
        start, flags, header, payload, request = _PREFIX.unpack_from(data, at)
    except struct.error:
        raise ProtocolError(f"a frame starts with {PREFIX_SIZE} bytes, got {len(data) - at}") from None
    if start != _START or flags > limits.descriptors or header > limits.header or payload > limits.payload:
        raise ProtocolError(_what_is_wrong(start, flags, header, payload, limits))
    return _new_prefix(Prefix, (flags, header, payload, request))


def _what_is_wrong(start: bytes, flags: int, header: int, payload: int, limits: Limits) -> str:
    magic, version = start[:4], int.from_bytes(start[4:], "little")
    if magic != MAGIC:
        return f"a frame starts with {MAGIC!r}, got {magic!r}: the peer is not a Headwater node"
    if version != VERSION:
        return f"protocol version {version}, expected {VERSION}: run the same headwater on every node"
    if flags > _DESCRIPTOR_COUNT:
        return f"unknown flags {flags:#06x}, known are {_DESCRIPTOR_COUNT:#06x}"
    return (
        f"a frame announces {header} header bytes, {payload} payload bytes and {flags} descriptors, "
        f"allowed are {limits.header}, {limits.payload} and {limits.descriptors}"
    )


def decode_header(data: Bytes) -> AnyMessage:
    """Return the message that `data`, a whole header, encodes; nothing in it refers to `data`.

    Raises:
        ProtocolError: not MessagePack, or not one of the structs of `messages.AnyMessage`.
    """
    try:
        return _decode_message.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a header of {len(data)} bytes is no known message: {error}") from error
