"""Evaluations in portions, from both sides: whoever asks for them, and workers that compute.

Sandblaster's schedule (Dean et al. 2012): portions are much smaller than a worker's share, a worker that is
free gets the next one, and copies of what others have not finished once all are handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headwater import messages as m
from headwater.machines.lbfgs import LBFGS, Report, vectors
from headwater.worker.lbfgs_run import LBFGSRun, named
from headwater.worker.model import Model

PortionLoss = Callable[[int, int], float]
"""Given the number of a portion and how many there are: computes its loss at the model's parameters, and
leaves all gradients in its window."""


class PortionCarrier:
    """A `Carrier` for one worker alone, whose evaluations others compute in `count` portions."""

    def __init__(self, model: Model, count: int, backup: bool) -> None:
        self._model = model
        self._count = count
        self._backup = backup

    def begin(self) -> bytes:
        """Nothing is remembered of before."""
        return b""

    def evaluate(self, operations: Sequence[m.VectorOperation], moved: bool, out: str) -> float:
        """As `Carrier.evaluate`."""
        plan = m.PortionPlan(out, self._count, self._backup)
        sums = self._operate("evaluation", operations, plan=plan).sums
        assert sums is not None
        return sums["loss"]

    def reduce(
        self, operations: Sequence[m.VectorOperation], reductions: Sequence[m.Reduction]
    ) -> Sequence[float]:
        """As `Carrier.reduce`."""
        return self._operate("work", operations, reductions).totals

    def end(self, operations: Sequence[m.VectorOperation], moved: bool) -> None:
        """As `Carrier.end`."""
        self._operate("work", operations, read=True)

    def _operate(
        self,
        what: str,
        operations: Sequence[m.VectorOperation],
        reductions: Sequence[m.Reduction] = (),
        *,
        plan: m.PortionPlan | None = None,
        read: bool = False,
    ) -> m.Answer:
        work = m.VectorWork(self._model.local.id, tuple(operations), tuple(reductions), read)
        answer = self._model.local.exchange(lambda server, number: m.Operate(number, work, plan), what)
        if read:
            self._model.local.written()
        return answer

    def create(self, names: Sequence[str]) -> None:
        """Have vectors of these names."""
        self._operate("work", [m.CreateVector(name, True) for name in names])


def minimise(model: Model, method: LBFGS, count: int, backup: bool) -> Report:
    """Minimise from the present parameters, with evaluations in `count` portions; blocks until done."""
    carrier = PortionCarrier(model, count, backup)
    carrier.create([named(name) for name in vectors(method.history_size)])
    return LBFGSRun(carrier).step(method)


def compute(model: Model, loss: PortionLoss) -> int:
    """Compute portions as they are handed out, until there are none to come; how many it computed."""
    local = model.local
    done: m.PortionResult | None = None
    computed = 0
    while True:
        have = local.read_version
        answer = local.exchange(
            lambda server, number, done=done, have=have: m.NextPortion(number, local.id, have, done),  # type: ignore[misc]
            "portion",
        )
        if answer.portion is None:
            return computed
        if answer.values:
            local.written()
        portion = answer.portion
        done = m.PortionResult(portion, loss(portion.index, portion.count))
        computed += 1
