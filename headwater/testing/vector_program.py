"""A program for simulated workers that has the servers work on vectors, and knows what must come of it.

Its numbers are small multiples of 1/4, so sums are exact in whatever order: every worker, also one that is
started again, compares every answer and every value that it reads with what NumPy makes of the same program.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.spec.layout import PAGE
from headwater.spec.rules import Accumulate
from headwater.testing.processes.client import Call, Client, Question

MODEL = 0
Floats = NDArray[np.float64]
Steps = Generator[Call | Question, Any, Any]


def working(client: Client, work: m.VectorWork, values: dict[str, float], name: str) -> Call:
    """A meeting in which the servers work on vectors; gradients lie in the window of the model."""
    client.meetings += 1
    kind: m.MeetingKind = "operate" if work.operations else "measure"
    client.number += 1
    meeting = m.Meeting(client.meetings, kind, (name,), "all")
    request = m.Meet(client.number, meeting, values, work=work)
    buffer = client.windows[work.model].buffer
    return Call(request, lambda server, number: buffer.meet(request, server))


@dataclass(frozen=True)
class VectorProgram:
    """Of `ranks` workers over `servers` servers: `turns` pieces of work, which follow from `seed`."""

    ranks: int
    servers: int
    turns: int
    seed: int = 0

    def spec(self) -> m.ModelSpec:
        """Two tensors, of which the second begins within a server's range."""
        shapes = {"a": (70,), "b": (self.servers * PAGE - 100,)}
        tensors = tuple(m.TensorSpec(name, shape, "float32") for name, shape in shapes.items())
        return m.ModelSpec("worked", tensors, (Accumulate().to_spec(),))

    def gradient(self, rank: int, turn: int, size: int) -> Floats:
        """Of a tensor: float64[size], whole numbers."""
        return np.random.default_rng([self.seed, rank, turn, size]).integers(-3, 4, size).astype(np.float64)

    def program(self, me: Client) -> Steps:
        """Declare the model, do all work, leave; what the vectors are at the end."""
        yield me.register(self.spec(), value=1.0)
        window = me.windows[MODEL]
        sizes = {name: view.size for name, view in window.values.items()}
        mirror = {"parameters": {name: np.ones(size) for name, size in sizes.items()}}
        version = 0
        for turn in range(self.turns):
            for name, view in window.grads.items():
                view[...] = self.gradient(me.rank, turn, sizes[name])
            work = self.work(turn, mirror)
            answer = yield working(me, work, {"x": 1.0 + me.rank}, f"turn {turn}")
            self._check(answer, turn, work, mirror, sizes)
            version += bool(work.operations)
            assert answer.version >= version
            if work.read and answer.version == version:  # it is not a repeated turn, which reads what is now
                for name, view in window.values.items():
                    assert np.array_equal(view, mirror["parameters"][name]), f"turn {turn}: other values"
        yield me.leave()
        return mirror

    def work(self, turn: int, mirror: dict[str, Any]) -> m.VectorWork:
        """Of a turn, with vectors that are there then."""
        chance = np.random.default_rng([self.seed, turn])
        there = sorted(mirror)  # "parameters" first
        operations: list[m.VectorOperation] = []
        if turn % 4 == 0:
            operations += [m.CreateVector(f"v{turn}"), m.FillVector(f"v{turn}", 0.25 * (turn % 7))]
            there.append(f"v{turn}")
        if turn % 5 == 4:
            gone = there.pop()
            operations.append(m.FreeVector(gone))
        if turn % 3 == 1:
            operations.append(m.GatherGradients(str(chance.choice(there))))
        if turn % 2:
            out, one, other = (str(name) for name in chance.choice(there, 3))
            terms = ((one, 1.0), (other, -1.0)) if one != other else ((one, 1.0),)
            operations.append(m.CombineVectors(out, terms))
        if turn % 6 == 5:
            operations.append(m.KeepNote(f"turn {turn}".encode()))
        pairs = [tuple(str(name) for name in chance.choice(there, 2)) for _ in range(turn % 3)]
        reductions = [m.Reduction("dot", *pair) for pair in pairs]
        if turn % 4 == 2:
            reductions += [m.Reduction("largest", there[0]), m.Reduction("total", there[-1])]
        return m.VectorWork(MODEL, tuple(operations), tuple(reductions), turn % 3 != 0, turn % 6 == 0)

    def _check(
        self, answer: m.Answer, turn: int, work: m.VectorWork, mirror: dict[str, Any], sizes: dict[str, int]
    ) -> None:
        assert answer.failure is None, answer.failure
        assert answer.sums == {"x": sum(1.0 + rank for rank in range(self.ranks))}
        for one in work.operations:
            self._mirror(one, turn, mirror, sizes)
        expected = tuple(_reduced(one, mirror) for one in work.reductions)
        assert answer.totals == expected, f"turn {turn}: {answer.totals}, expected {expected}"
        if work.recall:
            last = (turn // 6) * 6 - 1
            assert answer.data == ((f"turn {last}".encode() if last > 0 else b""),), answer.data

    def _mirror(
        self, one: m.VectorOperation, turn: int, mirror: dict[str, Any], sizes: dict[str, int]
    ) -> None:
        if isinstance(one, m.CreateVector):
            mirror[one.name] = {name: np.zeros(size) for name, size in sizes.items()}
        elif isinstance(one, m.FreeVector):
            del mirror[one.name]
        elif isinstance(one, m.FillVector):
            mirror[one.name] = {name: np.full(size, one.value) for name, size in sizes.items()}
        elif isinstance(one, m.GatherGradients):
            mirror[one.out] = {
                name: sum(self.gradient(rank, turn, size) for rank in range(self.ranks))
                for name, size in sizes.items()
            }
        elif isinstance(one, m.CombineVectors):
            mirror[one.out] = {
                name: sum(c * mirror[vector][name] for vector, c in one.terms) for name in sizes
            }


def _reduced(one: m.Reduction, mirror: dict[str, Any]) -> float:
    parts: Sequence[tuple[Floats, Floats]] = [
        (mirror[one.one][name], mirror[one.other or one.one][name]) for name in mirror[one.one]
    ]
    if one.kind == "dot":
        return float(sum(a @ b for a, b in parts))
    if one.kind == "total":
        return float(sum(np.abs(a).sum() for a, _ in parts))
    return float(max(np.abs(a).max() for a, _ in parts))
