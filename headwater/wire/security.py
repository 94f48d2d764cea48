"""Who may connect: what every listener and every `dial` of a cluster is given.

On Unix sockets the kernel says who the other process is, and only the same user's are admitted. Over
TCP both sides prove themselves, by certificates of one authority, by a shared token, or by both. A
node that others can reach beyond loopback demands one of them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field

from headwater.errors import ConfigurationError, RefusedError
from headwater.spec.words import option, wording
from headwater.wire.sockets import peer_credentials

SHORTEST_TOKEN = 16
"""Characters. Whoever a node dials can test guesses of its token at leisure, so it must not be guessable."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Three PEM files: whom this node believes, and who it is. Read at every listening and dialling.

    Attributes:
        ca: certificates of the authority that signed every node's certificate.
        certificate: this node's own, with the names that others dial, and for both purposes
            (server and client).
        key: its private key, not encrypted.
    """

    ca: str | os.PathLike[str]
    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Security:
    """What TCP connections of this node must prove, and how it proves itself; the same on all nodes.

    Attributes:
        token: a secret that all nodes share; each side proves that it knows it, and never sends it.
        tls: encrypt, and demand a certificate of the authority from the other side.
        insecure: listen beyond loopback with neither.

    Raises:
        ConfigurationError: the token is no text, or too short to be a secret; `tls` is no TLS.
    """

    token: str | None = field(default=None, repr=False)
    tls: TLS | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and not isinstance(self.token, str):
            raise ConfigurationError(f"token must be a text, got a {type(self.token).__name__}")
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise ConfigurationError(
                f"tls must be a headwater.TLS of three files, got a {type(self.tls).__name__}"
            )
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ConfigurationError(
                f"a token of {len(self.token)} characters can be guessed, expected {SHORTEST_TOKEN} or more: "
                "make one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )

    def check_bind(self, host: str) -> None:
        """Allow listening for TCP connections on `host`, a name or an address.

        Raises:
            ConfigurationError: strangers could reach it and need prove nothing, or it has no address.
        """
        addresses = _addresses(host)
        outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
        if outside and self.token is None and self.tls is None and not self.insecure:
            raise ConfigurationError(
                f"listening on {host!r} ({', '.join(outside)}) would let anyone who reaches this machine "
                "read and change the model, because connections are not authenticated: give every node "
                f"{wording('tls or a token', 'a --token-file or the three --tls files')}, or listen on "
                f"127.0.0.1; {option('insecure', True)} listens all the same"
            )

    def admit(self, connection: socket.socket) -> None:
        """Check the process at the other end of a Unix socket, before any byte of it is read.

        Raises:
            RefusedError: it belongs to another user.
        """
        credentials = peer_credentials(connection)
        if credentials is not None and credentials[1] != os.geteuid():
            raise RefusedError(
                f"process {credentials[0]} belongs to user {credentials[1]}, expected user {os.geteuid()}: "
                "nodes on one machine must run as the same user"
            )


PLAIN = Security()
"""Nothing to prove: enough for a cluster that only this machine reaches."""


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"cannot listen on {host!r}: {error}") from error
    return sorted({str(entry[4][0]).partition("%")[0] for entry in found})
