"""How a TCP connection begins: TLS, if this node has it, then the greeting. Bytes in, bytes out, no socket.

The first byte that comes tells TLS from everything else, so each side can say what is wrong when only
one of them has TLS. Whatever comes without TLS, where this node has it, only ever ends the connection.
"""

from __future__ import annotations

import secrets
import socket
import ssl

from headwater.errors import HeadwaterError, ProtocolError, RefusedError
from headwater.messages import Refused
from headwater.wire.encrypted import EncryptedStream
from headwater.wire.encryption import Encryption, Identity
from headwater.wire.frames import encode
from headwater.wire.greeting import (
    NO_BINDING,
    NONCE_SIZE,
    Caller,
    HandshakeDecoder,
    HandshakeMessage,
    Host,
    binding,
    printable,
    refusal,
)
from headwater.wire.stream import ByteStream

_MOST = 128 << 10  # bytes of a whole handshake
_PIECE = 16 << 10
_TLS_BYTES = b"\x15\x16"  # the first byte of an alert, and of a handshake


class Handshake:
    """One side's half of a handshake.

    Args:
        token: what both sides must prove to know, None: nothing.
        identity: for TLS, None: without.
        host: whom the caller means to reach; None on the listening side.

    Attributes:
        done: the peer is admitted; `take` may still have bytes for it.
    """

    def __init__(self, token: str | None, identity: Identity | None, host: str | None) -> None:
        self.done = False
        self._token = token
        self._host = host
        self._encryption = Encryption(identity, host) if identity is not None else None
        self._established = identity is None  # what is said from now on is meant for the greeting
        self._begun = False  # a byte came
        self._came = 0
        self._side: Caller | Host | None = None
        self._words = HandshakeDecoder()
        self._out = bytearray()
        if host is not None and self._encryption is not None:
            self._encryption.shake_hands()
        elif self._established:
            self._greet()

    @property
    def wanted(self) -> int:
        """The most bytes that `receive` takes next: what comes after the handshake is not its own."""
        return self._words.wanted if self._encryption is None else _PIECE

    def take(self) -> bytes:
        """Hand over the bytes that must go to the peer now."""
        if self._encryption is not None:
            self._out += self._encryption.take()
        taken, self._out = bytes(self._out), bytearray()
        return taken

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer, `wanted` at most.

        Raises:
            RefusedError: one side does not admit the other.
            ProtocolError: what came is no such handshake.
        After either, send what `take` gives, which tells the peer, and close.
        """
        try:
            self._receive(data)
        except HeadwaterError as error:
            if self._host is None:
                self._tell(error)
            raise

    def stream(self, connection: socket.socket) -> ByteStream:
        """Return what frames travel over from now on; owns `connection`."""
        assert self.done
        if self._encryption is None:
            return connection
        return EncryptedStream(connection, self._encryption)

    def _receive(self, data: bytes) -> None:
        self._came += len(data)
        if self._came > _MOST:
            raise ProtocolError(f"a handshake of more than {_MOST} bytes")
        if not self._begun:
            self._begun = True
            if self._encryption is not None and data[0] not in _TLS_BYTES:
                self._encryption = None  # and never established: see `_hear_plain`
        if self._encryption is None:
            self._hear_plain(data)
        else:
            self._hear_encrypted(self._encryption, data)

    def _hear_encrypted(self, encryption: Encryption, data: bytes) -> None:
        encryption.feed(data)
        if not self._established:
            if not encryption.shake_hands():
                return
            self._established = True
            self._greet()
        piece = memoryview(bytearray(self._words.wanted))
        try:
            while not self.done and (count := encryption.decrypt_into(piece)):
                self._hear(bytes(piece[:count]))
                piece = memoryview(bytearray(self._words.wanted))
        except ssl.SSLError as error:  # a refused certificate is told only now
            raise encryption.explained(error) from error

    def _hear_plain(self, data: bytes) -> None:
        while data and not self.done:
            wanted = self._words.wanted
            self._hear(data[:wanted])
            data = data[wanted:]

    def _hear(self, data: bytes) -> None:
        word = self._words.feed(data)
        if word is None:
            return
        if not self._established:
            raise self._without_tls(word)
        assert self._side is not None
        answer = self._side.receive(word)
        self.done = self._side.done
        if answer is not None:
            self._say(answer)

    def _greet(self) -> None:
        bound = NO_BINDING if self._encryption is None else binding(*self._encryption.certificates())
        nonce = secrets.token_bytes(NONCE_SIZE)
        if self._host is None:
            self._side = Host(self._token, nonce, bound)
        else:
            self._side = Caller(self._token, nonce, bound)
            self._say(self._side.begin())

    def _say(self, word: HandshakeMessage) -> None:
        self._send(encode(word))

    def _send(self, data: bytes) -> None:
        if self._encryption is not None and self._established:
            self._encryption.encrypt((data,))
        else:
            self._out += data

    def _tell(self, error: HeadwaterError) -> None:
        """Tell the caller why, unless TLS has its own way to."""
        if self._encryption is None or self._established:
            self._send(refusal(str(error)))

    def _without_tls(self, word: HandshakeMessage) -> HeadwaterError:
        if self._host is None:
            return RefusedError("the caller comes without TLS, this listener demands it: give every node tls")
        if isinstance(word, Refused):
            return RefusedError(f"the listener, without TLS, refuses this node: {printable(word.reason)}")
        return ProtocolError("the listener speaks without TLS, which this node demands")
