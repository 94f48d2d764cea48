"""How metrics are read from statistics, where that takes more than a field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from headwater.messages import (
    CheckpointCounts,
    ClusterStatistics,
    Histogram,
    NodeStatistics,
    Traffic,
)
from headwater.spec.stages import STAGES, STEP_RESULTS

LOGGED_SERIES = 2000
"""Series of `headwater_logged` that are shown at most."""

_ROLES = ("coordinator", "server", "standby", "worker")

Samples = Iterator[tuple[tuple[str, ...], float | Histogram]]


def by_name(counts: Mapping[str, float]) -> Samples:
    """One sample for each."""
    for name in sorted(counts):
        yield (name,), counts[name]


def declared(statistics: ClusterStatistics) -> Samples:
    """Workers and servers."""
    yield ("server",), statistics.servers
    yield ("worker",), statistics.workers


def members(statistics: ClusterStatistics) -> Samples:
    """Of each role."""
    counts = Counter(node.role for node in statistics.nodes)
    for role in _ROLES:
        yield (role,), counts[role]


def silence(statistics: ClusterStatistics) -> Samples:
    """Of every member but the coordinator, and those that a cluster has for itself."""
    for node in statistics.nodes:
        if node.role in _ROLES[1:]:
            yield (node.role, _index(node)), node.silence


def waiting(statistics: ClusterStatistics) -> Samples:
    """Members of each role that wait."""
    counts = Counter(node.role for node in statistics.nodes if node.waits_for)
    for role in _ROLES[1:]:
        yield (role,), counts[role]


def steps(statistics: ClusterStatistics) -> Samples:
    """By what became of them."""
    for result in STEP_RESULTS:
        yield (result,), sum(totals.steps.get(result, 0) for totals in statistics.totals)


def staleness(statistics: ClusterStatistics) -> Samples:
    """Of all ranks together."""
    yield (), _together([totals.staleness for totals in statistics.totals])


def stages(statistics: ClusterStatistics) -> Samples:
    """Of all ranks together."""
    for stage in STAGES:
        of_ranks = [totals.stages[stage] for totals in statistics.totals if stage in totals.stages]
        yield (stage,), _together(of_ranks)


def exposed(statistics: ClusterStatistics) -> Samples:
    """In seconds; of stages in which a rank was ever waited for."""
    for totals in statistics.totals:
        for stage in STAGES:
            if nanoseconds := totals.exposed.get(stage, 0):
                yield (str(totals.rank), stage), nanoseconds / 1e9


def norms(statistics: ClusterStatistics) -> Samples:
    """As the rank with the newest version has it."""
    newest = max(statistics.progress, key=lambda report: report.version, default=None)
    if newest is not None:
        yield from by_name(newest.norms)


def logged(statistics: ClusterStatistics) -> Samples:
    """The first `LOGGED_SERIES`, in order of rank."""
    yield from islice(_logged(statistics), LOGGED_SERIES)


def _logged(statistics: ClusterStatistics) -> Samples:
    for report in statistics.progress:
        for name in sorted(report.metrics):
            yield (str(report.rank), name), report.metrics[name]


def logged_dropped(statistics: ClusterStatistics) -> float:
    """Those that are too many here, and those that workers dropped."""
    here = sum(len(report.metrics) for report in statistics.progress)
    return max(0, here - LOGGED_SERIES) + sum(totals.dropped for totals in statistics.totals)


def standby_lag(statistics: ClusterStatistics) -> Samples:
    """Of every server whose standby answers."""
    positions = {(report.role, report.index): report.position for report in statistics.reports}
    for (role, index), position in sorted(positions.items()):
        if role == "standby" and ("server", index) in positions:
            yield (str(index),), max(0, positions["server", index] - position)


def model_bytes(statistics: ClusterStatistics) -> Samples:
    """By server or standby, and model."""
    for report in statistics.reports:
        for model in report.models:
            yield (report.role, str(report.index), model.name), model.resident


def checkpoints(statistics: ClusterStatistics) -> Samples:
    """By result."""
    yield ("failed",), statistics.checkpoints.failed
    yield ("written",), statistics.checkpoints.written


def of_last_checkpoint(read: Callable[[CheckpointCounts], float]) -> Callable[[ClusterStatistics], Samples]:
    """Nothing before the first one."""

    def samples(statistics: ClusterStatistics) -> Samples:
        if statistics.checkpoints.written:
            yield (), read(statistics.checkpoints)

    return samples


def traffic_by_node(statistics: ClusterStatistics) -> Iterator[tuple[str, Traffic]]:
    """The coordinator's, where it is the one that tells, and the hosts'."""
    if statistics.nodes:
        yield "coordinator", statistics.traffic
    for report in statistics.reports:
        yield f"{report.role} {report.index}", report.traffic


def _index(node: NodeStatistics) -> str:
    return str(node.rank if isinstance(node.rank, int) else node.index)


def _together(histograms: list[Histogram]) -> Histogram:
    known = [one for one in histograms if one.counts]
    counts = tuple(sum(column) for column in zip(*(one.counts for one in known), strict=True))
    return Histogram(counts, sum(one.sum for one in known))
