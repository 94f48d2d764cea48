"""The commands by name. Each lies in a module of its own, which is imported when the command is called."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import headwater
from headwater.cli.faults import USAGE, complain, said

COMMANDS = {
    "run": "Run a training function in every worker, against servers on this machine or in a Ray cluster.",
    "compare": "Train a script in several modes, under planted stragglers, and report which is sooner.",
    "serve": "Run nodes one by one, under any scheduler, and make certificates for them.",
    "status": "Show the nodes, models and tables of a running cluster.",
    "page": "Show a running cluster in a web page, beside a training and read only.",
    "ping": "Ask whether a cluster lives, or is ready to train: for probes and scripts.",
    "drain": "Have all workers of a running cluster finish with their next step.",
    "stop": "End a running cluster, with a last checkpoint where it keeps some.",
    "trace": "Record what all nodes of a running cluster do, as a file that Perfetto opens.",
    "verify": "Compare every server of a running cluster with its standby, at one entry of the log.",
    "table": "Write the rows of a running cluster's table to a file.",
    "publish": "Write versions of a running training as files that inference engines pull.",
    "checkpoint": "Look at the checkpoints that trainings wrote; a cluster need not be running.",
    "bench": "Measure this machine: each figure beside the limit it is held against, taken in the same run.",
}
"""Every command and what it does, in the order in which they are listed."""

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for any wrong command line."""


class Commands(TyperGroup):
    """Lists all commands, and imports one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself instead of its entry in the list."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = typer.main.get_command(importlib.import_module(f"headwater.cli.{name}").app)
            command.name = name
        return name, command, rest

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command line; a wrong one is told as every other error of a caller's is."""
        options["standalone_mode"] = False
        try:
            code = super().main(*arguments, **options)
        except _UsageError as error:
            text = said(error)
            code = USAGE if text else 0  # a group without a command has shown its help
            if text:
                complain(text)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="headwater",
    cls=Commands,
    help="A parameter server for Python: train with synchronous, asynchronous or bounded-stale workers.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"headwater {headwater.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def headwater_(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """A parameter server for Python: train with synchronous, asynchronous or bounded-stale workers."""
    if context.invoked_subcommand is None:
        print(context.get_help())
