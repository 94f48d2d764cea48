"""`headwater publish`: versions of a running training as files that inference engines pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from headwater.cli.options import Address, Json, command, credentials, the
from headwater.errors import ConfigurationError
from headwater.follower.publisher import publish as write_versions
from headwater.follower.view import View
from headwater.weights import Notification, PublishedVersion
from headwater.weights.notify import BODY
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@command(app, security=credentials())
def publish(
    address: Address = None,
    to: Annotated[
        str, typer.Option("--to", metavar="DIR", help="The directory or fsspec URL to write versions to.")
    ] = "",
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Which model, where there are several.")
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="NAME", help="A table whose rows go beside; repeatable."),
    ] = None,
    every: Annotated[
        str, typer.Option("--every", metavar="N|Ns", help="How often: commits such as 100, or seconds.")
    ] = "10s",
    full_every: Annotated[
        int, typer.Option("--full-every", metavar="N", help="Every so many versions one is full.")
    ] = 20,
    names: Annotated[
        Path | None,
        typer.Option("--names", metavar="FILE", help="JSON: a tensor's name here → its name in the engine."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, or bf16 (rounded to nearest even).")] = "fp32",
    dialect: Annotated[
        str, typer.Option("--dialect", help="sglang (slime, Miles, SGLang) or modelexpress (NVIDIA).")
    ] = "sglang",
    keep: Annotated[int, typer.Option("--keep", metavar="K", help="How many versions stay.")] = 40,
    checksum: Annotated[
        str | None, typer.Option("--checksum", help="xxh3-128, blake3 or adler32; the dialect's by default.")
    ] = None,
    notify: Annotated[
        str | None, typer.Option("--notify", metavar="URL", help="Post to this endpoint of an engine.")
    ] = None,
    notify_body: Annotated[
        str,
        typer.Option(
            "--notify-body",
            metavar="JSON",
            help="What to post; {version}, {directory} and {path} are replaced.",
        ),
    ] = BODY,
    versions: Annotated[
        int | None,
        typer.Option("--versions", metavar="N", help="Write so many and end; else until training ends."),
    ] = None,
    json: Json = False,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Write versions of a running training as files, full and as deltas, for inference engines to pull.

    Training is not slowed: it waits for no disk and no engine.

    [bold]Example[/bold]

    headwater publish tcp:node1:7000 --to /weights --every 30s --notify http://engine:30000/pull_weights

    Exit codes: 0 training has ended, or all versions were written; 1 the cluster or the directory is lost;
    2 a wrong argument.
    """
    if not to:
        raise ConfigurationError("where to? Pass --to DIR")
    write_versions(
        the(address),
        to,
        model=model,
        tables=tuple(table or ()),
        every=every,
        full_every=full_every,
        names=None if names is None else _names(names),
        dtype=dtype,
        dialect=dialect,
        keep=keep,
        checksum=checksum,
        notify=None if notify is None else Notification(notify, notify_body),
        versions=versions,
        wrote=_print_json if json else _print,
        security=security,
    )


def _names(file: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigurationError(f"--names {file}: {error}") from error


def _print(done: PublishedVersion, view: View) -> None:
    kind = "full" if done.full else "delta"
    sizes = f"{done.size / 1e6:,.2f} MB, {done.changed / 1e6:,.2f} of {done.total / 1e6:,.2f} MB changed"
    print(f"{done.path}: {kind}, {view.version}, {sizes}", flush=True)


def _print_json(done: PublishedVersion, view: View) -> None:
    told = {
        "path": done.path,
        "version": done.number,
        "full": done.full,
        "generation": view.version.generation,
        "number": view.version.number,
        "size": done.size,
        "changed": done.changed,
        "total": done.total,
    }
    print(msgspec.json.encode(told).decode(), flush=True)
