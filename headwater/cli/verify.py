"""`headwater verify`: are the standbys of a running cluster really equal to their servers?"""

from __future__ import annotations

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from headwater.cli.faults import FAILED
from headwater.cli.options import Address, Json, command, credentials, the
from headwater.runtime.verifier import ShardVerification, Verification
from headwater.runtime.verifier import verify as compare
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@command(app, security=credentials())
def verify(
    address: Address = None,
    json: Json = False,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Compare every server of a running cluster with its standby, at one entry of the log.

    Training goes on; each node copies what it holds in memory, as for a checkpoint, and sums that up.

    [bold]Example[/bold]

    headwater verify unix:@hw-k3f9x2q7

    Exit codes: 0 all equal; 1 a standby differs, has not caught up or does not exist; 2 a wrong argument.
    """
    found = compare(the(address), security=security)
    if json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        console = Console(highlight=False)
        console.print(f"version {found.version}, entry {found.position} of the log")
        console.print(_shards(found))
    if not found.equal:
        raise typer.Exit(FAILED)


def _shards(found: Verification) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("shard", "standby", "parts", "digests of server and standby"):
        shown.add_column(heading, overflow="fold")
    for shard in found.shards:
        shown.add_row(str(shard.index), _verdict(shard), str(shard.parts), shard.reason)
        for part, both in shard.differing.items():
            shown.add_row("", "", part, " ".join(both))
    return shown


def _verdict(shard: ShardVerification) -> str:
    if shard.reason:
        return "none to compare"
    return "differs" if shard.differing else "equal"
