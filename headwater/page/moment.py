"""What a page shows of a cluster at one moment, made of its statistics. Pure.

Invariants:
- Every number that is shown stands in a `ClusterStatistics`, or is the difference of two.
- A row for each member and rank: a page of a hundred workers is a table of a hundred rows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from headwater.messages import ClusterStatistics, NodeStatistics, WorkerTotals
from headwater.observe.exposure import exposures
from headwater.spec.stages import COMMITS, STAGES

_CHARTED = 12
"""Ranks with the most exposed time that are drawn."""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One rank. `state`: what it does, in words. `waits`, `is_gone`: how that is marked.

    `rate`: steps a second since the moment before; None where there is none. `waiting`: share of its time.
    `staleness`: mean, in commits. `heard`: seconds since the coordinator heard of it; None when it is gone.
    """

    rank: int
    state: str
    waits: bool
    is_gone: bool
    steps: int
    rate: float | None
    version: int
    staleness: float
    waiting: float
    samples: int
    heard: float | None
    late: int
    metrics: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class NodeRow:
    """The coordinator, a server, a standby or a follower. `note`: what a person should know of it."""

    name: str
    pid: int
    version: int
    heard: float | None
    note: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Members that wait for the same, and for what and whom, as the sequencer says."""

    members: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment.

    Attributes:
        time: of the monotonic clock of whoever asked.
        statistics: what the coordinator answered.
        workers, nodes, waits: the tables.
        steps_per_s, samples_per_s, commits_per_s: of all, since the moment before; None for the first.
        exposed: rank → seconds by stage, for those with the most.
        slowest: whom the cluster has waited for most; "" for nobody.
        staleness: (upper bound, steps), the last bound is infinite.
        metrics: name → mean over the ranks that logged it.
    """

    time: float
    statistics: ClusterStatistics
    workers: tuple[WorkerRow, ...]
    nodes: tuple[NodeRow, ...]
    waits: tuple[Wait, ...]
    steps_per_s: float | None
    samples_per_s: float | None
    commits_per_s: float | None
    exposed: tuple[tuple[int, dict[str, float]], ...]
    slowest: str
    staleness: tuple[tuple[str, int], ...]
    metrics: dict[str, float]


def moment_of(statistics: ClusterStatistics, now: float, before: Moment | None = None) -> Moment:
    """What is shown of an answer that came at `now`; rates are since `before`, of the same generation."""
    if before is not None and before.statistics.generation != statistics.generation:
        before = None
    passed = now - before.time if before is not None else 0.0

    def rate(new: float, old: float) -> float | None:
        return max(0.0, new - old) / passed if passed > 0 else None

    old = {one.rank: one for one in before.workers} if before is not None else {}
    workers = _workers(statistics, old, passed)
    steps = sum(one.steps for one in workers)
    samples = sum(one.samples for one in workers)
    return Moment(
        now,
        statistics,
        workers,
        _nodes(statistics),
        _waits(statistics),
        rate(steps, sum(one.steps for one in old.values())) if before is not None else None,
        rate(samples, sum(one.samples for one in old.values())) if before is not None else None,
        rate(statistics.version, before.statistics.version) if before is not None else None,
        _exposed(statistics),
        _slowest(statistics),
        _staleness(statistics),
        _means(workers),
    )


def _workers(
    statistics: ClusterStatistics, old: dict[int, WorkerRow], passed: float
) -> tuple[WorkerRow, ...]:
    nodes = {node.rank: node for node in statistics.nodes if node.role == "worker"}
    totals = {one.rank: one for one in statistics.totals}
    told = {one.rank: one for one in statistics.progress}
    ranks = sorted({*range(statistics.workers), *(r for r in nodes if isinstance(r, int)), *totals, *told})
    rows = []
    for rank in ranks:
        node, progress = nodes.get(rank), told.get(rank)
        own = totals.get(rank, WorkerTotals(rank))
        steps = sum(own.steps.values())
        state = _state(rank, node, statistics)
        rate = None
        if rank in old and passed > 0:
            rate = max(0, steps - old[rank].steps) / passed
        rows.append(
            WorkerRow(
                rank,
                state,
                node is not None and bool(node.waits_for),
                node is None and rank not in statistics.finished,
                steps,
                rate,
                progress.version if progress is not None else 0,
                own.staleness.sum / own.staleness.count if own.staleness.count else 0.0,
                min(1.0, own.waiting / own.elapsed) if own.elapsed else 0.0,
                own.samples,
                node.silence if node is not None else None,
                own.steps.get("late", 0) + own.steps.get("carried", 0),
                tuple(sorted(progress.metrics.items())) if progress is not None else (),
            )
        )
    return tuple(rows)


def _state(rank: int, node: NodeStatistics | None, statistics: ClusterStatistics) -> str:
    if rank in statistics.finished:
        return "finished"
    if node is None:
        return "not there"
    return node.waits_for or "computing"


def _nodes(statistics: ClusterStatistics) -> tuple[NodeRow, ...]:
    rows = []
    own = {node.pid for node in statistics.nodes if node.role == "coordinator"}
    for node in statistics.nodes:
        if node.role == "worker" or (node.role == "observer" and node.pid in own):
            continue  # one in the coordinator's process is the cluster's own: it takes checkpoints
        if node.role == "follower":
            behind = max(0, statistics.version - node.version)
            note = node.waits_for or f"{behind} versions behind"
            rows.append(NodeRow("follower", node.pid, node.version, node.silence, note))
            continue
        if node.role == "observer":
            rows.append(NodeRow("reader", node.pid, node.version, node.silence, "follows, or reads values"))
            continue
        index = "" if node.role == "coordinator" else f" {node.index}"
        note = node.waits_for or ""
        if node.role == "server" and node.index in statistics.unreplicated:
            note = "; ".join(one for one in (note, "without a caught-up standby") if one)
        heard = None if node.role == "coordinator" else node.silence
        rows.append(NodeRow(f"{node.role}{index}", node.pid, node.version, heard, note))
    return tuple(rows)


def _waits(statistics: ClusterStatistics) -> tuple[Wait, ...]:
    """Those with most members first."""
    found: dict[str, list[str]] = defaultdict(list)
    for node in statistics.nodes:
        if node.waits_for and node.role not in ("observer", "follower"):
            name = node.rank if isinstance(node.rank, int) else node.index
            found[node.waits_for].append(f"{node.role} {name}")
    order = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return tuple(Wait(tuple(members), reason) for reason, members in order)


def _exposed(statistics: ClusterStatistics) -> tuple[tuple[int, dict[str, float]], ...]:
    found = [
        (one.rank, {stage: one.exposed.get(stage, 0) / 1e9 for stage in STAGES}) for one in statistics.totals
    ]
    found = [entry for entry in found if any(entry[1].values())]
    found.sort(key=lambda entry: (-sum(entry[1].values()), entry[0]))
    return tuple(found[:_CHARTED])


def _slowest(statistics: ClusterStatistics) -> str:
    found = exposures(statistics.totals)
    return str(found[0]) if found and len(statistics.totals) > 1 else ""


def _staleness(statistics: ClusterStatistics) -> tuple[tuple[str, int], ...]:
    counts = [0] * (len(COMMITS) + 1)
    for one in statistics.totals:
        for place, count in enumerate(one.staleness.counts):
            counts[place] += count
    bounds = [f"≤ {bound}" if place > 1 else str(bound) for place, bound in enumerate(COMMITS)]
    return tuple(zip([*bounds, f"> {COMMITS[-1]}"], counts, strict=True))


def _means(workers: tuple[WorkerRow, ...]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for worker in workers:
        for name, value in worker.metrics:
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}
