"""What has happened between two answers of a coordinator, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from headwater.messages import ClusterStatistics
from headwater.page.moment import Moment
from headwater.spec.words import numbered

_MANY = 8
"""Workers of which each gets a line of its own."""


def events_between(before: Moment, after: Moment) -> list[str]:
    """Each thing that happened, in about the order of causes."""
    old, new = before.statistics, after.statistics
    return [*_beginnings(old, new), *_members(old, new), *_checkpoints(old, new), *_ends(old, new)]


def _beginnings(old: ClusterStatistics, new: ClusterStatistics) -> Iterator[str]:
    if new.uptime < old.uptime:
        yield "another coordinator process answers"
    if new.generation > old.generation:
        yield f"training began anew from a checkpoint, as generation {new.generation}"


def _members(old: ClusterStatistics, new: ClusterStatistics) -> Iterator[str]:
    was, now = _by_place(old), _by_place(new)
    for place, pid in was.items():
        if place not in now and not _is_finished(place, new):
            yield f"{place} (pid {pid}) is gone"
    for place, pid in now.items():
        if was.get(place, pid) != pid:
            taken = place.startswith("server") and pid in old_pids(old, "standby")
            yield f"{place} is now pid {pid}{', its standby, which took over' if taken else ''}"
    yield from _joined({place: pid for place, pid in now.items() if place not in was})
    for index in sorted(set(new.unreplicated) - set(old.unreplicated)):
        yield f"server {index} has no caught-up standby"
    for index in sorted(set(old.unreplicated) - set(new.unreplicated)):
        if f"standby {index}" in now:
            yield f"standby {index} has caught up"


def _joined(places: dict[str, int]) -> Iterator[str]:
    """A line each, and one for all workers where there are many."""
    workers = [place for place in places if place.startswith("worker")]
    many = set(workers) if len(workers) > _MANY else set()
    for place, pid in places.items():
        if place not in many:
            yield f"{place} joined (pid {pid})"
    if many:
        yield f"{numbered('worker', [int(place.split()[1]) for place in workers])} joined"


def _checkpoints(old: ClusterStatistics, new: ClusterStatistics) -> Iterator[str]:
    if new.checkpoints.written > old.checkpoints.written:
        yield f"checkpoint of version {new.checkpoints.version} was written"
    if new.checkpoints.failed > old.checkpoints.failed:
        yield "a checkpoint could not be written"


def _ends(old: ClusterStatistics, new: ClusterStatistics) -> Iterator[str]:
    ended = sorted(set(new.finished) - set(old.finished))
    if len(ended) > _MANY:
        yield f"{numbered('worker', ended)} have finished"
    else:
        yield from (f"worker {rank} has finished" for rank in ended)


def _by_place(statistics: ClusterStatistics) -> dict[str, int]:
    """`server 0` → its pid."""
    return {
        f"{node.role} {node.rank if isinstance(node.rank, int) else node.index}": node.pid
        for node in statistics.nodes
        if node.role in ("worker", "server", "standby")
    }


def old_pids(statistics: ClusterStatistics, role: str) -> set[int]:
    """Of all members with this role."""
    return {node.pid for node in statistics.nodes if node.role == role}


def _is_finished(place: str, statistics: ClusterStatistics) -> bool:
    return any(place == f"worker {rank}" for rank in statistics.finished)
