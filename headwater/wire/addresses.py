"""Addresses as text, and the sockets that belong to them.

"unix:@name" (Linux's abstract names, which no file system keeps), "unix:/path" elsewhere,
"tcp:host:port", "tcp:[host]:port" for IPv6. What a listener is bound to and what others dial may
differ: `advertised` makes the second of the first.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import stat
import time

from headwater.errors import ConfigurationError
from headwater.wire.sockets import tcp_address, timeval

_BACKLOG = 1024
_PLACE = re.compile(
    r"(\[(?P<v6>[^\[\]\s]+)\]|(?P<name>[^\[\]:\s]+))(:(?P<port>[0-9]{1,5}))?"
    r"|(?P<bare>[^\[\]\s]*:[^\[\]\s]*:[^\[\]\s]*)"
)
_ELSEWHERE = ("192.0.2.1", 9)  # an address for documentation: whatever leads beyond this machine leads there


def split_tcp(address: str) -> tuple[str, int]:
    """Return host and port of a TCP address.

    Raises:
        ConfigurationError: it is not one.
    """
    kind, _, place = address.partition(":")
    host, _, port = place.rpartition(":")
    try:
        host.encode("idna")  # as the name service will
    except UnicodeError:
        host = ""
    if kind != "tcp" or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"address {address!r} is not one of unix:@name, unix:/path, tcp:host:port, tcp:[host]:port"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_place(place: str) -> tuple[str, int]:
    """Return host and port of "host", "host:port", "[host]:port" or a bare IPv6 address; port 0 without one.

    Raises:
        ConfigurationError: it is none of these.
    """
    found = _PLACE.fullmatch(place)
    host, port = (
        (found["v6"] or found["bare"] or found["name"], int(found["port"] or 0)) if found else ("", 0)
    )
    if not host or (":" in host and not is_numeric(host)) or port > 65535:
        raise ConfigurationError(
            f"got {place!r}, expected a host to listen on or to advertise: host, host:port or [IPv6]:port"
        )
    return host, port


def is_numeric(host: str) -> bool:
    """Whether it is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def advertised(address: str, host: str = "", towards: str = "") -> str:
    """Return what others should dial for a listener that is bound to `address`.

    Args:
        host: a host name or IP address under which they reach this machine, and a port where it is not
            the listener's, as `split_place` takes them; it may be another machine's that forwards. Without
            it, a listener on all addresses is advertised under the one from which this machine reaches
            `towards`, or else the world; one on a single address under that.
        towards: the address of another node, say the coordinator's. Nothing is sent to it.

    Raises:
        ConfigurationError: no `host`, and no route from which to tell one.
    """
    if not address.startswith("tcp:"):
        return address
    bound, port = split_tcp(address)
    if host:
        name, other = split_place(host)
        return tcp_address(name, other or port)
    if not ipaddress.ip_address(bound).is_unspecified:
        return address
    target = split_tcp(towards) if towards.startswith("tcp:") else _ELSEWHERE
    try:
        family, kind, *_, place = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket: this only chooses a route
            return tcp_address(str(probe.getsockname()[0]).partition("%")[0], port)
    except OSError as error:
        raise ConfigurationError(
            f"cannot tell under which address others reach {address} ({error}): name a host to advertise"
        ) from error


def connect(address: str, timeout: float) -> socket.socket:
    """Return a socket connected to `address`; blocks for at most `timeout` seconds, name service aside.

    Raises:
        ConfigurationError: it is no address.
        OSError: nobody answers there.
    """
    if address.startswith("unix:") and len(address) > 5:
        return _connect_unix(address[5:], timeout)
    host, port = split_tcp(address)
    until = time.monotonic() + timeout
    failure: OSError | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = failure or error
        except BaseException:
            connection.close()
            raise
    raise failure or OSError("the name has no address")


def _connect_unix(place: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A non-blocking connect fails at once where the listener's queue is full; this one waits.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(timeout))
        connection.connect("\0" + place[1:] if place.startswith("@") else place)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(None))
    except BaseException:
        connection.close()
        raise
    return connection


_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
"""Without l and o, 1 and 0."""


def fresh_name(directory: str) -> str:
    """A place to listen that nobody has, in `directory` where the system knows no abstract names.

    Short, as a person copies it from one line into another: 40 random bits, of which no two are mistaken for
    each other. It need not be secret, as only processes of the same user are admitted.
    """
    name = "hw-" + "".join(secrets.choice(_LETTERS) for _ in range(8))
    return f"{directory}/{name}" if directory else f"@{name}"


def listen_unix(place: str) -> tuple[socket.socket, str]:
    """Listen at a path, or under an abstract name after "@". A path that a process left is taken over.

    Raises:
        ConfigurationError: the place cannot be had.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not place.startswith("@"):
            _remove_left(place)
        listening.bind(f"\0{place[1:]}" if place.startswith("@") else place)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigurationError(f"cannot listen on unix:{place}: {error}") from error
    return listening, f"unix:{place}"


def _remove_left(path: str) -> None:
    """Remove a socket that nobody listens at: the process that did was killed."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            _connect_unix(path, 1.0).close()
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass  # it is not there, or not ours: `bind` says what is wrong


def listen_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    """Listen on `host`, "" or "0.0.0.0" for every IPv4 address, "::" for every address of both kinds.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
        family, *_, place = found[0]
        both = place[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"cannot listen on {tcp_address(host, port)}: {error}") from error
    name = listening.getsockname()
    return listening, tcp_address(name[0], name[1])
