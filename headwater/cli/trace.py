"""`headwater trace`: what all nodes of a running cluster do, as a file that Perfetto opens."""

from __future__ import annotations

from typing import Annotated

import typer

from headwater.cli.options import Address, command, credentials, the
from headwater.observe.tracer import collect
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@command(app, security=credentials())
def trace(
    address: Address = None,
    seconds: Annotated[float, typer.Option(min=0.1, metavar="N", help="For how long to record.")] = 5.0,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where the trace is written.")
    ] = "trace.json",
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Record what all nodes of a running cluster do, as a file that Perfetto (ui.perfetto.dev) opens.

    A worker's turn and its stages, every message and every pass of the servers, and who came and went; arrows
    lead from a worker's step through the servers' passes to its answer.

    [bold]Example[/bold]

    headwater trace tcp:node1:7000 --seconds 10 -o trace.json --token-file token

    Exit codes: 0 written, 1 it could not be recorded, 2 a wrong argument.
    """
    found = collect(the(address), seconds, output, security)
    dropped = f", {found.dropped} were too many" if found.dropped else ""
    print(
        f"{output}: {found.events} events{dropped}; clocks agree within {found.largest_error / 1000:.0f} µs"
    )
    print("open it at https://ui.perfetto.dev, or in chrome://tracing")
