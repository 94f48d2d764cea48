"""Which tensors the updates of a commit carry, and what follows from that for the passes over a range.

Steps of a training program carry the same tensors again and again. What depends on that alone is found once:
where the range is cut, who carries which piece, and the arrays that a pass is given.

Invariants:
- A pattern holds for as long as every update of the model has it: each adds one to the same tensors' counts,
  so neighbours whose counts were equal stay equal, and those that differed go on to differ.
- Addresses are numbers: what lies there is the caller's to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_ITEM = 4
_KEPT = 16
"""Sets of addresses kept: of each worker alone, in asynchronous training, or of those of one round."""


class Segment(NamedTuple):
    """Elements [low, high) of a model, all alike. `here`: within the range; `tensor`: one of theirs.

    `carriers`: which updates carry them, by their place among those of the pattern.
    """

    low: int
    high: int
    here: slice
    tensor: int
    carriers: tuple[int, ...]


class Addresses(NamedTuple):
    """Where a segment's gradients come from and its values go to: int64 addresses."""

    gradients: NDArray[np.int64]
    answers: NDArray[np.int64]


class Pattern:
    """Of updates that carry `carried`, bool[tensors] each, over a range that `cuts` are the segments of.

    Attributes:
        touched: int64, the tensors that any of them carries.
        segments: of the whole range, in order.
    """

    def __init__(self, carried: Sequence[Mask], cuts: Sequence[tuple[int, int, int]], start: int) -> None:
        self._carried = tuple(carried)
        self.touched = np.flatnonzero(np.logical_or.reduce(self._carried, axis=0))
        self.segments = [
            Segment(
                low,
                high,
                slice(low - start, high - start),
                tensor,
                tuple([place for place, mask in enumerate(self._carried) if mask[tensor]]),
            )
            for low, high, tensor in cuts
        ]
        self._places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Addresses]] = {}

    def is_of(self, carried: Sequence[Mask]) -> bool:
        """Whether updates that carry these have this pattern."""
        if len(carried) != len(self._carried):
            return False
        for one, known in zip(carried, self._carried, strict=True):
            if one is not known and not np.array_equal(one, known):
                return False
        return True

    def places(self, gradients: Sequence[int], answers: Sequence[int]) -> list[Addresses]:
        """For each segment, of ranges of gradients and answers that begin at these addresses."""
        key = tuple(gradients), tuple(answers)
        places = self._places.get(key)
        if places is None:
            if len(self._places) == _KEPT:
                self._places.clear()
            places = self._places[key] = [
                Addresses(
                    addresses([gradients[place] for place in one.carriers], one.here.start),
                    addresses(answers, one.here.start),
                )
                for one in self.segments
            ]
        return places


def addresses(starts: Sequence[int], offset: int) -> NDArray[np.int64]:
    """int64: of element `offset` of float32 arrays that begin at `starts`."""
    return np.array([start + _ITEM * offset for start in starts], dtype=np.int64)
