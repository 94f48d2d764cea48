"""Whom the cluster waits for, in words: the largest part of the exposed time, of all of a run or of late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headwater.messages import WorkerTotals
from headwater.spec.stages import STAGES


@dataclass(frozen=True, slots=True)
class Exposure:
    """One rank's stage, and its part of the exposed time.

    Attributes:
        rank, stage: whose.
        seconds: for which the cluster waited for it.
        share: of the exposed time of all, from 0 to 1.
    """

    rank: int
    stage: str
    seconds: float
    share: float

    def __str__(self) -> str:
        return f"worker {self.rank} · {self.stage} · {self.share:.0%} of exposed time"


def exposures(
    totals: Iterable[WorkerTotals], before: Mapping[tuple[int, str], int] | None = None
) -> list[Exposure]:
    """All parts that are not 0, the largest first; since `before`, which `exposed_times` gave, if any."""
    former = before or {}
    times = {key: spent - former.get(key, 0) for key, spent in exposed_times(totals).items()}
    whole = sum(times.values())
    order = sorted((key for key in times if times[key] > 0), key=lambda key: (-times[key], key))
    return [
        Exposure(rank, stage, times[rank, stage] / 1e9, times[rank, stage] / whole) for rank, stage in order
    ]


def exposed_times(totals: Iterable[WorkerTotals]) -> dict[tuple[int, str], int]:
    """Nanoseconds by rank and stage."""
    return {(one.rank, stage): one.exposed.get(stage, 0) for one in totals for stage in STAGES}


class RecentExposure:
    """The exposed time of the last seconds. For a display that is shown again and again.

    Args:
        seconds: how far back at least.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._seen: deque[tuple[float, dict[tuple[int, str], int]]] = deque()

    def look(self, totals: Iterable[WorkerTotals], now: float) -> Exposure | None:
        """The largest part; None before anybody was waited for."""
        known = list(totals)
        self._seen.append((now, exposed_times(known)))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._seconds:
            self._seen.popleft()
        first, before = self._seen[0]
        found = exposures(known, before if first < now else None) or exposures(known)
        return found[0] if found else None
