"""Tables and lists of a page as HTML: real tables with headings, which screen readers read. Pure.

Everything that comes from a cluster is escaped: names and reasons are texts of users.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from headwater.page.moment import Moment, WorkerRow
from headwater.page.poller import Event, PageState
from headwater.spec.words import numbered

_EVENTS = 30
_WAITS = 8
_LATE_S = 2.0
_TEXTS = ("state", "note", "rule")
"""Headings of columns that have no numbers."""


def workers(moment: Moment) -> str:
    """A row a rank, each with its state first."""
    with_metrics = sorted({name for one in moment.workers for name, _ in one.metrics})[:4]
    headings = ("worker", "state", "steps", "steps/s", "version", "staleness", "waiting", "late", "heard")
    rows = [_worker(one, with_metrics) for one in moment.workers]
    return _table("Workers", (*headings, *with_metrics), rows)


def _worker(row: WorkerRow, metrics: Sequence[str]) -> str:
    kind = "gone" if row.is_gone else "waits" if row.waits else "works"
    known = dict(row.metrics)
    cells = [
        _cell("number", f"{row.steps:,}", f"steps-{row.rank}", row.steps),
        _cell("number", "–" if row.rate is None else f"{row.rate:.1f}"),
        _cell("number", f"{row.version:,}", f"version-{row.rank}", row.version),
        _cell("number", f"{row.staleness:.2f}"),
        _cell("number", f"{row.waiting:.0%}"),
        _cell("number", f"{row.late:,}"),
        _heard(row.heard),
        *(_cell("number", f"{known[name]:.4g}" if name in known else "–") for name in metrics),
    ]
    state = f'<td class="state {kind}"><span class="dot" aria-hidden="true"></span>{escape(row.state)}</td>'
    return f'<tr class="{kind}"><th scope="row">{row.rank}</th>{state}{"".join(cells)}</tr>'


def nodes(moment: Moment) -> str:
    """Coordinator, servers, standbys."""
    rows = [
        f'<tr><th scope="row">{escape(one.name)}</th>{_cell("number", str(one.pid))}'
        f"{_cell('number', f'{one.version:,}')}{_heard(one.heard)}{_cell('note', one.note or '–')}</tr>"
        for one in moment.nodes
    ]
    return _table("Servers and coordinator", ("node", "pid", "version", "heard", "note"), rows)


def models(moment: Moment) -> str:
    """Models and tables, with how many updates they have had."""
    rows = [
        f'<tr><th scope="row">{escape(one.name)}</th>{_cell("note", one.rule)}'
        f"{_cell('number', f'{one.elements:,} elements')}{_cell('number', f'{one.updates:,}')}</tr>"
        for one in moment.statistics.models
    ]
    rows += [
        f'<tr><th scope="row">{escape(one.name)}</th>{_cell("note", one.rule)}'
        f"{_cell('number', f'{one.rows:,} rows of {one.dim}')}{_cell('number', f'{one.updates:,}')}</tr>"
        for one in moment.statistics.tables
    ]
    return _table("Models and tables", ("name", "rule", "size", "updates"), rows)


def about(moment: Moment) -> str:
    """The mode and the generation."""
    told = moment.statistics
    return escape(f"{told.sync} · generation {told.generation} · term {told.term}")


def tiles(moment: Moment) -> str:
    """The most important numbers."""
    told = moment.statistics
    there = sum(not one.is_gone for one in moment.workers)
    servers = sum(node.role == "server" for node in told.nodes)
    standbys = sum(node.role == "standby" for node in told.nodes)
    steps = sum(one.steps for one in moment.workers) or 1
    stale = sum(one.staleness * one.steps for one in moment.workers) / steps
    waiting = sum(one.waiting for one in moment.workers) / max(1, len(moment.workers))
    shown = [
        _tile("version", f"{told.version:,}", told.version),
        _tile("steps/s", _rate(moment.steps_per_s)),
        *([_tile("samples/s", _rate(moment.samples_per_s))] if moment.samples_per_s else []),
        *(_tile(name, f"{value:.4g}") for name, value in list(moment.metrics.items())[:2]),
        _tile("mean staleness", f"{stale:.2f}"),
        _tile("time waiting", f"{waiting:.0%}"),
        _tile("workers", f"{there}/{told.workers}", there),
        _tile("servers", f"{servers}/{told.servers}", servers, f"{standbys} standbys" if standbys else ""),
        _tile("last checkpoint", *checkpoint(moment)),
    ]
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def _tile(name: str, text: str, value: object = None, more: str = "") -> str:
    data = "" if value is None else f' data-name="{escape(name)}" data-value="{value}"'
    rest = f'<dd class="more">{escape(more)}</dd>' if more else ""
    return f'<div class="tile"><dt>{escape(name)}</dt><dd{data}>{escape(text)}</dd>{rest}</div>'


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def waits(moment: Moment) -> str:
    """Who waits for whom now: for each reason, who waits for it."""
    items = [
        f'<li><span class="who">{escape(_named(one.members))}</span> {escape(one.reason)}</li>'
        for one in moment.waits[:_WAITS]
    ]
    more = len(moment.waits) - _WAITS
    if more > 0:
        items.append(f"<li>and {more} more</li>")
    items += [f"<li>{escape(text)}</li>" for text in moment.statistics.joining]
    return f'<ul class="waits">{"".join(items)}</ul>' if items else '<p class="quiet">Nobody waits.</p>'


def events(shown: PageState) -> str:
    """The newest first."""
    if not shown.events:
        return '<p class="quiet">Nothing has happened since this page began.</p>'
    now = shown.time
    items = [_event(one, now) for one in reversed(shown.events[-_EVENTS:])]
    return f'<ol class="events" reversed>{"".join(items)}</ol>'


def _event(event: Event, now: float) -> str:
    return f"<li><time>{_ago(now - event.time)}</time> {escape(event.text)}</li>"


def checkpoint(moment: Moment) -> tuple[str, object, str]:
    """The version of the last checkpoint, as text and as it is, and what else is to be said of it."""
    counts = moment.statistics.checkpoints
    failed = f"{counts.failed} failed" if counts.failed else ""
    if not counts.written:
        return "none yet", None, failed
    size = f"{counts.last_bytes / 1e6:,.1f} MB in {counts.last_seconds:.1f} s"
    said = (_ago(counts.age), size, failed)
    return f"v {counts.version:,}", counts.version, " · ".join(one for one in said if one)


def _named(members: Sequence[str]) -> str:
    """`workers 0, 2, 3`."""
    by_role: dict[str, list[int]] = {}
    for member in members:
        role, _, number = member.partition(" ")
        by_role.setdefault(role, []).append(int(number or 0))
    return "; ".join(
        role if role == "coordinator" else numbered(role, which) for role, which in by_role.items()
    )


def _table(caption: str, headings: Iterable[str], rows: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col"{" class=text" if one in _TEXTS else ""}>{escape(one)}</th>' for one in headings
    )
    return (
        f'<table><caption class="unseen">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(kind: str, text: str, name: str = "", value: object = None) -> str:
    data = f' data-name="{escape(name)}" data-value="{escape(str(value))}"' if name else ""
    return f'<td class="{kind}"{data}>{escape(text)}</td>'


def _heard(seconds: float | None) -> str:
    if seconds is None:
        return _cell("number", "–")
    return _cell("number late" if seconds > 3 * _LATE_S else "number", f"{seconds:.0f} s ago")


def _ago(seconds: float) -> str:
    if seconds < 1.5:
        return "now"
    if seconds < 90:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.1f} h ago"


def escape(text: str) -> str:
    """As text within HTML."""
    return html.escape(text, quote=True)
