"""`headwater ping`: does a cluster live, and can it train? For probes and scripts."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from headwater.cli.faults import FAILED, complain
from headwater.cli.health import Health
from headwater.cli.options import Address, command, credentials, the
from headwater.errors import ConnectionLostError
from headwater.messages import ServerStatistics
from headwater.runtime.inquiry import ask_node
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_ANSWER_S = 5.0
_AGAIN_S = 0.5


@command(app, security=credentials())
def ping(
    address: Address = None,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready", help="Every server must be there, with its standby where it should have one."
        ),
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Ask again and again until then.")
    ] = 0.0,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Ask whether a cluster lives, or is ready to train: for probes and scripts.

    The address may also be that of a server, which answers for itself.

    [bold]Examples[/bold]

    headwater ping tcp:node1:7000 --token-file token

    headwater ping tcp:node1:7000 --ready --wait 120

    Exit codes: 0 it lives, or is ready; 1 it is not; 2 a wrong argument.
    """
    where = the(address)
    until = time.monotonic() + wait
    while True:
        good, text = _look(where, ready, security)
        if good:
            print(text)
            return
        if time.monotonic() + _AGAIN_S > until:
            complain(text)
            raise typer.Exit(FAILED)
        time.sleep(_AGAIN_S)


def _look(address: str, ready: bool, security: Security) -> tuple[bool, str]:
    """Whether all is well there, and what to say. Raises what asking again would not change."""
    began = time.monotonic()
    try:
        answer = ask_node(address, security, seconds=_ANSWER_S)
    except ConnectionLostError as error:
        return False, str(error)
    took = f"{1000 * (time.monotonic() - began):.0f} ms"
    if isinstance(answer, ServerStatistics):
        return True, f"{answer.role} {answer.index} answers after {took}, at version {answer.version}"
    health = Health.of(answer)
    lives = f"the coordinator answers after {took}, at version {answer.version}"
    if not ready:
        return True, lives
    return health.is_ready, f"{lives}; {health.readiness()}"
