"""How one node reaches another: the Unix socket where both are of one machine and user, else TCP.

Only over a Unix socket can memory be shared, so it comes first wherever it can be: where the kernel, the
network namespace, in which the names of Unix sockets live, and the user are the same. If that turns out
wrong (a container that hides what tells machines apart), the next address is tried.
"""

from __future__ import annotations

import os
import socket
import time
from functools import cache

from headwater.errors import ConnectionLostError, HeadwaterError, RefusedError, UnreachableError
from headwater.messages import Join, Member
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.security import Security

NOBODY = (ConnectionRefusedError, FileNotFoundError)
"""The causes of a ConnectionLostError where nobody listens at an address that there is."""

_BACK_S = 5.0
"""How long a newcomer may take to be reached at all its addresses, in seconds."""


_AGAIN_S = 0.1
_RESET = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


@cache
def machine() -> str:
    """What this process's Unix sockets can reach, as text: equal for two processes that reach each other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        network = os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        boot, network = socket.gethostname(), ""
    return f"{boot} {network} {os.geteuid()}"


def dial_member(member: Member | Join, *, timeout: float, security: Security) -> Channel:
    """Connect to a member; blocks for at most `timeout` seconds for each of its addresses.

    Raises:
        ConnectionLostError: none of them answers; names all that were tried.
        RefusedError: one side does not admit the other; trying again will not help.
        UnreachableError: no address of it leads there from here.
        ProtocolError: what answers is no node, or one of another version.
    """
    failures: list[str] = []
    cause: BaseException | None = None  # the most hopeful: one that is not just refused
    for address in reachable(member):
        try:
            return dial(address, timeout=timeout, security=security)
        except ConnectionLostError as error:
            failures.append(str(error))
            cause = error.__cause__ if cause is None or isinstance(cause, NOBODY) else cause
        except RefusedError as error:
            if not address.startswith("unix:"):
                raise
            failures.append(str(error))  # another user's
    if not failures:
        raise UnreachableError(
            f"{_named(member)} listens on {', '.join(member.addresses) or 'nothing'} alone, which does not "
            f"lead there from {socket.gethostname()}: have it listen for other machines, with --bind"
        )
    raise ConnectionLostError(f"{_named(member)} cannot be reached: {'; '.join(failures)}") from cause


def _named(member: Member | Join) -> str:
    index = "" if member.index is None else f" {member.index}"
    return f"{member.role}{index} on {member.host} (pid {member.pid})"


def check_reachable(join: Join, security: Security) -> None:
    """Dial every address that a newcomer advertises to other machines; blocks for at most some seconds.

    Raises:
        UnreachableError: it is not reached at one of them, or has none that leads there from here.
    """
    until = time.monotonic() + _BACK_S
    addresses = [address for address in join.addresses if not address.startswith("unix:")]
    if join.addresses and not addresses and not reachable(join):
        raise UnreachableError(
            f"{_named(join)} listens on {', '.join(join.addresses)} alone, which does not lead there from "
            f"{socket.gethostname()}: have it listen for other machines, with --bind"
        )
    for address in addresses:
        try:
            _dial_again(address, until, security)
        except HeadwaterError as error:
            raise UnreachableError(
                f"{_named(join)} says that others reach it at {address}, but {socket.gethostname()} does "
                f"not: {error}; name an address of it that leads there, with --advertise"
            ) from error


def _dial_again(address: str, until: float, security: Security) -> None:
    """Connect and hang up; a connection that the network resets is made again until then."""
    while True:
        left = max(until - time.monotonic(), 0.1)
        try:
            dial(address, timeout=left, security=security).close()
            return
        except ConnectionLostError as error:
            if not isinstance(error.__cause__, _RESET) or time.monotonic() + _AGAIN_S > until:
                raise
        time.sleep(_AGAIN_S)


def reachable(member: Member | Join) -> list[str]:
    """Which of a member's addresses to try from here, in order."""
    same = member.machine in ("", machine())
    return [address for address in member.addresses if same or not address.startswith("unix:")]
