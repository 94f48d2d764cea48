"""Where a node listens: for its own machine, and beyond it for those who prove that they belong."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from dataclasses import dataclass

from headwater.errors import ConfigurationError
from headwater.spec.amounts import shown
from headwater.spec.words import option
from headwater.wire.addresses import advertised, is_numeric, split_place
from headwater.wire.listener import Listener
from headwater.wire.security import PLAIN, Security

EVERYWHERE = ("0.0.0.0", "::")
"""Listening there is listening at every address of a machine."""

_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How others reach a node: from which machines, under which address, and what they must prove.

    Attributes:
        bind: "host[:port]" to listen on for TCP connections, "0.0.0.0" or "::" for every address of this
            machine; None for this machine alone; "unix:/path" for this machine alone, at that place.
        advertise: "host[:port]" that others dial, where that is another. Without it, the name or address
            that `bind` says, or for every address the one that others most likely reach.
        security: what TCP connections must prove, those that the node makes included.
        local: listen on a Unix socket for this machine too, over which memory is shared.

    Raises:
        ConfigurationError: not such a place, one where strangers could connect, or none at all.
    """

    bind: str | None = None
    advertise: str | None = None
    security: Security = PLAIN
    local: bool = True

    def __post_init__(self) -> None:
        for name, value in (("bind", self.bind), ("advertise", self.advertise)):
            if value is not None and not (isinstance(value, str) and _can_be_a_host(value)):
                raise ConfigurationError(f"{option(name)}: got {shown(value)}, expected HOST or HOST:PORT")
        if self.is_beyond:
            assert self.bind is not None
            self.security.check_bind(split_place(self.bind)[0])
        elif self.advertise is not None:
            raise ConfigurationError(
                f"{option('advertise', self.advertise)} without a TCP address: nothing listens there; "
                f"pass {option('bind', 'HOST')} too"
            )
        elif not self.local:
            raise ConfigurationError(
                f"a node that listens nowhere is reached by nobody: pass {option('bind', 'HOST')}"
            )
        if self.advertise is not None and split_place(self.advertise)[0] in EVERYWHERE:
            raise ConfigurationError(
                f"{option('advertise', self.advertise)} is not an address that others can dial: "
                "pass a host name or an IP address of this machine"
            )

    @property
    def is_beyond(self) -> bool:
        """Whether it listens for TCP connections."""
        return self.bind is not None and not self.bind.startswith(_UNIX)

    @property
    def is_fixed(self) -> bool:
        """Whether it leads to the same address at every start."""
        if self.bind is None:
            return False
        return not self.is_beyond or split_place(self.bind)[1] > 0

    def on_any_port(self) -> Endpoint:
        """The same for another node of this machine, which takes a free port, or a name of its own."""
        if not self.is_beyond:
            return dataclasses.replace(self, bind=None)
        hosts = {
            name: None if place is None else _host(place)
            for name, place in (("bind", self.bind), ("advertise", self.advertise))
        }
        return Endpoint(**hosts, security=self.security, local=self.local)

    def listen(self, *, towards: str = "") -> tuple[list[Listener], tuple[str, ...]]:
        """Listen; returns the listeners, which the caller closes, and what others dial, the nearest first.

        `towards`: the address of another node, see `advertised`.

        Raises:
            ConfigurationError: an address cannot be had, or not be told from `bind`, or the files of
                `security` cannot be used.
        """
        with ExitStack() as undo:
            listeners: list[Listener] = []
            addresses: list[str] = []
            if self.local:
                place = (self.bind or "").removeprefix(_UNIX) if not self.is_beyond else ""
                listeners.append(undo.enter_context(closing(Listener("unix", place=place))))
                addresses.append(listeners[-1].address)
            if self.is_beyond:
                host, port = split_place(self.bind or "")
                listener = Listener("tcp", host=host, port=port, security=self.security)
                listeners.append(undo.enter_context(closing(listener)))
                name = self.advertise or ("" if is_numeric(host) else host)
                addresses.append(advertised(listener.address, name, towards))
            undo.pop_all()
            return listeners, tuple(addresses)


LOCAL = Endpoint()
"""This machine alone, under a name that nobody else has."""


def _can_be_a_host(place: str) -> bool:
    """Whether a name service can be asked for it."""
    try:
        place.encode("idna" if not place.startswith("unix:") else "utf-8")
    except UnicodeError:
        return False
    return True


def _host(place: str) -> str:
    """Its host, as a place without a port."""
    return split_place(place)[0]
