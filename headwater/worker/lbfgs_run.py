"""L-BFGS of all workers together: the commands of `headwater.machines.lbfgs`, carried out by the servers.

Every worker runs the same steps on the same numbers, which the log gave to all of them. Vectors stay on the
servers; between workers and servers go, for each evaluation, the parameters down, one gradient of each worker
up, and numbers.

Invariants:
- What outlives a call is a note that the servers keep with the vectors. A step begins with the note as the
  log had it then, so a worker that is started again takes the same steps as before.
- Commands that give nothing back wait for the next one that does: they go as one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from headwater import messages as m
from headwater.machines.lbfgs import (
    DIRECTION,
    LBFGS,
    PARAMETERS,
    START,
    Combine,
    Command,
    Dots,
    Evaluate,
    LBFGSState,
    Report,
    Sizes,
    steps,
    vectors,
)
from headwater.worker.model import Model

Evaluation: TypeAlias = Callable[[], float]
"""Computes this worker's loss at the model's parameters, and leaves all gradients in its window."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, LBFGSState]).decode


class Carrier(Protocol):
    """Who does what commands say: the servers, and whoever computes losses and gradients."""

    def begin(self) -> bytes:
        """The parameters are to be read; returns the note that is kept with the vectors."""

    def evaluate(self, operations: Sequence[m.VectorOperation], moved: bool, out: str) -> float:
        """Do the operations, and have loss and gradient computed; the gradient goes to `out`."""

    def reduce(
        self, operations: Sequence[m.VectorOperation], reductions: Sequence[m.Reduction]
    ) -> Sequence[float]:
        """Do the operations, and then the reductions."""

    def end(self, operations: Sequence[m.VectorOperation], moved: bool) -> None:
        """Do the operations; read the parameters where they `moved`."""


class LBFGSRun:
    """One optimization, of `carrier`'s parameters, over any number of calls."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._waiting: list[m.VectorOperation] = []
        self._moved = False
        self._at: dict[str, float] = {}

    def step(self, settings: LBFGS) -> Report:
        """At most `max_iter` iterations from the present parameters; blocks."""
        state = state_of(self._carrier.begin(), settings.history_size)
        self._waiting, self._moved, self._at = [], False, {}
        running = steps(settings, state)
        result: float | Sequence[float] | None = None
        while True:
            try:
                command = running.send(result)
            except StopIteration as end:
                report: Report = end.value
                break
            result = self._do(command)
        self._waiting.append(m.KeepNote(_encode((settings.history_size, state))))
        self._carrier.end(self._waiting, self._moved)
        return report

    def _do(self, command: Command) -> float | Sequence[float] | None:
        if isinstance(command, Combine):
            self._combine(command)
            return None
        waiting, self._waiting = self._waiting, []
        if isinstance(command, Evaluate):
            moved, self._moved = self._moved, False
            return self._carrier.evaluate(waiting, moved, named(command.out))
        if isinstance(command, Dots):
            pairs = [m.Reduction("dot", named(a), named(b)) for a, b in command.pairs]
            return self._carrier.reduce(waiting, pairs)
        assert isinstance(command, Sizes)
        name = named(command.name)
        return self._carrier.reduce(waiting, [m.Reduction("largest", name), m.Reduction("total", name)])

    def _combine(self, command: Combine) -> None:
        """A move to where the parameters are already is none."""
        if command.out == PARAMETERS:
            if command.terms == self._at:
                return
            self._at, self._moved = dict(command.terms), True
        elif command.out in (START, DIRECTION):
            self._at = {}
        terms = tuple((named(name), float(value)) for name, value in command.terms.items())
        self._waiting.append(m.CombineVectors(named(command.out), terms))


class ModelCarrier:
    """All workers of a cluster, each with its part of the loss; `evaluation`: computes this worker's.

    `weight`: what this worker counts in the weighted mean of the losses; None: their sum is minimised.
    """

    def __init__(self, model: Model, evaluation: Evaluation, weight: float | None) -> None:
        self._model = model
        self._evaluation = evaluation
        self._weight = weight

    def begin(self) -> bytes:
        """As `Carrier.begin`; what a program wrote to the parameters counts."""
        self._model.local.before_read()
        return self._model.vectors.run((), read=True, recall=True, of="all").data[0]

    def evaluate(self, operations: Sequence[m.VectorOperation], moved: bool, out: str) -> float:
        """As `Carrier.evaluate`."""
        run = self._model.vectors.run
        if operations:
            run(operations, read=moved, of="all")
        loss = self._evaluation()
        weight = 1.0 if self._weight is None else self._weight
        gather = m.GatherGradients(out, mean=self._weight is not None)
        values = {"loss": loss * weight, "weight": weight}
        sums = run([gather], values=values, weight=weight, of="all").sums
        assert sums is not None
        return sums["loss"] if self._weight is None else sums["loss"] / sums["weight"]

    def reduce(
        self, operations: Sequence[m.VectorOperation], reductions: Sequence[m.Reduction]
    ) -> Sequence[float]:
        """As `Carrier.reduce`."""
        return self._model.vectors.run(operations, reductions, of="all").totals

    def end(self, operations: Sequence[m.VectorOperation], moved: bool) -> None:
        """As `Carrier.end`."""
        self._model.vectors.run(operations, read=moved, of="all")


def prepare(model: Model, settings: LBFGS) -> None:
    """Have all vectors, and no memory of an earlier optimization; a meeting of all workers."""
    created = [m.CreateVector(named(name), True) for name in vectors(settings.history_size)]
    model.vectors.run([*created, m.KeepNote(b"")])


def state_of(note: bytes, history_size: int) -> LBFGSState:
    """What the last call left; nothing where it had another history."""
    if note:
        size, state = _decode(note)
        if size == history_size:
            return state
    return LBFGSState()


def named(vector: str) -> str:
    """The name that a vector of the algorithm has among the model's."""
    return vector if vector == PARAMETERS else f"lbfgs/{vector}"


def finite_loss(loss: Any, finite: bool) -> float:
    """A loss as a number; NaN where a gradient is not finite, for then no step may go there."""
    return float(loss.detach() if hasattr(loss, "detach") else loss) if finite else math.nan
