"""What a metric is, and how one is read from a `ClusterStatistics` by node, rank or table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from headwater.messages import (
    ClusterStatistics,
    Histogram,
    ServerStatistics,
    TableStatistics,
    Traffic,
    WorkerTotals,
)
from headwater.observe import readings

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
        """The name that scrapers see."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


Read: TypeAlias = Callable[[ClusterStatistics], Iterator[Sample]]
"""All samples of a metric."""

HOST_LABELS = ("role", "index")
"""Labels of what each server and each standby has."""


def plain(read: Callable[[ClusterStatistics], float]) -> Read:
    """A metric without labels."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        yield (), read(statistics)

    return samples


def by_table(read: Callable[[TableStatistics], float]) -> Read:
    """A metric of each table."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for table in statistics.tables:
            yield (table.name,), read(table)

    return samples


def by_rank(read: Callable[[WorkerTotals], float]) -> Read:
    """A metric of each rank."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for totals in statistics.totals:
            yield (str(totals.rank),), read(totals)

    return samples


def by_host(read: Callable[[ServerStatistics], float]) -> Read:
    """A metric of each server and each standby."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for report in statistics.reports:
            yield (report.role, str(report.index)), read(report)

    return samples


def by_node(read: Callable[[Traffic], Mapping[str, int] | int]) -> Read:
    """A metric of each node, and of each name where `read` gives several."""

    def samples(statistics: ClusterStatistics) -> Iterator[Sample]:
        for node, traffic in readings.traffic_by_node(statistics):
            found = read(traffic)
            if isinstance(found, int):
                yield (node,), found
            else:
                for name, count in sorted(found.items()):
                    yield (node, name), count

    return samples
