"""`headwater table`: the rows of a running cluster's table as a file for other tools."""

from __future__ import annotations

from typing import Annotated

import typer

from headwater.cli.options import command, credentials
from headwater.follower.table_file import export_rows
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@command(app, security=credentials())
def table(
    address: Annotated[str, typer.Argument(help="The cluster, as `headwater run` printed it.")],
    name: Annotated[str, typer.Argument(help="The table.")],
    export: Annotated[
        str,
        typer.Option("--export", metavar="FILE", help="The file to write, .parquet or .safetensors."),
    ],
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Write all rows of a table of a running cluster, as of one version: ids and values.

    Training goes on. Counts, last steps and states are in checkpoints: headwater checkpoint export --table.

    [bold]Example[/bold]

    headwater table tcp:node1:7000 users --export users.parquet

    Exit codes: 0 written; 1 the cluster is lost, or the file cannot be written; 2 a wrong argument.
    """
    rows, version = export_rows(address, name, export, security=security)
    print(f"{export}: {rows:,} rows of {version}")
