"""What the ranks have done in all, over the incarnations of each, and who came and went.

Pure. A worker's report says what this incarnation has done so far; the former ones' last reports are added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from headwater import messages as m
from headwater.machines.frontier import ClockOffsets, Frontier
from headwater.spec.stages import COMMITS, STAGES, counted


class Tally:
    """Of one cluster, since its coordinator's process began.

    Attributes:
        last: the newest report of each rank, kept after it left.
        frontier: whom the others waited for.
        joined, lost: members that joined, and that were declared dead, by role.
        rewinds: how often training began anew.
        followers: what each follower told last, by member, and when.
    """

    def __init__(self) -> None:
        self.last: dict[int, m.Progress] = {}
        self.frontier = Frontier()
        self.joined: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.rewinds = 0
        self.followers: dict[int, tuple[m.FollowerProgress, float]] = {}
        self._clocks = ClockOffsets()
        self._former: dict[int, m.WorkerTotals] = {}
        self._failovers = 0
        self._failover_s = 0.0
        self._failing: dict[int, float] = {}  # term → when a server was declared dead

    # ── ranks ───────────────────────────────────────────────────────────────────────────────────

    def report(self, member: m.Member, progress: m.Progress, now: float) -> None:
        """A worker reports at `now`, in seconds."""
        before = self.last.get(member.index)
        if before is not None and before.member != progress.member:
            self._former[member.index] = self._of(before)
        # What is new in it is accounted for here, and nobody needs it again.
        self.last[member.index] = msgspec.structs.replace(progress, turns=(), points=())
        ahead = self._clocks.heard(member.machine, progress.clock, now) if progress.clock else 0
        self.frontier.take(member.index, progress.turns, ahead)

    def followers_now(self, now: float) -> tuple[m.FollowerProgress, ...]:
        """What followers show, and how old that is at `now`."""
        return tuple(
            msgspec.structs.replace(told, age=told.age + now - at)
            for _, (told, at) in sorted(self.followers.items())
        )

    def totals(self) -> tuple[m.WorkerTotals, ...]:
        """Of every rank that ever reported, in order."""
        return tuple(self._of(self.last[rank]) for rank in sorted(self.last))

    def _of(self, last: m.Progress) -> m.WorkerTotals:
        rank, exposed = last.rank, self.frontier.exposed
        waited_for = {stage: exposed.get((rank, i), 0) for i, stage in enumerate(STAGES)}
        own = msgspec.structs.replace(totals_of(last), exposed=waited_for)
        former = self._former.get(rank)
        return own if former is None else _added(former, own)

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def failing(self, term: int, now: float) -> None:
        """A server is dead, and its standby takes over in this term."""
        self._failing[term] = now

    def known(self, terms: Iterable[int], now: float) -> None:
        """All servers know these terms."""
        for term in terms:
            self._failovers += 1
            self._failover_s += now - self._failing.pop(term)

    @property
    def unknown(self) -> list[int]:
        """Terms in which a standby takes over, and that not all servers were seen to know."""
        return list(self._failing)

    def members(self) -> m.MemberCounts:
        """Who came and went."""
        return m.MemberCounts(
            dict(self.joined), dict(self.lost), self._failovers, self._failover_s, self.rewinds
        )


def totals_of(last: m.Progress) -> m.WorkerTotals:
    """Of one incarnation, by its last report."""
    staleness = m.Histogram(
        counted(last.staleness.items(), COMMITS),
        sum(value * times for value, times in last.staleness.items()),
    )
    return m.WorkerTotals(
        rank=last.rank,
        steps=last.results,
        samples=last.samples,
        waiting=last.waiting,
        elapsed=last.elapsed,
        staleness=staleness,
        stages=last.stages,
        norms=last.norms,
        dropped=last.dropped,
    )


def _added(former: m.WorkerTotals, own: m.WorkerTotals) -> m.WorkerTotals:
    """Both together, where `own` says what is so now."""
    return m.WorkerTotals(
        rank=own.rank,
        steps=_sums(former.steps, own.steps),
        samples=former.samples + own.samples,
        waiting=former.waiting + own.waiting,
        elapsed=former.elapsed + own.elapsed,
        staleness=_joined(former.staleness, own.staleness),
        stages={
            stage: _joined(former.stages.get(stage, m.Histogram()), own.stages.get(stage, m.Histogram()))
            for stage in {**former.stages, **own.stages}
        },
        exposed=own.exposed,
        norms=own.norms or former.norms,
        incarnations=former.incarnations + 1,
        dropped=max(former.dropped, own.dropped),
    )


def _sums(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _joined(one: m.Histogram, other: m.Histogram) -> m.Histogram:
    if not one.counts or not other.counts:
        return one if one.counts else other
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return m.Histogram(counts, one.sum + other.sum)
