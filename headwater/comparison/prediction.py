"""What a mode would do with any number of workers: the sequencer that clusters run, in virtual time.

Workers, network and servers are numbers here: how long a step computes, how long an exchange is under way,
how long the servers are busy with one update. Who is committed with whom, who is late and who waits is
decided by `headwater.log.sequencer`, as in a real cluster.

Invariants:
- A prediction is a function of its arguments.
- Servers work on one update after the other; an answer leaves once its commit is applied.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from headwater import messages as m
from headwater.log.sequencer import Sequencer
from headwater.machines.roster import RosterBook
from headwater.spec.stragglers import Straggler, Undisturbed
from headwater.spec.sync import Mode, parse_sync

Times: TypeAlias = Callable[[int, int], float]
"""(rank, number of its step from 0) → seconds that the step computes."""

_SETTLED = 1 / 3
"""Share of the time that passes before anything is counted: who leads whom has settled by then."""


@dataclass(frozen=True, slots=True)
class Costs:
    """How long things take, in seconds.

    Attributes:
        steps: what undisturbed steps took; a simulated step takes as long as one of them.
        exchange: from the end of a step's computing to its answer, without the servers' work.
        update: how long the servers are busy with one update.
    """

    steps: tuple[float, ...]
    exchange: float = 0.0
    update: float = 0.0

    @property
    def step(self) -> float:
        """The median of `steps`."""
        return float(np.median(self.steps))

    def times(self, straggler: Straggler, seed: int) -> Times:
        """Steps of this length, disturbed by `straggler`."""
        measured, step = np.array(self.steps), self.step
        blocks: dict[tuple[int, int], Any] = {}

        def seconds(rank: int, number: int) -> float:
            block, place = divmod(number, _DRAWN)
            if (rank, block) not in blocks:
                drawn = np.random.default_rng([seed, rank, block, 1]).choice(measured, _DRAWN)
                factors = straggler.factors(seed, rank, block * _DRAWN, _DRAWN)
                blocks[rank, block] = (drawn + (factors - 1) * step).tolist()
            return float(blocks[rank, block][place]) + straggler.pause(rank, number)

        return seconds


_DRAWN = 256


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a mode does with so many workers.

    Attributes:
        mode, straggler: as texts; workers: how many.
        steps_per_s: applied steps of all workers together, a second of virtual time.
        relative: `steps_per_s` over that of as many workers that never wait and are never disturbed.
        waiting: share of the workers' time between the end of computing and the answer.
        staleness: mean over the applied steps, in commits.
        late: share of all steps that were not applied.
        commits_per_s: versions a second.
    """

    mode: str
    straggler: str
    workers: int
    steps_per_s: float
    relative: float
    waiting: float
    staleness: float
    late: float
    commits_per_s: float


def predict(
    sync: str | Mode,
    *,
    workers: int,
    costs: Costs,
    straggler: Straggler | None = None,
    steps: int | None = None,
    seed: int = 0,
    times: Times | None = None,
) -> Prediction:
    """Run the mode in virtual time; blocks for computing alone, about 30 µs a step and worker.

    Args:
        costs: how long things take.
        straggler: who is how much slower; None: nobody is.
        steps: how long, in undisturbed steps; None: long enough, fewer for more workers.
        seed: of all that is drawn.
        times: how long each step computes, instead of what `costs` and `straggler` say.
    """
    mode = parse_sync(sync)
    slow = straggler or Undisturbed()
    until = (steps or max(100, min(1000, 40_000 // workers))) * (costs.step + costs.exchange + costs.update)
    world = _Cluster(mode, workers, costs, slow, times or costs.times(slow, seed))
    world.run(until)
    span = until * (1 - _SETTLED)
    counted = world.counted
    alone = workers / (costs.step + costs.exchange + costs.update)
    return Prediction(
        str(mode),
        str(slow),
        workers,
        counted.applied / span,
        counted.applied / span / alone,
        counted.waited / (workers * span),
        counted.staleness / max(1, counted.applied),
        counted.late / max(1, counted.late + counted.applied),
        counted.commits / span,
    )


@dataclass(slots=True)
class _Counted:
    """After things had settled."""

    applied: int = 0
    late: int = 0
    staleness: int = 0
    commits: int = 0
    waited: float = 0.0


@dataclass(slots=True)
class _Worker:
    """One rank: which member it is, how far it is, and since when it waits."""

    rank: int
    id: int
    steps: int = 0
    number: int = 0
    read: int = 0
    since: float = 0.0
    waits: bool = False
    died: bool = False


@dataclass
class _Cluster:
    """All workers, and a sequencer for one server."""

    mode: Mode
    workers: int
    costs: Costs
    straggler: Straggler
    times: Times
    counted: _Counted = field(default_factory=_Counted)

    def __post_init__(self) -> None:
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._now = self._busy = 0.0
        self._ticks: float | None = None
        self._book = RosterBook(self.workers, 1)
        self._sequencer = Sequencer(1, self.mode)
        self._of: dict[int, _Worker] = {}
        for rank in range(self.workers):
            self._join(rank)
        self._sequencer.roster(self._book.view(), 0.0)

    def run(self, until: float) -> None:
        """Let everything happen until then."""
        self._settled = until * _SETTLED
        for worker in list(self._of.values()):
            self._compute(worker, 0.0)
        while self._agenda and self._agenda[0][0] <= until:
            self._now, _, happens, arguments = heapq.heappop(self._agenda)
            happens(*arguments)
        for worker in self._of.values():
            if worker.waits:
                self._note_wait(worker, until)

    def _at(self, time: float, happens: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._agenda, (time, next(self._order), happens, arguments))

    # ── workers ─────────────────────────────────────────────────────────────────────────────────

    def _join(self, rank: int, steps: int = 0, died: bool = False) -> _Worker:
        member = self._book.join(m.Join("worker", rank, 0, "simulated"))
        worker = self._of[member.id] = _Worker(
            rank, member.id, steps, read=self._sequencer.version, died=died
        )
        return worker

    def _compute(self, worker: _Worker, now: float) -> None:
        outage = self.straggler.outage(worker.rank)
        took = self.times(worker.rank, worker.steps)
        if outage is not None and outage.step == worker.steps and not worker.died:
            self._at(now + took, self._die, worker, outage.after)
            return
        self._at(now + took, self._send, worker)

    def _send(self, worker: _Worker) -> None:
        worker.since, worker.waits = self._now, True
        self._at(self._now + self.costs.exchange / 2, self._arrive, worker)

    def _arrive(self, worker: _Worker) -> None:
        worker.number += 1
        held = m.Held(worker.id, worker.number, "step", str(worker.steps + 1))
        self._take(self._sequencer.report(0, (held,), self._now))

    def _die(self, worker: _Worker, after: float | None) -> None:
        self._book.remove(worker.id)
        del self._of[worker.id]
        self._take(self._sequencer.roster(self._book.view(), self._now))
        if after is not None:
            self._at(self._now + after, self._return, worker.rank, worker.steps)

    def _return(self, rank: int, steps: int) -> None:
        worker = self._join(rank, steps, died=True)
        self._take(self._sequencer.roster(self._book.view(), self._now))
        self._compute(worker, self._now)

    # ── what the sequencer says ─────────────────────────────────────────────────────────────────

    def _take(self, entries: Sequence[m.AnyEntry]) -> None:
        for entry in entries:
            if isinstance(entry, m.Committed):
                self._busy = max(self._busy, self._now) + self.costs.update * len(entry.updates)
                for update in entry.updates:
                    self._applied(self._of.get(update.member), entry.version)
                self.counted.commits += self._now >= self._settled
                self._answer(entry.answered, entry.version)
            elif isinstance(entry, m.Late):
                self.counted.late += self._now >= self._settled
                self._answer((entry.ticket,), self._sequencer.version)
            elif isinstance(entry, m.Served):
                self._answer((entry.ticket,), self._sequencer.version)
        due = self._sequencer.due
        if due is not None and due != self._ticks:
            self._ticks = due
            self._at(due, self._tick)

    def _tick(self) -> None:
        self._ticks = None
        self._take(self._sequencer.tick(self._now))

    def _applied(self, worker: _Worker | None, version: int) -> None:
        if self._now >= self._settled and worker is not None:
            self.counted.applied += 1
            self.counted.staleness += version - 1 - worker.read

    def _answer(self, answered: Sequence[m.ExchangeId], version: int) -> None:
        arrives = max(self._busy, self._now) + self.costs.exchange / 2
        for one in answered:
            if one.member in self._of:
                self._at(arrives, self._answered, self._of[one.member], version)

    def _answered(self, worker: _Worker, version: int) -> None:
        if worker.id not in self._of:
            return
        self._note_wait(worker, self._now)
        worker.waits, worker.read = False, version
        worker.steps += 1
        self._compute(worker, self._now)

    def _note_wait(self, worker: _Worker, now: float) -> None:
        self.counted.waited += max(0.0, now - max(worker.since, self._settled))
