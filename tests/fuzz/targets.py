"""What takes bytes of strangers, each as a function of bytes that must end and raise no errors but ours.

The normal tests run them on examples that hypothesis makes; `python tests/fuzz/run.py` lets atheris,
which sees what code the bytes reach, run one of them for hours.
"""

import socket

import numpy as np

from headwater.errors import ConnectionLostError, ProtocolError, RefusedError
from headwater.messages import Ask
from headwater.wire.frames import Limits, decode_header, encode, parse_prefix
from headwater.wire.greeting import NO_BINDING, Caller, Greeting, HandshakeDecoder, Host
from headwater.wire.handshake import Handshake
from headwater.wire.incoming import Incoming

TOKEN = "a token that all nodes of the tests share"
_PIECES = (1, 7, 28, 4096)


class _Replay:
    """A stream on which `data` comes in pieces of different sizes and then ends."""

    family = socket.AF_INET

    def __init__(self, data):
        self._data = memoryview(data)
        self._turn = 0

    def recv_into(self, buffer, size=0, flags=0):
        self._turn += 1
        piece = self._data[: min(_PIECES[self._turn % len(_PIECES)], len(buffer))]
        buffer[: len(piece)] = piece
        self._data = self._data[len(piece) :]
        return len(piece)

    def recvmsg_into(self, buffers, space=0, flags=0):
        return self.recv_into(buffers[0]), [], 0, None


def prefix(data):
    """The first bytes of a frame."""
    try:
        parse_prefix(data, Limits())
    except ProtocolError:
        pass


def message(data):
    """The header of a frame: whatever is decoded is encoded to something that decodes to the same."""
    try:
        decoded = decode_header(data)
    except ProtocolError:
        return
    again = decode_header(encode(decoded)[28:])
    assert repr(again) == repr(decoded)  # as text: NaN equals nothing


def frames(data):
    """Everything that an admitted peer sends."""
    incoming = Incoming(_Replay(data), Limits(header=1 << 16, payload=1 << 16), "stranger")
    try:
        while True:
            incoming.advance(lambda message, length: [np.empty(length, np.uint8)], None, 0)
    except (EOFError, ProtocolError, ConnectionLostError):
        assert len(incoming._buffer) <= (1 << 16) + 28


def words(data):
    """The first words of a caller, and those of a listener."""
    nonce = bytes(32)
    asking = Caller(TOKEN, nonce, NO_BINDING)
    asking.begin()
    for side in (Host(TOKEN, nonce, NO_BINDING), Host(None, nonce, NO_BINDING), asking):
        reader, rest = HandshakeDecoder(), data
        try:
            while rest and not side.done:
                piece, rest = rest[: reader.wanted], rest[reader.wanted :]
                word = reader.feed(piece)
                if word is not None:
                    side.receive(word)
        except (ProtocolError, RefusedError):
            pass
        assert not side.done or (isinstance(side, Host) and side._token is None), "nobody proved the token"


def handshake(data, identity=None):
    """A whole handshake, of either side; with TLS where an identity is given for each."""
    for listening in (True, False):
        given = identity[listening] if identity is not None else None
        side = Handshake(TOKEN, given, None if listening else "localhost")
        rest = data
        try:
            while rest:
                count = min(side.wanted, _PIECES[len(rest) % len(_PIECES)])
                side.receive(rest[:count])
                rest = rest[count:]
                side.take()
        except (ProtocolError, RefusedError):
            side.take()
        assert not side.done


TARGETS = {target.__name__: target for target in (prefix, message, frames, words, handshake)}
SEEDS = [
    b"",
    encode(Ask()),
    encode(Ask(), payload_length=5) + b"12345",
    encode(Greeting(bytes(32), True)),
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x00\x05hello",
]
