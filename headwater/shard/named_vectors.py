"""Named vectors beside a model's values, in the same layout, and what a piece of work does to them.

Invariants:
- A piece of work is checked before anything changes: all of it is done or nothing.
- What an element or a block's sum becomes does not depend on where a range is cut.
- All operations and reductions that read the same vectors pass over memory once, together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import UsageError
from headwater.kernels.combinations import DOT, LARGEST, TOTAL, BlockSum, Combination, combine
from headwater.log.norms import Node, subtrees
from headwater.spec.layout import PAGE

Array: TypeAlias = NDArray[np.float32]

PARAMETERS = "parameters"
"""Names the model's values among its vectors."""

_KINDS = {"dot": DOT, "total": TOTAL, "largest": LARGEST}


@dataclass(frozen=True, slots=True, eq=False)
class BroughtGradients:
    """The gradients of a meeting's members, and what each counts: float32[range] each, in rank order."""

    gradients: Sequence[Array] = ()
    coefficients: Sequence[float] = ()


class NamedVectors:
    """Of one model's range that begins at element `start`; its tensors' elements are at `runs` of it.

    Attributes:
        arrays: float32[range], by name, in the order of their creation.
        note: bytes that are kept with them.
        spare: memory that nobody reads any more, float32[range] each.
    """

    def __init__(self, start: int, runs: Sequence[tuple[int, int]], note: bytes = b"") -> None:
        self.arrays: dict[str, Array] = {}
        self.note = note
        self.spare: list[Array] = []
        self._start = start
        self._runs = runs

    def perform(self, work: m.VectorWork, values: Array, gathered: BroughtGradients) -> None:
        """Do all operations, which `check` has admitted; blocks for one pass over what they read and write.

        `values`: of the model, which `PARAMETERS` names.
        """
        waiting: list[Combination] = []
        freed: list[str] = []
        for one in work.operations:
            if isinstance(one, m.CreateVector):
                if one.name not in self.arrays:
                    self.arrays[one.name] = np.zeros_like(values)
            elif isinstance(one, m.FreeVector):
                freed.append(one.name)
            elif isinstance(one, m.KeepNote):
                self.note = one.note
            elif isinstance(one, m.FillVector):
                combine(len(values), waiting, ())
                waiting = []
                self._fill(values if one.name == PARAMETERS else self.arrays[one.name], one.value)
            else:
                named = {**self.arrays, PARAMETERS: values}
                waiting.append(_combination(one, named[one.out], named, gathered))
        combine(len(values), waiting, ())
        for name in freed:
            del self.arrays[name]

    def _fill(self, array: Array, value: float) -> Array:
        for low, high in self._runs:
            array[low:high] = value
        return array

    def reduce(self, work: m.VectorWork, values: Array, gathered: BroughtGradients) -> list[tuple[int, Node]]:
        """This range's part of all reductions, as if the operations were done already; changes nothing.

        Returns (number of the reduction, a node of its sum; of a largest magnitude, the one of the range).
        Blocks for one pass over what they read.
        """
        named: dict[str, Array | int] = {**self.arrays, PARAMETERS: values}
        combinations: list[Combination] = []
        for one in work.operations:
            if isinstance(one, m.CreateVector):
                if one.name not in named:
                    named[one.name] = np.zeros_like(values)
            elif isinstance(one, m.FillVector):
                named[one.name] = self._fill(np.zeros_like(values), one.value)
            elif isinstance(one, m.CombineVectors | m.GatherGradients):
                block = len(combinations)
                combinations.append(_combination(one, block, named, gathered))
                named[one.out] = block
        sums = [
            BlockSum(_KINDS[wanted.kind], named[wanted.one], named[wanted.other or wanted.one])
            for wanted in work.reductions
        ]
        blocks = combine(len(values), combinations, sums)
        parts: list[tuple[int, Node]] = []
        for number, (reduction, row) in enumerate(zip(work.reductions, blocks, strict=True)):
            if reduction.kind == "largest":
                parts.append((number, (0, 0, float(row.max(initial=0.0)))))
            else:
                parts += [(number, node) for node in subtrees(row, self._start // PAGE)]
        return parts


def check(
    model: str, known: Mapping[str, object], work: m.VectorWork, owners: Callable[[str], Sequence[str]]
) -> None:
    """Refuse work that cannot be done with the vectors `known` of a model; `owners`: models with a vector.

    Raises:
        UsageError: a vector that is unknown, or one that exists is created; says what there is.
    """
    names = {*known, PARAMETERS}
    freed: set[str] = set()

    def expect(name: str) -> None:
        if name in names:
            return
        others = [other for other in owners(name) if other != model]
        where = f"a vector of model {others[0]!r}" if others else "unknown"
        there = ", ".join(sorted(names))
        raise UsageError(f"model {model!r}: vector {name!r} is {where}; the vectors here are {there}")

    for one in work.operations:
        if isinstance(one, m.CreateVector):
            if one.name in freed or (one.name in names and not one.keep):
                raise UsageError(f"model {model!r}: vector {one.name!r} exists: free it, or fill it")
            names.add(one.name)
        elif isinstance(one, m.FreeVector):
            if one.name == PARAMETERS:
                raise UsageError(f"model {model!r}: {PARAMETERS!r} are the model's values and stay")
            expect(one.name)
            names.discard(one.name)
            freed.add(one.name)
        elif isinstance(one, m.FillVector):
            expect(one.name)
        elif isinstance(one, m.GatherGradients):
            expect(one.out)
        elif isinstance(one, m.CombineVectors):
            for name in (one.out, *(name for name, _ in one.terms)):
                expect(name)
    for reduction in work.reductions:
        for name in (reduction.one, reduction.other or reduction.one):
            expect(name)


def coefficients(weights: Sequence[float], mean: bool) -> list[float]:
    """What gradients with these weights count in their sum, or in their mean."""
    return [weight / math.fsum(weights) for weight in weights] if mean else [1.0] * len(weights)


def _combination(
    one: m.CombineVectors | m.GatherGradients,
    out: Array | int,
    named: Mapping[str, Array | int],
    gathered: BroughtGradients,
) -> Combination:
    """What the kernel does for an operation."""
    if isinstance(one, m.GatherGradients):
        return Combination(out, gathered.gradients, gathered.coefficients)
    return Combination(out, [named[name] for name, _ in one.terms], [value for _, value in one.terms])
