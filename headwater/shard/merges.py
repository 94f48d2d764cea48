"""How the updates of one commit become one gradient of a model: what each counts, what their sum is over.

Pure arithmetic on what the entry and the requests say, so primary and standby decide the same.

Invariants:
- A contributor is an update that carries a gradient, on any server. Others count for nothing.
- Contributors that all weigh the same are merged exactly as if nobody had given a weight.
- Only a mean and a sum are weighted; a rule that always adds up takes what was pushed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.messages import Step
from headwater.spec.sync import Reduce


@dataclass(frozen=True, slots=True)
class Merge:
    """What becomes of updates: Σ weight · update / divisor.

    Attributes:
        weights: of each update of the commit, by its place in it; None where each counts 1.
    """

    divisor: float = 1.0
    weights: tuple[float, ...] | None = None

    def summed(self) -> Merge:
        """What is left to do with a weighted sum."""
        return Merge(self.divisor)

    def weights_of(self, places: Sequence[int]) -> NDArray[np.float32] | None:
        """float32[updates]: of the updates at these places; None where each counts 1."""
        if self.weights is None:
            return None
        return np.array([self.weights[place] for place in places], dtype=np.float32)


PLAIN = Merge()
"""The sum as it is."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What each update of a commit counts.

    Attributes:
        contributors: how many carry a gradient.
        weights: of each update, 1 where none was given.
    """

    contributors: int
    weights: tuple[float, ...]
    _contributes: tuple[bool, ...]

    @classmethod
    def of(cls, steps: Sequence[Step], weights: Sequence[float]) -> Shares:
        """Of the updates `steps`; `weights` as in the entry, empty where nobody gave one."""
        contributes = tuple(contributing(step) for step in steps)
        return cls(sum(contributes), tuple(weights) or (1.0,) * len(steps), contributes)

    def merge(self, reduce: Reduce) -> Merge:
        """How their gradients are combined."""
        counted = [weight for weight, counts in zip(self.weights, self._contributes, strict=True) if counts]
        if reduce == "sum":
            return PLAIN if all(weight == 1.0 for weight in counted) else Merge(1.0, self.weights)
        if len(set(counted)) <= 1:
            return Merge(float(self.contributors))
        # Scaled by a power of two: exact, and no weight takes a gradient out of float32's range.
        _, exponent = math.frexp(max(counted))
        weights = tuple(math.ldexp(weight, -exponent) for weight in self.weights)
        total = math.fsum(math.ldexp(weight, -exponent) for weight in counted)
        return Merge(total, weights)


def contributing(step: Step) -> bool:
    """Whether a step carries a gradient, on any server."""
    return bool(step.pushed) or any(any(one.tensors) for one in step.carried)
