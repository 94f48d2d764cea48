"""How the updates of one commit become one gradient of a model.

Pure arithmetic on what the entry, the requests and the model's spec say, so primary and standby decide the
same.

Invariants:
- A contributor is an update that carries a gradient, on any server. Others count for nothing.
- Contributors that all weigh the same are averaged exactly as if nobody had given a weight.
- A rule that always adds up takes what was pushed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.messages import ModelSpec, Scales, Step
from headwater.spec.merges import MergeKind, parse_merge
from headwater.spec.sync import Reduce


@dataclass(frozen=True, slots=True)
class Merge:
    """What becomes of the updates that carry a tensor: Σ weight · update / divisor, or their middle values.

    Attributes:
        weights: of each update of the commit, by its place in it; None where each counts 1.
        scales: the same for each tensor by itself, where weights differ with the tensor.
        middle: (contributors, how many of the smallest, and of the largest, of their values are left out).
    """

    divisor: float = 1.0
    weights: tuple[float, ...] | None = None
    scales: Mapping[int, tuple[float, ...]] | None = None
    middle: tuple[int, int] | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain sum over the divisor, which needs no memory between."""
        return self.weights is None and self.scales is None and self.middle is None

    def summed(self) -> Merge:
        """What is left to do with gradients that were merged but for the divisor."""
        return Merge(self.divisor)

    def weights_of(self, places: Sequence[int], tensor: int = -1) -> NDArray[np.float32] | None:
        """float32[updates]: of the updates at these places; None where each counts 1."""
        weights = self.weights if self.scales is None else self.scales[tensor]
        if weights is None:
            return None
        return np.array([weights[place] for place in places], dtype=np.float32)


PLAIN = Merge()
"""The sum as it is."""


class CommitMerges:
    """How the gradients of one commit are merged, by model, and for tables.

    Args:
        steps: the updates; weights: of each, as in the entry, empty where all are 1.
        reduce: what holds where a model says nothing.
        scales: as in the entry, of models that are merged by lengths.

    Attributes:
        contributors: places of the updates that carry a gradient.

    Of a model with `outer` in its spec only those contribute that carry it: who made local steps for others
    has not said that this one should stay as it is.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        weights: Sequence[float],
        reduce: Reduce,
        scales: Sequence[Scales] = (),
    ) -> None:
        self._steps = steps
        self.contributors = tuple([place for place, step in enumerate(steps) if contributing(step)])
        self._even = not weights
        self._weights = tuple(weights) or (1.0,) * len(steps)
        self._scales = scales
        self._reduce = MergeKind(reduce)

    @property
    def rows(self) -> Merge:
        """Of tables."""
        return self._merge(self._reduce, self.contributors)

    def of(self, model: int, spec: ModelSpec) -> Merge:
        """Of a model."""
        kind = self._reduce if spec.merge is None else parse_merge(spec.merge)
        if kind.kind == "rda":
            return Merge(scales={one.tensor: one.values for one in self._scales if one.model == model})
        return self._merge(kind, self.contributors_of(model, spec))

    def contributors_of(self, model: int, spec: ModelSpec) -> tuple[int, ...]:
        """Places of the updates that contribute to a model's gradient."""
        if not spec.outer:
            return self.contributors
        carrying = (
            place
            for place, step in enumerate(self._steps)
            if any(one.model == model and any(one.tensors) for one in step.carried)
        )
        return tuple(carrying)

    def _merge(self, kind: MergeKind, contributors: Sequence[int]) -> Merge:
        if self._even and kind.kind == "mean":
            return Merge(float(len(contributors)))
        counted = [self._weights[place] for place in contributors]
        if kind.kind == "sum":
            return PLAIN if all(weight == 1.0 for weight in counted) else Merge(1.0, self._weights)
        if kind.kind != "mean":
            return Merge(middle=(len(counted), kind.left_out(len(counted))))
        if len(set(counted)) <= 1:
            return Merge(float(len(counted)))
        # Scaled by a power of two: exact, and no weight takes a gradient out of float32's range.
        _, exponent = math.frexp(max(counted))
        weights = tuple(math.ldexp(weight, -exponent) for weight in self._weights)
        return Merge(math.fsum(weights[place] for place in contributors), weights)


def contributing(step: Step) -> bool:
    """Whether a step carries a gradient, on any server."""
    return bool(step.pushed) or any(any(one.tensors) for one in step.carried)
