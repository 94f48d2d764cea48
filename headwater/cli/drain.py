"""`headwater drain`: have a cluster finish soon, by itself."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from headwater.cli.options import Address, command, credentials, the
from headwater.errors import HeadwaterError, StalledError
from headwater.messages import Stop
from headwater.runtime.client import Client
from headwater.runtime.inquiry import ask
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_AGAIN_S = 0.2


@command(app, security=credentials())
def drain(
    address: Address = None,
    wait: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long the cluster may take to end; 0: do not wait."),
    ] = 600.0,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Have every worker's `batches` end with its next step, as `worker.stop()` does; returns once the cluster
    has ended.

    Workers then do what comes after their loops (validation, a last checkpoint) and return, so nothing that
    was computed is lost. Programs without `batches` do not notice. `headwater stop` ends a cluster at once.

    [bold]Example[/bold]

    headwater drain tcp:node1:7000 --token-file token

    Exit codes: 0 it has ended (or with --wait 0 was told to), 1 it has not, 2 a wrong argument.
    """
    where = the(address)
    session = Client(where, "observer", security=security)
    try:
        session.ask(Stop, "stop")
    finally:
        session.close()
    print(f"the workers of the cluster at {where} were told to end")
    until = time.monotonic() + wait
    while wait and _answers(where, security):
        if time.monotonic() > until:
            raise StalledError(f"the cluster at {where} has not ended within {wait:g} s; it still answers")
        time.sleep(_AGAIN_S)
    if wait:
        print(f"the cluster at {where} has ended")


def _answers(address: str, security: Security) -> bool:
    try:
        ask(address, security)
    except HeadwaterError:
        return False
    return True
