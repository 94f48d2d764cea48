"""`headwater verify`: are the standbys of a running cluster really equal to their servers?"""

from __future__ import annotations

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from headwater.cli.faults import FAILED
from headwater.runtime.verifier import ShardVerification, Verification, verify
from headwater.wire.security import PLAIN, Security


def show_verification(address: str, *, as_json: bool, security: Security = PLAIN) -> None:
    """Compare, and print what was found.

    Raises:
        HeadwaterError: the cluster could not be asked.
        typer.Exit: 1 when something differs or a shard has no caught-up standby.
    """
    found = verify(address, security=security)
    if as_json:
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
