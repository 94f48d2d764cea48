"""TLS 1.3 between two nodes that both show a certificate of the same authority.

`Encryption` has no socket: the ssl module works on two buffers in memory, and whoever owns it moves
the bytes. One thread at a time may use it, and none of its calls blocks. An SSLSocket would do neither:
it must not be read and written by two threads at once, and a lock around it would be held by a reader
that waits for bytes for ever. Memory is faster, too: one system call moves many records.

Sessions are not resumed, so there are no tickets to steal and no early data to replay.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from headwater.errors import ConfigurationError, HeadwaterError, ProtocolError, RefusedError
from headwater.wire.security import TLS
from headwater.wire.stream import Sendable

_CHUNK = 256 << 10  # bytes encrypted at once: two more copies of them stay in cache
_REMEDIES = {  # by OpenSSL's X509_V_ERR numbers
    9: "compare the clocks of both machines",
    10: "make a new one with `headwater serve certificates`",
    18: "give every node the same ca file",
    19: "give every node the same ca file",
    20: "give every node the same ca file",
    21: "give every node the same ca file",
    62: "make it with `--host` and the name that others dial",
    64: "make it with `--host` and the address that others dial",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """One side's settings, loaded. `certificate`: its own, as DER."""

    context: ssl.SSLContext
    certificate: bytes


def load(tls: TLS, *, listening: bool) -> Identity:
    """Read the files of `tls` for one of the two sides.

    Raises:
        ConfigurationError: one cannot be read, is not what it should be, or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listening else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if listening:
        context.num_tickets = 0
    try:
        context.load_verify_locations(os.fspath(tls.ca))
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(f"tls: cannot read the authority's certificate {tls.ca}: {error}") from error
    try:
        context.load_cert_chain(os.fspath(tls.certificate), os.fspath(tls.key), password=_no_password)
        with open(tls.certificate, encoding="ascii") as file:
            text = file.read()
    except OSError as error:
        raise ConfigurationError(
            f"tls: cannot use certificate {tls.certificate} with key {tls.key}: {error}"
        ) from error
    first = text[text.index("-----BEGIN CERTIFICATE-----") :].partition("-----END CERTIFICATE-----")
    return Identity(context, ssl.PEM_cert_to_DER_cert(first[0] + first[1]))


def _no_password() -> NoReturn:
    raise ConfigurationError("tls: the key is encrypted, expected one without passphrase")


class Encryption:
    """One side of one TLS connection. `host`: whom a caller means to reach; None on the listening side.

    Attributes:
        drained: everything that came and could be decrypted has been handed out.
        ended: the peer said that it sends no more.
    """

    def __init__(self, identity: Identity, host: str | None) -> None:
        self.drained = self.ended = False
        self._listening = host is None
        self._own = identity.certificate
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = identity.context.wrap_bio(
            self._in, self._out, server_side=self._listening, server_hostname=host
        )

    def shake_hands(self) -> bool:
        """Go on with the handshake; True once it is over on this side.

        Raises:
            RefusedError: a certificate is missing, or not accepted here or there.
            ProtocolError: the peer's TLS and this one do not get along.
        """
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self.explained(error) from error
        return True

    def certificates(self) -> tuple[bytes, bytes]:
        """Return the listener's and the caller's certificate, as DER, after the handshake."""
        peer = self._ssl.getpeercert(binary_form=True)
        assert peer is not None, "both sides demand a certificate"
        return (self._own, peer) if self._listening else (peer, self._own)

    def feed(self, data: Sendable) -> None:
        """Take bytes that came from the peer."""
        self._in.write(data)
        self.drained = False

    def take(self) -> bytes:
        """Hand over the bytes that must go to the peer, in order."""
        return self._out.read() if self._out.pending else b""

    def encrypt(self, buffers: Iterable[Sendable]) -> int:
        """Encrypt from the front of `buffers`, some hundred KB at most; return the plain bytes taken."""
        room = _CHUNK
        for buffer in buffers:
            piece = buffer[:room] if len(buffer) > room else buffer
            count = self._ssl.write(piece)
            room -= count
            if not room or count < len(piece):
                break
        return _CHUNK - room

    def decrypt_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with plain bytes as far as they are there; 0: none are, see `ended`.

        Raises:
            ssl.SSLError: what came was changed on its way, or is no TLS.
        """
        got, size = 0, len(buffer)
        read: Any = self._ssl.read  # into a buffer it returns a count, whatever its declared type
        try:
            while got < size:
                count: int = read(size - got, buffer[got:])
                if not count:
                    self.ended = self.drained = True
                    break
                got += count
        except ssl.SSLWantReadError:
            self.drained = True
        return got

    def explained(self, error: ssl.SSLError) -> HeadwaterError:
        """What an error of the handshake, or of the first read after it, means to people."""
        other = "caller" if self._listening else "listener"
        if isinstance(error, ssl.SSLCertVerificationError):
            remedy = _REMEDIES.get(error.verify_code)
            return RefusedError(
                f"the {other}'s certificate is not accepted: {error.verify_message.rstrip('.')}"
                + (f": {remedy}" if remedy else "")
            )
        reason = error.reason or "UNKNOWN"
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return RefusedError(f"the {other} showed no certificate: give it one of the same authority")
        if "_ALERT_" in reason:
            said = reason.partition("_ALERT_")[2].replace("_", " ").lower()
            return RefusedError(
                f"the {other} refuses this node's certificate or TLS, saying {said!r}: its log says why"
            )
        return ProtocolError(f"TLS with the {other} failed: {reason.replace('_', ' ').lower()}")
