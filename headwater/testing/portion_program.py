"""Programs for simulated workers that compute evaluations in portions, and for the one who asks for them.

Gradients and losses are small whole numbers, so the sum of all portions is exact: each counts once, or the
numbers are others.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.spec.layout import PAGE
from headwater.spec.rules import Accumulate
from headwater.testing.processes.client import Call, Client, Question

MODEL = 0
Steps = Generator[Call | Question, Any, Any]


@dataclass(frozen=True)
class PortionProgram:
    """Of `ranks` workers, the last of which asks for `rounds` evaluations in `portions` portions each."""

    ranks: int
    servers: int
    rounds: int
    portions: int
    seed: int = 0
    backup: bool = True

    def spec(self) -> m.ModelSpec:
        """One tensor that every server has a part of."""
        tensor = m.TensorSpec("x", (self.servers * PAGE - 100,), "float32")
        return m.ModelSpec("evaluated", (tensor,), (Accumulate().to_spec(),))

    def gradient(self, round: int, index: int, value: float) -> NDArray[np.float64]:
        """Of a portion, where all parameters are `value`: float64[elements], whole numbers."""
        size = self.servers * PAGE - 100
        random = np.random.default_rng([self.seed, round, index])
        return random.integers(-3, 4, size).astype(np.float64) + value

    def program(self, me: Client) -> Steps:
        """What each rank does."""
        yield me.register(self.spec(), value=1.0)
        yield from self._ask(me) if me.rank == self.ranks - 1 else self._compute(me)
        yield me.leave()

    def _ask(self, me: Client) -> Steps:
        """Evaluate at 1, 2, 4, …, and compare each sum with what it must be."""
        created = yield self._work(me, [m.CreateVector("sum")])
        assert created.failure is None
        value = 1.0
        for round in range(1, self.rounds + 1):
            doubled = (m.CombineVectors("parameters", (("parameters", 2.0),)),)
            plan = m.PortionPlan("sum", self.portions, self.backup)
            answer = yield self._work(me, doubled if round > 1 else (), plan=plan)
            value *= 2 if round > 1 else 1
            assert answer.failure is None, answer.failure
            assert answer.sums == {"loss": float(sum(range(self.portions)) + self.portions * round)}
            expected = sum(self.gradient(round, index, value) for index in range(self.portions))
            dots = yield self._work(me, (), [m.Reduction("dot", "sum", "sum")])
            assert dots.totals == (float(np.dot(expected, expected)),), f"round {round}"
        return value

    def _work(self, me: Client, operations: Any, reductions: Any = (), plan: Any = None) -> Call:
        me.number += 1
        work = m.VectorWork(MODEL, tuple(operations), tuple(reductions))
        return Call(m.Operate(me.number, work, plan))

    def _compute(self, me: Client) -> Steps:
        window, done = me.windows[MODEL], None
        while True:
            me.number += 1
            request = m.NextPortion(me.number, MODEL, me.version, done)
            answer = yield Call(request, self._frame(me, request))
            if answer.portion is None:
                return
            portion = answer.portion
            gradient = self.gradient(portion.round, portion.index, float(window.values["x"][0]))
            window.grads["x"][...] = gradient
            done = m.PortionResult(portion, float(portion.index + portion.round))

    def _frame(self, me: Client, request: m.NextPortion) -> Any:
        buffer = me.windows[MODEL].buffer
        return lambda server, number: buffer.portion(request, server)
