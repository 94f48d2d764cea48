"""How alike successive changes of a model are: the last commit's, kept beside the values, and its products.

Of a model whose gradients are changes after local steps. What is kept is the sum of a commit before it is
divided, as a cosine does not depend on a factor; of a tensor that a commit does not carry, the one before.

Invariant: sums are over blocks in one tree over the whole vector, so the same for any number of servers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headwater.kernels import add_up, multiply_up
from headwater.spec.layout import LINE, PAGE

NAME = "merged"
"""Under which it stands among a model's states in snapshots and checkpoints."""

MERGED, LAST = 1, 2
"""Numbers of the two in `Sum`, where a tensor is -1: their products are (1, 1), (1, 2) and (2, 2)."""

_ITEM = 4
_CHUNK = 1 << 15


class LastChange:
    """Of a range of `elements` elements."""

    def __init__(self, elements: int) -> None:
        self.array = np.zeros(elements, dtype=np.float32)

    def note(self, here: slice, gradients: NDArray[np.int64]) -> None:
        """A commit brings the sum of these to elements `here`; before anything else is done with them."""
        add_up(gradients, self.array[here])

    def products(
        self, pieces: Iterator[tuple[slice, NDArray[np.int64]]]
    ) -> dict[tuple[int, int], NDArray[np.float64]]:
        """float64[blocks, LINE]: the lanes of each product, of the sums of these and what was kept.

        Blocks for some passes over the pieces.
        """
        shape = (len(self.array) // PAGE, LINE)
        lanes = {pair: np.zeros(shape) for pair in ((MERGED, MERGED), (MERGED, LAST), (LAST, LAST))}
        room = np.empty(_CHUNK, dtype=np.float32)
        for whole, gradients in pieces:
            for begin in range(whole.start, whole.stop, _CHUNK):
                here = slice(begin, min(begin + _CHUNK, whole.stop))
                merged = room[: here.stop - here.start]
                add_up(gradients + _ITEM * (begin - whole.start), merged)
                at = {MERGED: merged.ctypes.data, LAST: self.array[here].ctypes.data}
                for (one, other), sums in lanes.items():
                    multiply_up(at[one], at[other], begin, len(merged), sums)
        return lanes
