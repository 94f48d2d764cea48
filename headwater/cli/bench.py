"""`headwater bench`: a suite's figures beside their limits, as a table or as JSON."""

from __future__ import annotations

import sys

import msgspec
from rich.console import Console
from rich.table import Table

from headwater.bench.figures import FULL, QUICK, Figure, machine
from headwater.bench.suites import SUITES
from headwater.errors import ConfigurationError, EnvironmentFailure

_WIDTH = 120
"""Columns of a report that does not go to a terminal."""


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
    figures = SUITES[suite](QUICK if quick else FULL)
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
            f"{figure.ratio:.2f}",
            "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}",
            {None: "", True: "met", False: "[red]missed[/red]"}[figure.met],
        )
    return shown
