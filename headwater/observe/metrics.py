"""The table of metrics: one definition each, from which every exporter, `status --json` and docs/metrics.md
are made.

A metric is read from a `ClusterStatistics`. A server or worker that is asked by itself fills in what it knows
of itself (`statistics_of_server`, `statistics_of_worker`) and has those metrics that say so in `of`.

Names follow the rules of Prometheus (`headwater.observe.metric_names`): `headwater_`, then what is counted,
then the unit; counters end with `_total`. The number of series is bounded by that of nodes, models and
tables: labels whose values users make up are bounded in `readings` (`LOGGED_SERIES`).
"""

from __future__ import annotations

from typing import Any

from headwater.machines.coordinator.tally import totals_of
from headwater.messages import ClusterStatistics, Histogram, Progress, ServerStatistics
from headwater.observe.follower_metrics import FOLLOWER_METRICS
from headwater.observe.metric import Metric
from headwater.observe.server_metrics import (
    CHECKPOINT_METRICS,
    CONNECTION_METRICS,
    LOG_METRICS,
    STATE_METRICS,
)
from headwater.observe.training_metrics import CLUSTER_METRICS, STEP_METRICS

METRICS: tuple[Metric, ...] = (
    *CLUSTER_METRICS,
    *STEP_METRICS,
    *LOG_METRICS,
    *STATE_METRICS,
    *CHECKPOINT_METRICS,
    *CONNECTION_METRICS,
    *FOLLOWER_METRICS,
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
