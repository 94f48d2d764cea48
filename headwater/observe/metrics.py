"""The table of metrics: one definition each, from which every exporter, `status --json` and docs/metrics.md
are made.

A metric is read from a `ClusterStatistics`. A server or worker that is asked by itself fills in what it knows
of itself (`statistics_of_server`, `statistics_of_worker`) and has those metrics that say so in `of`.

Names follow the rules of Prometheus, which `faults_of` checks: `headwater_`, then what is counted, then the
unit; counters end with `_total`. The number of series is bounded by that of nodes, models and tables: labels
whose values users make up are bounded here (`LOGGED_SERIES`).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import headwater
from headwater.machines.coordinator.tally import totals_of
from headwater.messages import (
    ClusterStatistics,
    Histogram,
    Progress,
    ServerStatistics,
    TableStatistics,
    Traffic,
    WorkerTotals,
)
from headwater.observe import readings as of
from headwater.spec.stages import COMMITS, SECONDS

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
Node: TypeAlias = Literal["cluster", "server", "worker"]
Sample: TypeAlias = tuple[tuple[str, ...], float | Histogram]
"""Values of the labels, and the value."""

EVERYWHERE: frozenset[Node] = frozenset(("cluster", "server", "worker"))
CLUSTER: frozenset[Node] = frozenset(("cluster",))
HOSTS: frozenset[Node] = frozenset(("cluster", "server"))
WORKERS: frozenset[Node] = frozenset(("cluster", "worker"))


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: without the suffix `_total` of a counter.
        kind: "counter", "gauge" or "histogram".
        unit: "seconds", "bytes" and so on; "" for a plain number. It ends the name.
        help: one sentence.
        read: samples of a cluster.
        labels: their names.
        of: what kinds of node have it.
        bounds: upper bounds of a histogram's buckets, all but infinity.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    read: Callable[[ClusterStatistics], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    of: frozenset[Node] = CLUSTER
    bounds: tuple[float, ...] = ()

    @property
    def exposed_name(self) -> str:
        """As it is scraped."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _one(read: Callable[[ClusterStatistics], float]) -> Callable[[ClusterStatistics], Iterator[Sample]]:
    """A metric without labels."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        yield (), read(statistics)

    return samples


def _table(read: Callable[[TableStatistics], float]) -> Callable[[ClusterStatistics], Iterator[Sample]]:
    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for table in statistics.tables:
            yield (table.name,), read(table)

    return samples


def _rank(read: Callable[[WorkerTotals], float]) -> Callable[[ClusterStatistics], Iterator[Sample]]:
    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for totals in statistics.totals:
            yield (str(totals.rank),), read(totals)

    return samples


def _host(read: Callable[[ServerStatistics], float]) -> Callable[[ClusterStatistics], Iterator[Sample]]:
    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for report in statistics.reports:
            yield (report.role, str(report.index)), read(report)

    return samples


def _traffic(
    read: Callable[[Traffic], Mapping[str, int] | int],
) -> Callable[[ClusterStatistics], Iterator[Sample]]:
    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for node, traffic in of.traffic_by_node(statistics):
            found = read(traffic)
            if isinstance(found, int):
                yield (node,), found
            else:
                for name, count in sorted(found.items()):
                    yield (node, name), count

    return samples


def _versions(statistics: ClusterStatistics) -> Iterator[Sample]:
    yield (headwater.__version__, platform.python_version()), 1


_HOST_LABELS = ("role", "index")

METRICS: tuple[Metric, ...] = (
    # ── the cluster ─────────────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_build_info",
        "gauge",
        "info",
        "Versions of Headwater and Python; always 1.",
        _versions,
        ("version", "python"),
        EVERYWHERE,
    ),
    Metric(
        "headwater_uptime_seconds",
        "gauge",
        "seconds",
        "Time since the coordinator's process began.",
        _one(lambda s: s.uptime),
    ),
    Metric(
        "headwater_version",
        "gauge",
        "",
        "Number of commits in the log.",
        _one(lambda s: s.version),
        of=EVERYWHERE,
    ),
    Metric(
        "headwater_commits",
        "counter",
        "",
        "Commits in the log; begins where a resumed training does, and falls when training begins anew.",
        _one(lambda s: s.version),
        of=HOSTS,
    ),
    Metric(
        "headwater_generation",
        "gauge",
        "",
        "How often training began anew from a checkpoint.",
        _one(lambda s: s.generation),
    ),
    Metric("headwater_term", "gauge", "", "Number of the roster's last change.", _one(lambda s: s.term)),
    Metric(
        "headwater_declared",
        "gauge",
        "",
        "Workers and servers that the cluster was declared with.",
        of.declared,
        ("role",),
    ),
    Metric("headwater_members", "gauge", "", "Members now.", of.members, ("role",)),
    Metric(
        "headwater_member_silence_seconds",
        "gauge",
        "seconds",
        "Time since the coordinator heard of a member.",
        of.silence,
        _HOST_LABELS,
    ),
    Metric(
        "headwater_members_waiting",
        "gauge",
        "",
        "Members that wait for somebody, or are waited for in vain.",
        of.waiting,
        ("role",),
    ),
    Metric(
        "headwater_members_joined",
        "counter",
        "",
        "Members that joined since the coordinator's process began.",
        lambda s: of.by_name(s.members.joined),
        ("role",),
    ),
    Metric(
        "headwater_members_lost",
        "counter",
        "",
        "Members that were declared dead since the coordinator's process began.",
        lambda s: of.by_name(s.members.lost),
        ("role",),
    ),
    Metric(
        "headwater_workers_finished",
        "gauge",
        "",
        "Declared workers that have done all their work.",
        _one(lambda s: len(s.finished)),
    ),
    Metric(
        "headwater_spares",
        "gauge",
        "",
        "Nodes that wait to become a server or standby.",
        _one(lambda s: s.spares),
    ),
    Metric(
        "headwater_unvisited_samples",
        "gauge",
        "samples",
        "Samples that a worker left and nobody took over.",
        _one(lambda s: sum(one.samples for one in s.unvisited)),
    ),
    # ── steps ───────────────────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_steps",
        "counter",
        "",
        "Finished steps of all workers by what became of them: applied, late, carried or skipped.",
        of.steps,
        ("result",),
        WORKERS,
    ),
    Metric(
        "headwater_worker_steps",
        "counter",
        "",
        "Finished steps of a rank over all its incarnations.",
        _rank(lambda t: sum(t.steps.values())),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_samples",
        "counter",
        "",
        "Samples that batches have handed out to a rank.",
        _rank(lambda t: t.samples),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_worker_incarnations",
        "gauge",
        "",
        "Incarnations of a rank so far.",
        _rank(lambda t: t.incarnations),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_staleness_commits",
        "histogram",
        "commits",
        "Commits between the version that a gradient was computed on and its own, of all steps.",
        of.staleness,
        of=WORKERS,
        bounds=COMMITS,
    ),
    Metric(
        "headwater_stage_seconds",
        "histogram",
        "seconds",
        "Time that a turn spent in a stage (data, compute, push, wait, pull), of all workers.",
        of.stages,
        ("stage",),
        WORKERS,
        SECONDS,
    ),
    Metric(
        "headwater_wait_seconds",
        "counter",
        "seconds",
        "Time that a rank spent in exchanges with the servers.",
        _rank(lambda t: t.waiting),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_exposed_seconds",
        "counter",
        "seconds",
        "Time for which the cluster waited for this rank in this stage; adds up to the time of the steps.",
        of.exposed,
        ("rank", "stage"),
    ),
    Metric(
        "headwater_gradient_norm",
        "gauge",
        "",
        "Norm of the last commit's gradient, of models that are clipped or merged by lengths.",
        of.norms,
        ("model",),
        WORKERS,
    ),
    Metric(
        "headwater_nonfinite_steps",
        "counter",
        "",
        "Steps of a rank that were empty turns because a gradient held NaN or infinity.",
        _rank(lambda t: t.steps.get("skipped", 0)),
        ("rank",),
        WORKERS,
    ),
    Metric(
        "headwater_logged",
        "gauge",
        "",
        "What Worker.log was last told, by rank and name; at most 2,000 series.",
        of.logged,
        ("rank", "name"),
        WORKERS,
    ),
    Metric(
        "headwater_logged_dropped",
        "gauge",
        "",
        "Metrics of Worker.log that are not shown here, since there are too many.",
        _one(of.logged_dropped),
        of=WORKERS,
    ),
    # ── servers ─────────────────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_log_position",
        "gauge",
        "",
        "Last entry of the log that a server or standby has processed.",
        _host(lambda r: r.position),
        _HOST_LABELS,
        HOSTS,
    ),
    Metric(
        "headwater_exchanges",
        "counter",
        "",
        "Exchanges that a server has answered.",
        _host(lambda r: r.exchanges),
        _HOST_LABELS,
        HOSTS,
    ),
    Metric(
        "headwater_standby_lag_entries",
        "gauge",
        "entries",
        "Entries of the log that a server has processed and its standby has not.",
        of.standby_lag,
        ("index",),
    ),
    Metric(
        "headwater_unreplicated_servers",
        "gauge",
        "servers",
        "Servers that should have a caught-up standby and have none.",
        _one(lambda s: len(s.unreplicated)),
    ),
    Metric(
        "headwater_failovers",
        "counter",
        "",
        "Servers whose standby took over.",
        _one(lambda s: s.members.failovers),
    ),
    Metric(
        "headwater_failover_seconds",
        "counter",
        "seconds",
        "Time of all failovers, from declaring a server dead until every server knows who took over.",
        _one(lambda s: s.members.failover_seconds),
    ),
    Metric(
        "headwater_rewinds",
        "counter",
        "",
        "How often training began anew since the coordinator's process began.",
        _one(lambda s: s.members.rewinds),
    ),
    # ── models and tables ───────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_model_elements",
        "gauge",
        "elements",
        "Elements of a model's tensors.",
        lambda s: (((one.name,), one.elements) for one in s.models),
        ("model",),
        HOSTS,
    ),
    Metric(
        "headwater_model_updates",
        "counter",
        "",
        "Updates that were applied to a model.",
        lambda s: (((one.name,), one.updates) for one in s.models),
        ("model",),
        HOSTS,
    ),
    Metric(
        "headwater_model_resident_bytes",
        "gauge",
        "bytes",
        "Memory that a model takes on a server.",
        of.model_bytes,
        (*_HOST_LABELS, "model"),
        HOSTS,
    ),
    Metric(
        "headwater_table_rows",
        "gauge",
        "rows",
        "Rows of a table, on all servers.",
        _table(lambda t: t.rows),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_resident_bytes",
        "gauge",
        "bytes",
        "Memory that a table takes, on all servers.",
        _table(lambda t: t.resident),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_updates",
        "counter",
        "",
        "Updates that carried gradients of a table.",
        _table(lambda t: t.updates),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_admitted_rows",
        "counter",
        "rows",
        "Rows that came into being with a gradient.",
        _table(lambda t: t.begun),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_refused_ids",
        "counter",
        "ids",
        "Ids whose gradient admission dropped.",
        _table(lambda t: t.refused),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_expired_rows",
        "counter",
        "rows",
        "Rows that expiry ended.",
        _table(lambda t: t.expired),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_pulled_ids",
        "counter",
        "ids",
        "Ids that were pulled.",
        _table(lambda t: t.pulled),
        ("table",),
        HOSTS,
    ),
    Metric(
        "headwater_table_hits",
        "counter",
        "",
        "Pulled ids that had a row.",
        _table(lambda t: t.hits),
        ("table",),
        HOSTS,
    ),
    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_checkpoints",
        "counter",
        "",
        "Checkpoints of this coordinator's process: written, or failed.",
        of.checkpoints,
        ("result",),
    ),
    Metric(
        "headwater_checkpoint_written_bytes",
        "counter",
        "bytes",
        "Bytes of all checkpoints that were written.",
        _one(lambda s: s.checkpoints.bytes),
    ),
    Metric(
        "headwater_checkpoint_write_seconds",
        "counter",
        "seconds",
        "Time of all checkpoints, each from its entry of the log to its manifest.",
        _one(lambda s: s.checkpoints.seconds),
    ),
    Metric(
        "headwater_checkpoint_last_version",
        "gauge",
        "",
        "Version of the last checkpoint that was written.",
        of.of_last_checkpoint(lambda c: c.version),
    ),
    Metric(
        "headwater_checkpoint_last_bytes",
        "gauge",
        "bytes",
        "Bytes of the last checkpoint that was written.",
        of.of_last_checkpoint(lambda c: c.last_bytes),
    ),
    Metric(
        "headwater_checkpoint_last_write_seconds",
        "gauge",
        "seconds",
        "Time that the last checkpoint took to write.",
        of.of_last_checkpoint(lambda c: c.last_seconds),
    ),
    Metric(
        "headwater_checkpoint_age_seconds",
        "gauge",
        "seconds",
        "Time since the last checkpoint was written.",
        of.of_last_checkpoint(lambda c: c.age),
    ),
    # ── connections ─────────────────────────────────────────────────────────────────────────────
    Metric(
        "headwater_connections",
        "gauge",
        "",
        "Connections of a node that are open.",
        _traffic(lambda t: t.connections),
        ("node",),
        HOSTS,
    ),
    Metric(
        "headwater_connections_refused",
        "counter",
        "",
        "Connections that a node refused, or ended for what was sent over them, by reason.",
        _traffic(lambda t: t.refused),
        ("node", "reason"),
        HOSTS,
    ),
    Metric(
        "headwater_sent_bytes",
        "counter",
        "bytes",
        "Bytes that a node sent, by transport; shared memory is not counted.",
        _traffic(lambda t: t.sent),
        ("node", "transport"),
        HOSTS,
    ),
    Metric(
        "headwater_received_bytes",
        "counter",
        "bytes",
        "Bytes that a node received, by transport; shared memory is not counted.",
        _traffic(lambda t: t.received),
        ("node", "transport"),
        HOSTS,
    ),
)
"""Every metric, in the order in which they are shown."""


def statistics_of_server(own: ServerStatistics) -> ClusterStatistics:
    """What a server, asked by itself, knows of the cluster."""
    return ClusterStatistics(
        own.term, 0, own.version, 0, "", (), own.models, own.tables, (), reports=(own,), uptime=0.0
    )


def statistics_of_worker(own: Progress) -> ClusterStatistics:
    """What a worker, asked by itself, knows of the cluster."""
    return ClusterStatistics(0, 0, own.version, 0, "", (), (), (), (own,), totals=(totals_of(own),))


def as_data(statistics: ClusterStatistics) -> dict[str, list[dict[str, Any]]]:
    """All samples by exposed name, as plain data for JSON: labels, and a value or a histogram."""
    found: dict[str, list[dict[str, Any]]] = {}
    for metric in METRICS:
        rows: list[dict[str, Any]] = []
        for values, value in metric.read(statistics):
            row: dict[str, Any] = {"labels": dict(zip(metric.labels, values, strict=True))}
            if isinstance(value, Histogram):
                row |= {"bounds": list(metric.bounds), "counts": list(value.counts), "sum": value.sum}
            else:
                row["value"] = value
            rows.append(row)
        found[metric.exposed_name] = rows
    return found


_RESERVED = ("le", "quantile", "job", "instance")
_UNITS = (
    "",
    "seconds",
    "bytes",
    "info",
    "commits",
    "entries",
    "samples",
    "servers",
    "rows",
    "ids",
    "elements",
)


def faults_of(metrics: Sequence[Metric]) -> list[str]:
    """What breaks the rules of Prometheus for names (and our own: unique, one sentence of help)."""
    faults = [f"{name} stands twice" for name in _twice([one.exposed_name for one in metrics])]
    for one in metrics:
        rules = {
            "begins with headwater_ and is lower case": re.fullmatch(r"headwater(_[a-z0-9]+)+", one.name),
            "a unit is a base unit": one.unit in _UNITS,
            "ends with its unit": not one.unit or one.name.endswith(f"_{one.unit}"),
            "_total is a counter's alone": not one.name.endswith("_total"),
            "no _count, _sum, _bucket": not re.search(r"_(count|sum|bucket|created)$", one.name),
            "no kind in the name": not re.search(r"counter|gauge|histogram", one.name),
            "help is one sentence": re.fullmatch(r"[A-Z][^\n]*\.", one.help),
            "labels are lower case": all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in one.labels),
            "no reserved label": not set(one.labels) & set(_RESERVED),
            "a histogram has bounds that grow": (one.kind == "histogram") == bool(one.bounds)
            and list(one.bounds) == sorted(set(one.bounds)),
        }
        faults += [f"{one.name}: {rule}" for rule, holds in rules.items() if not holds]
    return faults


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
