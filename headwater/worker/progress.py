"""What a worker has done so far: counted here, shown by `Worker.statistics`, told to the coordinator."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from headwater import messages as m
from headwater.runtime.client import Client
from headwater.worker.batches import DataReader
from headwater.worker.logged import LoggedMetrics
from headwater.worker.registrations import Registrations

_PROGRESS_S = 0.25
"""Shortest interval between two reports to the coordinator, in seconds."""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What a worker counted since it joined.

    Attributes:
        rank: which worker it is.
        steps: how many it has finished.
        skipped: how many of them were empty turns because a gradient was not finite.
        version: that of the last answer, in commits.
        samples: how many its `batches` have handed out.
        waiting: seconds spent in exchanges with the servers.
        elapsed: seconds since it joined.
        sent, received: bytes over its connections to the servers; shared memory is not counted.
        gradient_bytes: bytes that the gradients of its steps take as they are represented, shared or sent.
        staleness: commits between the version that a gradient was computed on and its own → number of steps.
        metrics: what `log` was last told, by name.
        results: finished steps by what became of them: "applied", "late", "carried", "skipped".
        stages: seconds that a turn took, by stage: data, compute, push, wait, pull.
        norms: the last commit's gradient norm by model, where the servers measure it.
        dropped: how many names of metrics `log` was told that are not kept.
    """

    rank: int
    steps: int
    skipped: int
    version: int
    samples: int
    waiting: float
    elapsed: float
    sent: int
    received: int
    gradient_bytes: int
    staleness: dict[int, int]
    metrics: dict[str, float]
    results: dict[str, int]
    stages: dict[str, m.Histogram]
    norms: dict[str, float]
    dropped: int


class WorkerProgress:
    """Counts what one worker does, and tells the coordinator of it.

    Attributes:
        steps: how many it has finished.
        logged: what `Worker.log` was told.
        told: what the coordinator was told last; None before the first time. From any thread.
    """

    def __init__(self, client: Client, reader: DataReader, registered: Registrations) -> None:
        self.steps = 0
        self.logged = LoggedMetrics()
        self.told: m.Progress | None = None
        self._client = client
        self._reader = reader
        self._models, self._tables = registered.local_models, registered.local_tables
        self._member = client.welcome.member
        self._skipped = 0
        self._staleness: Counter[int] = Counter()
        self._results: Counter[str] = Counter()
        self._norms: dict[str, float] = {}
        self._began = time.monotonic()
        self._told_at = 0.0
        self._told_steps = 0

    def count(self, result: m.StepResult, *, skipped: bool, carried: bool) -> None:
        """Count a step that has this result.

        `skipped`: it was an empty turn because a gradient was not finite. `carried`: its gradients came too
        late, and go out with the next step.
        """
        self.steps += 1
        self._skipped += skipped
        late = "carried" if carried else "late"
        became = "skipped" if skipped else "applied" if result.applied else late  # one of STEP_RESULTS
        self._results[became] += 1
        if result.norms:
            self._norms = result.norms
        self._staleness[result.staleness] += 1

    def statistics(self) -> WorkerStatistics:
        """A snapshot of the counters."""
        sent, received = self._client.traffic()
        parts = [model.buffer.taken for model in self._models]
        parts += [table.gradient_bytes for table in self._tables]
        return WorkerStatistics(
            rank=self._member.index,
            steps=self.steps,
            skipped=self._skipped,
            version=self._client.version,
            samples=self._reader.samples,
            waiting=self._client.waiting,
            elapsed=time.monotonic() - self._began,
            sent=sent,
            received=received,
            gradient_bytes=sum(parts),
            staleness=dict(self._staleness),
            metrics=dict(self.logged.newest),
            results=dict(self._results),
            stages=self._client.stages.stages(),
            norms=dict(self._norms),
            dropped=self.logged.dropped,
        )

    def tell_before_wait(self) -> None:
        """Tell the coordinator of steps that it does not know: others see all of them while this waits."""
        if self._told_steps != self.steps and self._client.usable():
            self.tell(now=True)

    def tell(self, now: bool = False) -> None:
        """Tell the coordinator of progress, not more often than every `_PROGRESS_S`."""
        if not now and time.monotonic() - self._told_at < _PROGRESS_S:
            return
        self._told_at, self._told_steps = time.monotonic(), self.steps
        own, stages = self.statistics(), self._client.stages
        self.told = m.Progress(
            member=self._member.id,
            rank=own.rank,
            steps=own.steps,
            version=own.version,
            samples=own.samples,
            planned=self._reader.planned,
            waiting=own.waiting,
            elapsed=own.elapsed,
            staleness=own.staleness,
            metrics=own.metrics,
            results=own.results,
            stages=own.stages,
            norms=own.norms,
            dropped=own.dropped,
            turns=stages.news(),
            clock=stages.now(),
            points=self.logged.news(time.monotonic()),
        )
        self._client.tell(self.told)
