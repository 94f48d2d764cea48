"""`headwater bench`: a suite's figures beside their limits, as a table or as JSON."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from headwater.bench.figures import FULL, QUICK, Figure, machine
from headwater.bench.suites import SUITES
from headwater.cli.options import Json, command
from headwater.errors import ConfigurationError, EnvironmentFailure

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_WIDTH = 120
"""Columns of a report that does not go to a terminal."""


@command(app)
def bench(
    suite: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(SUITES)}. Without: lists them.")
    ] = None,
    json: Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: seconds, and less certain.")] = False,
) -> None:
    """Measure this machine: each figure beside the limit it is held against, taken in the same run.

    dense: rounds of a model of ResNet-50's size. models: steps of three real models beside torch
    alone. latency: pulls of 1 KB. steps: pulls and steps with one server and with two. kernels:
    update loops. programs: vectors of L-BFGS, and an evaluation in which a worker stands still.
    tcp, tls: the wire alone, against plain sockets. memory: what nodes keep resident. splits: who
    gets which data. safety: replicas, failover, checkpoints. soak: 100,000 small steps, at whose end
    nothing may cost more than before. observe: what metrics and traces cost. predictions:
    what `compare` predicts, beside real workers. lookup, table: the loops of embedding tables. rows:
    tables in a cluster.

    [bold]Examples[/bold]

    headwater bench dense

    headwater bench kernels --quick --json > kernels.json

    Exit codes: 0 measured, 1 this machine cannot be measured, 2 a wrong argument.
    """
    if suite is None:
        print("\n".join(SUITES))
        return
    measure(suite, as_json=json, quick=quick)


def measure(suite: str, *, as_json: bool, quick: bool) -> None:
    """Run a suite and print its figures; blocks for seconds (`quick`) to minutes.

    Raises:
        ConfigurationError: there is no such suite.
        EnvironmentFailure: not a Linux machine, whose /proc and memfd the limits need.
    """
    if suite not in SUITES:
        raise ConfigurationError(f"bench: got {suite!r}, expected one of {', '.join(SUITES)}")
    if not sys.platform.startswith("linux"):
        raise EnvironmentFailure(f"bench needs Linux, this is {sys.platform}")
    show(SUITES[suite](QUICK if quick else FULL), as_json=as_json)


def show(figures: list[Figure], *, as_json: bool) -> None:
    """Print figures, and what machine they are of."""
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    if as_json:
        print(about, file=sys.stderr)
        print(
            msgspec.json.format(
                msgspec.json.encode([_plain(figure) for figure in figures]), indent=2
            ).decode()
        )
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(_table(figures))
    console.print(about)


def _plain(figure: Figure) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(figure)
    return {**fields, "met": figure.met}


def _table(figures: list[Figure]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("case", overflow="fold")
    for heading in ("measured", "limit"):
        shown.add_column(heading, justify="right")
    shown.add_column("which is", overflow="fold")
    shown.add_column("ratio", justify="right")
    shown.add_column("target", justify="right")
    shown.add_column("")
    for figure in figures:
        shown.add_row(
            figure.case,
            f"{figure.figure:.1f} {figure.unit}",
            f"{figure.limit:.1f} {figure.unit}",
            figure.limit_name,
            _ratio(figure),
            "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}",
            {None: "", True: "met", False: "[red]missed[/red]"}[figure.met],
        )
    return shown


def _ratio(figure: Figure) -> str:
    if figure.interval is None:
        return f"{figure.ratio:.2f}"
    low, high = figure.interval
    return f"{figure.ratio:.3f} ({low:.3f} to {high:.3f})"
