"""`headwater checkpoint`: what there are, what one holds, whether it is sound, its values; and one of now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from headwater import checkpoint
from headwater.checkpoint import Listed, Manifest
from headwater.checkpoint.spec_differences import describe_rule
from headwater.cli.faults import FAILED, complain
from headwater.cli.options import Address, Json, command, credentials, the
from headwater.cli.stop import who
from headwater.errors import ConfigurationError
from headwater.messages import ModelRecord, TableRecord
from headwater.runtime.inquiry import take_checkpoint
from headwater.spec.layout import Layout
from headwater.spec.seconds import seconds
from headwater.spec.words import option
from headwater.wire.security import Security

app = typer.Typer(
    help="Look at the checkpoints that trainings wrote, whether a cluster runs or not; have one written now.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

_Path = Annotated[
    str, typer.Argument(help="A checkpoint such as runs/g000-v000001200, or a directory of them.")
]


class Summary(msgspec.Struct, frozen=True):
    """A line of `list`; counts are None and `problem` says why where the manifest cannot be used."""

    path: str
    generation: int
    version: int
    written: str | None = None
    servers: int | None = None
    models: int | None = None
    tables: int | None = None
    size: int | None = None
    problem: str | None = None


class Shown(msgspec.Struct, frozen=True):
    """What `show` prints as JSON: the manifest, and what is not in it as such."""

    path: str
    size: int
    manifest: Manifest


@command(app, name="now", security=credentials())
def take_now(
    address: Address = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long it may take until it is on disk.")
    ] = 600.0,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Have a running cluster write a checkpoint of now, while training goes on; prints its path.

    The cluster needs a directory for checkpoints: [bold]--checkpoint[/bold] of run or serve coordinator.

    [bold]Example[/bold]

    headwater checkpoint now tcp:node1:7000 --token-file token

    Exit codes: 0 it is on disk, 1 it is not, 2 a wrong argument, or no directory.
    """
    limit = seconds(option("wait"), wait, zero=True)
    print(take_checkpoint(the(address), f"headwater checkpoint now ({who()})", limit, security))


@command(app, name="list")
def list_checkpoints(
    directory: Annotated[str, typer.Argument(help="Where a training keeps its checkpoints.")],
    json: Json = False,
) -> None:
    """List the checkpoints of a directory, oldest first; their files are not read.

    [bold]Example[/bold]

    headwater checkpoint list runs/a

    Exit codes: 0 listed, 1 it cannot be read, 2 no such directory, or no checkpoint in it.
    """
    summaries = [_summary(found) for found in checkpoint.list_checkpoints(directory)]
    if json:
        _print_json(summaries)
    if not summaries:
        raise ConfigurationError(f"{directory} holds no checkpoint")
    if json:
        return
    Console(highlight=False).print(_listing(summaries))
    for one in summaries:
        if one.problem is not None:
            print(one.problem)


@command(app)
def show(path: _Path, json: Json = False) -> None:
    """Show what a checkpoint holds: models, tables, rules, counts; of a directory, the newest one.

    [bold]Example[/bold]

    headwater checkpoint show runs/a --json

    Exit codes: 0 shown, 1 its manifest is damaged, 2 no checkpoint, or one of a newer format.
    """
    found = checkpoint.resolve(path, verify=False)
    manifest = found.manifest
    if json:
        _print_json(Shown(found.path, manifest.size, manifest))
        return
    console = Console(highlight=False)
    print(found.path)
    print(f"generation {manifest.generation}, version {manifest.version}, written {manifest.written}")
    print(f"by {manifest.servers} servers of headwater {manifest.headwater}, format {manifest.format}")
    print(f"{_megabytes(manifest.size)} in {len(manifest.files())} files")
    for first, *rest in [*map(_model, manifest.models), *map(_table, manifest.tables)]:
        console.print(Text(first))
        for line in rest:
            console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


@command(app)
def verify(path: _Path, json: Json = False) -> None:
    """Read every byte of a checkpoint, or of all in a directory, and name each damaged or missing file.

    [bold]Example[/bold]

    headwater checkpoint verify runs/a

    Exit codes: 0 all sound, 1 something is damaged, 2 no checkpoint, or one of a newer format.
    """
    found = checkpoint.verify_all(path)
    if json:
        _print_json(found)
    for one in found:
        if not json:
            print(f"{one.path}: {'sound' if one.sound else 'damaged'}")
            for extra in one.extras:
                print(f"  {extra} does not belong to it")
        for problem in one.problems:
            complain(f"{one.path}: {problem}")
    if not all(one.sound for one in found):
        raise typer.Exit(FAILED)


@command(app)
def export(
    path: _Path,
    file: Annotated[str, typer.Argument(help="The file to write; one that exists is replaced.")],
    table: Annotated[
        str | None,
        typer.Option("--table", metavar="NAME", help="Only this table's rows, as .parquet or .safetensors."),
    ] = None,
    counts: Annotated[bool, typer.Option("--counts", help="With --table: each row's updates.")] = False,
    last: Annotated[
        bool, typer.Option("--last", help="With --table: the version of each row's last gradient.")
    ] = False,
    state: Annotated[bool, typer.Option("--state", help="With --table: the rule's states.")] = False,
) -> None:
    """Write a checkpoint's values as one safetensors file, tensors under their own names; or a table's rows.

    [bold]Example[/bold]

    headwater checkpoint export runs/a model.safetensors

    headwater checkpoint export runs/a users.parquet --table users --counts

    Then in Python: module.load_state_dict(safetensors.torch.load_file("model.safetensors"))

    Exit codes: 0 written, 1 damaged or not writable, 2 no checkpoint, or one of a newer format.
    """
    if table is not None:
        rows = checkpoint.export_table(path, file, table, counts=counts, last=last, state=state)
        print(f"{file}: {rows:,} rows")
        return
    if counts or last or state:
        raise ConfigurationError("--counts, --last and --state say what of a table: pass --table NAME")
    written = checkpoint.export(path, file)
    print(f"{file}: {_megabytes(written.size)}")


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _summary(found: Listed) -> Summary:
    if found.checkpoint is None:
        return Summary(found.path, found.generation, found.version, problem=str(found.error))
    manifest = found.checkpoint.manifest
    return Summary(
        found.path,
        found.generation,
        found.version,
        written=manifest.written,
        servers=manifest.servers,
        models=len(manifest.models),
        tables=len(manifest.tables),
        size=manifest.size,
    )


def _listing(summaries: Sequence[Summary]) -> Table:
    shown = _empty("name", "written (UTC)", "servers", "models", "tables", "size")
    for one in summaries:
        name = one.path.rpartition("/")[2]  # generation and version
        if one.problem is not None:
            shown.add_row(name, "unusable")
            continue
        counts = (str(one.servers), str(one.models), str(one.tables), _megabytes(one.size or 0))
        shown.add_row(name, (one.written or "").partition("+")[0].replace("T", " "), *counts)
    return shown


def _model(model: ModelRecord) -> list[str]:
    """What there is of a model: a line, and what is shown below it."""
    least, most = min(model.counts), max(model.counts)
    span = str(least) if least == most else f"{least} to {most}"
    elements = f"{Layout(model.spec.tensors).counted():,}"
    rules = "; ".join(describe_rule(rule) for rule in model.rules)
    return [
        f"model {model.spec.name}: {len(model.spec.tensors)} tensors, {elements} elements, "
        f"{model.updates} updates ({span} of each tensor)",
        *_rule(rules, model.states),
    ]


def _table(table: TableRecord) -> list[str]:
    """The same of a table."""
    return [
        f"table {table.spec.name}: dim {table.spec.dim}, {table.rows:,} rows, "
        f"{table.pending:,} ids not admitted, {table.updates} updates",
        *_rule(describe_rule(table.rule), table.states),
    ]


def _rule(rule: str, states: Iterable[str]) -> list[str]:
    return [f"rule {rule}", *([f"state {', '.join(states)}"] if [*states] else [])]


def _empty(*headings: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    return shown
