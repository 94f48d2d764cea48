"""The first words on a TCP connection: both sides are nodes of this version and know the token, if any.

    caller → listener   Greeting(nonce, token)      token: whether proofs are wanted
    listener → caller   Accepted                    without a token, and that is all
    listener → caller   Challenge(nonce)            with one
    caller → listener   Proof(mac)
    listener → caller   Proof(mac)

Instead of any answer the listener may say Refused. A proof is HMAC-SHA256, keyed with the token, of a
label, the prover's role, both nonces and what TLS knows of both ends: so it is worth nothing for another
connection, in the other direction, or through a node in between that has a certificate of its own. The
caller proves first: a stranger gets nothing that the token was used on.

Pure: bytes, nonces and time come from outside. Each word is a frame whose message is none of those that
nodes exchange later.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TypeAlias

import msgspec

from headwater.errors import ProtocolError, RefusedError
from headwater.messages import Refused
from headwater.wire.frames import MAGIC, PREFIX_SIZE, Limits, encode, parse_prefix

NONCE_SIZE = 32  # bytes
NO_BINDING = bytes(32)
_LIMITS = Limits(header=1024, payload=0, descriptors=0)
_LONGEST_REASON = 600  # characters
_CALLER, _LISTENER = b"caller..", b"listener"


class _Word(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What all of them share."""


class Greeting(_Word, frozen=True):
    """From the caller. `token`: it has one, so the listener must prove that it knows it."""

    nonce: bytes
    token: bool


class Accepted(_Word, frozen=True):
    """From a listener that has no token."""


class Challenge(_Word, frozen=True):
    """From a listener that has one."""

    nonce: bytes


class Proof(_Word, frozen=True):
    """From either side."""

    mac: bytes


HandshakeMessage: TypeAlias = Greeting | Accepted | Challenge | Proof | Refused

_decoder: msgspec.msgpack.Decoder[HandshakeMessage] = msgspec.msgpack.Decoder(HandshakeMessage)


def binding(listener_certificate: bytes, caller_certificate: bytes) -> bytes:
    """What ties a proof to a TLS connection: a digest of the certificates (DER) of both ends."""
    ends = hashlib.sha256(listener_certificate).digest() + hashlib.sha256(caller_certificate).digest()
    return hashlib.sha256(b"headwater tls ends" + ends).digest()


def refusal(reason: str) -> bytes:
    """The frame that tells a caller why it is not admitted."""
    return encode(Refused("RefusedError", reason[:_LONGEST_REASON]))


def foreign(start: bytes) -> str:
    """What bytes that are no frame look like, for people."""
    if start[:1] in (b"\x15", b"\x16"):
        return "the peer speaks TLS, which this node was not given: give every node the same"
    if start[:4] in (b"HTTP", b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"PRI "):
        return "the peer speaks HTTP and is not a Headwater node"
    return "the peer is not a Headwater node"


class HandshakeDecoder:
    """Cuts words out of bytes that come in any pieces, never taking more than one word needs."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._header = 0  # bytes, once the prefix is there

    @property
    def wanted(self) -> int:
        """How many bytes the word still needs, as far as is known."""
        return (PREFIX_SIZE + self._header if self._header else PREFIX_SIZE) - len(self._data)

    def feed(self, data: bytes) -> HandshakeMessage | None:
        """Take at most `wanted` bytes; return the word they complete.

        Raises:
            ProtocolError: they are no word; as soon as that is certain.
        """
        assert len(data) <= self.wanted
        self._data += data
        start = bytes(self._data[:16])
        if start[:4] != MAGIC[: len(start)]:
            raise ProtocolError(f"got {start!r}, a frame starts with {MAGIC!r}: {foreign(start)}")
        if self.wanted:
            return None
        if not self._header:
            self._header = parse_prefix(self._data, _LIMITS).header_length
            if self._header:
                return None
        try:
            word = _decoder.decode(self._data[PREFIX_SIZE:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a handshake of {self._header} bytes is no known word: {error}") from error
        self._data, self._header = bytearray(), 0
        return word


class Caller:
    """The dialling side. `nonce`: fresh random bytes; `bound`: of `binding`, or NO_BINDING.

    Attributes:
        done: the listener has said and proven all it must.
    """

    def __init__(self, token: str | None, nonce: bytes, bound: bytes) -> None:
        self.done = False
        self._token = token
        self._nonce = nonce
        self._bound = bound
        self._expected: bytes | None = None  # the listener's proof

    def begin(self) -> Greeting:
        """The first word."""
        return Greeting(self._nonce, self._token is not None)

    def receive(self, word: HandshakeMessage) -> HandshakeMessage | None:
        """Take a word of the listener; return the answer to it.

        Raises:
            RefusedError: the listener refuses, or does not prove itself.
            ProtocolError: the word does not belong here.
        """
        if isinstance(word, Refused):
            raise RefusedError(f"the listener refuses this node: {printable(word.reason)}")
        if isinstance(word, Accepted) and self._token is None:
            self.done = True
            return None
        if isinstance(word, Accepted):
            raise RefusedError("the listener did not prove that it knows the token: give it the token too")
        if isinstance(word, Challenge) and self._token is not None and self._expected is None:
            _check_nonce(word.nonce)
            self._expected = _mac(self._token, _LISTENER, self._nonce, word.nonce, self._bound)
            return Proof(_mac(self._token, _CALLER, self._nonce, word.nonce, self._bound))
        if isinstance(word, Proof) and self._expected is not None:
            if not hmac.compare_digest(word.mac, self._expected):
                raise RefusedError("the listener has another token, or this one only pretends to be it")
            self.done = True
            return None
        raise ProtocolError(f"the listener said {type(word).__name__} out of turn")


class Host:
    """The listening side. Arguments and attributes as of `Caller`."""

    def __init__(self, token: str | None, nonce: bytes, bound: bytes) -> None:
        self.done = False
        self._token = token
        self._nonce = nonce
        self._bound = bound
        self._caller_nonce: bytes | None = None

    def receive(self, word: HandshakeMessage) -> HandshakeMessage:
        """Take a word of the caller; return the answer to it.

        Raises:
            RefusedError: the caller does not prove itself, or demands a proof that cannot be given.
            ProtocolError: the word does not belong here.
        """
        if isinstance(word, Greeting) and self._caller_nonce is None:
            return self._greet(word)
        if isinstance(word, Proof) and self._caller_nonce is not None and self._token is not None:
            nonces = self._caller_nonce, self._nonce
            if not hmac.compare_digest(word.mac, _mac(self._token, _CALLER, *nonces, self._bound)):
                raise RefusedError("the caller has another token: give every node the same")
            self.done = True
            return Proof(_mac(self._token, _LISTENER, *nonces, self._bound))
        raise ProtocolError(f"the caller said {type(word).__name__} out of turn")

    def _greet(self, word: Greeting) -> HandshakeMessage:
        _check_nonce(word.nonce)
        if word.token and self._token is None:
            raise RefusedError("the caller has a token, this listener has none: give every node the same")
        if self._token is None:
            self.done = True
            return Accepted()
        if not word.token:
            raise RefusedError("the caller has no token, this listener demands one: give every node the same")
        self._caller_nonce = word.nonce
        return Challenge(self._nonce)


def _check_nonce(nonce: bytes) -> None:
    if len(nonce) != NONCE_SIZE:
        raise ProtocolError(f"a nonce of {len(nonce)} bytes, expected {NONCE_SIZE}")


def _mac(token: str, role: bytes, caller_nonce: bytes, listener_nonce: bytes, bound: bytes) -> bytes:
    # Every part has a fixed length, so no two different sets of parts make the same text.
    text = b"headwater token proof 1 " + role + caller_nonce + listener_nonce + bound
    return hmac.digest(token.encode(), text, "sha256")


def printable(reason: str) -> str:
    """The words of a peer that is not trusted yet, fit for a log and a terminal."""
    return "".join(c if c.isprintable() else "?" for c in reason[:_LONGEST_REASON])
