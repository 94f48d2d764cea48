"""`headwater status`: one question to a coordinator, shown as tables or as JSON."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headwater.cli.health import Health
from headwater.cli.options import Address, Json, command, credentials, the
from headwater.messages import ClusterStatistics, NodeStatistics
from headwater.observe.display import duration
from headwater.observe.exposure import exposures
from headwater.observe.metrics import as_data
from headwater.runtime.inquiry import ask
from headwater.wire.security import Security

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_WATCH_S = 1.0
_INTERNAL = ("observer",)
"""Roles of members that a cluster has for itself."""


@command(app, security=credentials())
def status(
    address: Address = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew each second.")] = False,
    security: Security = Security(),  # noqa: B008 - made from its options
) -> None:
    """Show the nodes, models and tables of a running cluster, and who waits for whom.

    The first line says whether it is healthy, and if not, why.

    [bold]Examples[/bold]

    headwater status unix:@hw-k3f9x2q7

    headwater status tcp:node1:7000 --token-file token --watch

    Exit codes: 0 it answered, 1 it did not, 2 a wrong argument.
    """
    where = the(address)
    if json:
        statistics = ask(where, security)
        nodes = tuple(node for node in statistics.nodes if node.role not in _INTERNAL)
        shown = msgspec.to_builtins(msgspec.structs.replace(statistics, nodes=nodes))
        shown["metrics"] = as_data(statistics)
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
    elif watch:
        _watch(where, security)
    else:
        Console(highlight=False).print(page(ask(where, security)))


def _watch(address: str, security: Security) -> None:
    """Until Ctrl-C, or until the cluster has ended."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(page(ask(address, security)), refresh=True)
            time.sleep(_WATCH_S)


def page(statistics: ClusterStatistics) -> RenderableType:
    """What a person sees: 80 columns are enough for everything but long names."""
    parts: list[RenderableType] = [
        Text(Health.of(statistics).summary()),
        Text(_about(statistics)),
        _nodes(statistics),
    ]
    slowest = exposures(statistics.totals)
    if slowest and len(statistics.totals) > 1:
        parts.append(Text(f"slowest: {slowest[0]}"))
    if (written := _checkpoint(statistics)) is not None:
        parts.append(Text(written))
    parts += [Text(line) for line in statistics.joining]
    if statistics.models:
        parts.append(_models(statistics))
    if statistics.tables:
        parts.append(_tables(statistics))
    return Group(*parts)


def _about(statistics: ClusterStatistics) -> str:
    spares = f", {statistics.spares} spares" if statistics.spares else ""
    return (
        f"{statistics.sync}, version {statistics.version}, generation {statistics.generation}, "
        f"term {statistics.term}{spares}"
    )


def _checkpoint(statistics: ClusterStatistics) -> str | None:
    counts = statistics.checkpoints
    if not counts.written:
        return f"no checkpoint could be written, of {counts.failed}" if counts.failed else None
    failed = f", {counts.failed} failed" if counts.failed else ""
    return (
        f"last checkpoint: version {counts.version}, {duration(counts.age)} ago, "
        f"{counts.last_bytes / 1e6:,.1f} MB in {counts.last_seconds:.1f} s{failed}"
    )


def _nodes(statistics: ClusterStatistics) -> Table:
    rates = {report.rank: report.steps / report.elapsed for report in statistics.progress if report.elapsed}
    shown = _empty("node", "pid", "version", "steps/s", "heard", "waits for")
    for node in statistics.nodes:
        if node.role in _INTERNAL:
            continue
        rate = rates.get(node.rank) if isinstance(node.rank, int) else None
        heard = "" if node.role == "coordinator" else f"{node.silence:.0f} s"
        numbers = (str(node.pid), str(node.version), "" if rate is None else f"{rate:.1f}", heard)
        shown.add_row(name_of(node), *numbers, node.waits_for or "")
    return shown


def name_of(node: NodeStatistics) -> str:
    """`server 0`, `worker 3`, `coordinator`, `follower`."""
    if node.role == "coordinator":
        return node.role
    if node.role == "follower":
        return node.role
    return f"{node.role} {node.rank if isinstance(node.rank, int) else node.index}"


def _models(statistics: ClusterStatistics) -> Table:
    shown = _empty("model", "rule", "tensors", "elements", "updates", "on server 0")
    for model in statistics.models:
        counts = (str(model.tensors), f"{model.elements:,}", str(model.updates))
        shown.add_row(model.name, model.rule, *counts, f"{model.resident / 1e6:,.1f} MB")
    return shown


def _tables(statistics: ClusterStatistics) -> Table:
    shown = _empty("table", "rule", "dim", "rows", "updates", "hits", "refused", "expired", "memory")
    for table in statistics.tables:
        counts = (str(table.dim), f"{table.rows:,}", str(table.updates), f"{table.hit_ratio:.0%}")
        ended = (f"{table.refused:,}", f"{table.expired:,}")
        shown.add_row(table.name, table.rule, *counts, *ended, f"{table.resident / 1e6:,.1f} MB")
    return shown


def _empty(*headings: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    return shown
