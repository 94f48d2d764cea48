"""Who may connect: processes of the same user on this machine, and nobody beyond it.

Passed to listeners and to `dial`, which ask it before any byte of a peer is read.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from headwater.errors import ConfigurationError, RefusedError
from headwater.wire.sockets import peer_credentials


@dataclass(frozen=True, slots=True)
class Security:
    """The same user over Unix sockets, loopback only over TCP."""

    def check_bind(self, host: str) -> None:
        """Allow listening for TCP connections on `host`, a name or an address.

        Raises:
            ConfigurationError: other machines could reach it, or it has no address.
        """
        addresses = _addresses(host)
        outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
        if outside:
            raise ConfigurationError(
                f"listening on {host!r} ({', '.join(outside)}) would let anyone who reaches this machine "
                "read and change the model, because connections are not authenticated: listen on 127.0.0.1 "
                "and tunnel to it"
            )

    def admit(self, connection: socket.socket) -> None:
        """Check the process at the other end of a connected socket, before any byte of it is read.

        Raises:
            RefusedError: it belongs to another user.
        """
        credentials = peer_credentials(connection)
        if credentials is not None and credentials[1] != os.geteuid():
            raise RefusedError(
                f"process {credentials[0]} belongs to user {credentials[1]}, expected user {os.geteuid()}: "
                "nodes on one machine must run as the same user"
            )


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host!r}: {error}") from error
    return sorted({str(entry[4][0]).partition("%")[0] for entry in found})
