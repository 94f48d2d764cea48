"""A worker's part in a comparison of modes: it is delayed as planned, and notes where its time went.

The worker's runtime does both, so a training function needs no change. What was noted goes to a file when
training ends or is about to be ended, so that a death which was planned loses nothing.

Invariants:
- A step is delayed after its gradients were computed and before anything of it is sent.
- Every worker reads a static part of its own, whatever the mode, unless the plan says otherwise: the data
  come in the same order in all.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from headwater.messages import StepResult
from headwater.spec.stragglers import Straggler
from headwater.worker.plan import SplitKind

if TYPE_CHECKING:
    from headwater.worker.worker import Worker


class StepNote(msgspec.Struct, frozen=True, array_like=True):
    """One step: when its answer came, and the seconds before it.

    `ended`: of this machine's monotonic clock. `computing`: between two exchanges. `planted`: the delay.
    `waiting`: in exchanges with the servers. `samples`: that this rank had read.
    """

    ended: float
    computing: float
    planted: float
    waiting: float
    version: int
    staleness: int
    applied: bool
    samples: int


class LoggedNote(msgspec.Struct, frozen=True, array_like=True):
    """A value of the metric that is compared, as `Worker.log` got it."""

    time: float
    version: int
    samples: int
    steps: int
    value: float | None  # None: not finite, which JSON cannot say


class IncarnationNotes(msgspec.Struct, frozen=True):
    """What one incarnation of a rank noted. `metrics`: all names that were logged."""

    rank: int
    began: float
    steps: tuple[StepNote, ...]
    logged: tuple[LoggedNote, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """What is planted and what is noted in one run.

    Attributes:
        straggler, seed: who is slow, and which delays are drawn.
        step_s: how long an undisturbed step takes, in seconds: a delay of one step.
        metric: whose values are noted.
        folder: where notes go.
        limit: steps after which a worker's training ends; None: where its function does.
        splits: "static": a part of its own for each worker in every mode; "dynamic": what the training
            function asks for, or its mode does by default.
    """

    straggler: Straggler
    seed: int
    step_s: float
    metric: str
    folder: str
    limit: int | None = None
    splits: SplitKind = "static"


class TrialOver(BaseException):
    """Ends a training function whose worker has taken as many steps as its trial has."""


class Trial:
    """Delays one worker as planned, and notes its steps, from before its training function is called."""

    def __init__(self, worker: Worker, plan: TrialPlan) -> None:
        self._worker, self._plan = worker, plan
        self._before = len(list(Path(plan.folder).glob(f"rank-{worker.rank}-*.json")))
        self._steps: list[StepNote] = []
        self._logged: list[LoggedNote] = []
        self._metrics: set[str] = set()
        self._began = self._last = time.monotonic()
        self._waited = self._worker.statistics().waiting
        self._computing = self._planted = 0.0

    def splits(self, asked: SplitKind | None) -> SplitKind | None:
        """How data are cut where the training function asks for `asked`."""
        return "static" if self._plan.splits == "static" else asked

    def before_step(self) -> None:
        """Gradients are computed: delay the step, or end the process, as planned."""
        now, step = time.monotonic(), len(self._steps)
        plan, rank = self._plan, self._worker.rank
        if plan.limit is not None and step >= plan.limit:
            raise TrialOver
        outage = plan.straggler.outage(rank)
        if outage is not None and outage.step == step and not self._before:
            self.save()
            os.kill(os.getpid(), signal.SIGKILL)
        waiting = self._worker.statistics().waiting
        self._computing = max(0.0, now - self._last - (waiting - self._waited))
        factor = float(plan.straggler.factors(plan.seed, rank, step, 1)[0])
        self._planted = (factor - 1) * plan.step_s + plan.straggler.pause(rank, step)
        if self._planted > 0:
            time.sleep(self._planted)
        self._planted = time.monotonic() - now

    def after_step(self, result: StepResult, samples: int) -> None:
        """The answer is there."""
        now, waiting = time.monotonic(), self._worker.statistics().waiting
        self._steps.append(
            StepNote(
                now,
                self._computing,
                self._planted,
                waiting - self._waited,
                result.version,
                result.staleness,
                result.applied,
                samples,
            )
        )
        self._last, self._waited = now, waiting

    def logged(self, metrics: dict[str, float], samples: int) -> None:
        """`Worker.log` was called."""
        self._metrics.update(metrics)
        if self._plan.metric in metrics:
            value = metrics[self._plan.metric]
            self._logged.append(
                LoggedNote(
                    time.monotonic(),
                    self._worker.version,
                    samples,
                    len(self._steps),
                    value if np.isfinite(value) else None,
                )
            )

    def save(self) -> None:
        """Write what was noted so far into a file of this incarnation's own."""
        notes = IncarnationNotes(
            self._worker.rank,
            self._began,
            tuple(self._steps),
            tuple(self._logged),
            tuple(sorted(self._metrics)),
        )
        path = Path(self._plan.folder) / f"rank-{self._worker.rank}-{self._before}.json"
        path.write_bytes(msgspec.json.encode(notes))


@contextmanager
def in_trial(worker: Worker, plan: TrialPlan) -> Iterator[None]:
    """The block is the worker's training: it is delayed and noted; at most `plan.limit` steps long."""
    _seed(plan.seed, worker.rank)
    trial = Trial(worker, plan)
    worker.trial = trial
    try:
        yield
    except TrialOver:
        pass
    finally:
        worker.trial = None
        trial.save()


def notes_in(folder: Path) -> list[IncarnationNotes]:
    """What all incarnations noted, by rank and then in their order."""
    found = [
        msgspec.json.decode(path.read_bytes(), type=IncarnationNotes) for path in folder.glob("rank-*.json")
    ]
    return sorted(found, key=lambda one: (one.rank, one.began))


def _seed(seed: int, rank: int) -> None:
    """The generators that are global to this process; torch's only where it is loaded."""
    own = 1_000_003 * seed + rank
    random.seed(own)
    np.random.seed(own % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(own)
