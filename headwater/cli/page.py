"""`headwater page`: a web page of a cluster, in a process of its own."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from typing import Annotated

import typer

from headwater.cli.options import Address, command, credentials, the
from headwater.errors import ConfigurationError
from headwater.runtime.inquiry import ask
from headwater.spec.words import option
from headwater.wire.addresses import split_place
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_PLACE = "127.0.0.1:0"
_LOOK_S = 1.0


@command(app, security=credentials())
def page(
    address: Address = None,
    place: Annotated[
        str,
        typer.Option("--bind", metavar="HOST:PORT", help="Where the page is served; port 0: a free one."),
    ] = _PLACE,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines see it: whoever reaches it may read it.")
    ] = False,
    beside: Annotated[int | None, typer.Option(hidden=True, help="End with this process.")] = None,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Show a running cluster in a web page: who waits for whom, pace, loss, staleness, exposed time, events.

    The page only reads, and goes on when the coordinator is started again. It is for this machine alone;
    from elsewhere use `ssh -L 8080:127.0.0.1:8080`. It needs the extra `page`.

    [bold]Examples[/bold]

    headwater page unix:@hw-k3f9x2q7 --open

    headwater page tcp:node1:7000 --token-file token --bind 127.0.0.1:8080

    Exit codes: 0 ended by SIGTERM, 1 it cannot be shown, 2 a wrong argument, 130 interrupted.
    """
    where = the(address)
    from headwater.page.elements import check_library, serve
    from headwater.page.poller import Poller

    check_library()
    host, port = _free(place, insecure)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    poller = Poller(lambda: ask(where, security))

    def ready() -> None:
        print(f"page: {url}", flush=True)
        if missing := poller.shown().error:
            print(f"headwater: {missing}; the page goes on asking", file=sys.stderr, flush=True)
        if open_:
            webbrowser.open(url)

    if beside is not None:
        threading.Thread(target=_end_with, args=(beside,), name="headwater-beside", daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serve(poller, where, host, port, ready=ready)
    finally:
        poller.close()


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(0)


def _free(place: str, insecure: bool) -> tuple[str, int]:
    """Host and port to listen on.

    Raises:
        ConfigurationError: not a place, in use, or one that others reach.
    """
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ConfigurationError(f"{option('bind')}: got {place!r}, expected HOST:PORT, as 127.0.0.1:8080")
    host, number = split_place(place)
    if not _is_loopback(host) and not insecure:
        raise ConfigurationError(
            f"{option('bind', place)}: whoever reaches {host} could read the page: use ssh -L from "
            "elsewhere, or pass --insecure"
        )
    try:
        with socket.create_server((host, number), family=_family(host)) as probe:
            return host, int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigurationError(f"{option('bind', place)}: cannot listen there: {error}") from error


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
