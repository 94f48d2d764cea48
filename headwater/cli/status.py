"""`headwater status`: one question to a coordinator, shown as tables or as JSON."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from headwater.messages import ClusterStatistics
from headwater.runtime.inquiry import ask
from headwater.wire.security import PLAIN, Security


def show_status(address: str, *, as_json: bool, security: Security = PLAIN) -> None:
    """Print the state of the cluster at `address`; blocks for its answer.

    Raises:
        ConnectionLostError: nobody answers there.
        ProtocolError: whoever answers is not a coordinator.
    """
    statistics = ask(address, security)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(statistics), indent=2).decode())
        return
    console = Console(highlight=False)
    console.print(
        f"{statistics.sync}, {statistics.workers} workers declared, "
        f"version {statistics.version}, term {statistics.term}"
        + (f", spares {statistics.spares}" if statistics.spares else "")
    )
    console.print(_nodes(statistics))
    if statistics.models:
        console.print(_models(statistics))
    if statistics.tables:
        console.print(_tables(statistics))


def _nodes(statistics: ClusterStatistics) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("role", "rank", "index", "pid", "term", "version", "address", "waits for"):
        shown.add_column(heading, overflow="fold")
    for node in statistics.nodes:
        rank = str(node.rank) if isinstance(node.rank, int) else ""
        index = str(node.index) if isinstance(node.index, int) else ""
        numbers = (str(node.pid), str(node.term), str(node.version))
        shown.add_row(node.role, rank, index, *numbers, node.address, node.waits_for or "")
    return shown


def _models(statistics: ClusterStatistics) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "rule", "tensors", "elements", "updates", "on server 0"):
        shown.add_column(heading, overflow="fold")
    for model in statistics.models:
        counts = (str(model.tensors), f"{model.elements:,}", str(model.updates))
        shown.add_row(model.name, model.rule, *counts, f"{model.resident / 1e6:,.1f} MB")
    return shown


def _tables(statistics: ClusterStatistics) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "table",
        "rule",
        "dim",
        "rows",
        "updates",
        "hits",
        "refused",
        "expired",
        "on all servers",
    ):
        shown.add_column(heading, overflow="fold")
    for table in statistics.tables:
        counts = (str(table.dim), f"{table.rows:,}", str(table.updates), f"{table.hit_ratio:.0%}")
        ended = (f"{table.refused:,}", f"{table.expired:,}")
        shown.add_row(table.name, table.rule, *counts, *ended, f"{table.resident / 1e6:,.1f} MB")
    return shown
