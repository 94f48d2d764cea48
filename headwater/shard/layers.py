"""How large a rule's steps are, tensor by tensor, over all servers: for rules that scale them by that.

The direction of a step is what the rule's own pass makes of copies, so what is measured is what is applied.

Invariant: sums are over blocks in one tree over the whole vector, and what is computed for an element depends
on its own history, so both are the same for any number of servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from headwater.kernels import dense, multiply_up
from headwater.log.norms import Node, nodes_of
from headwater.spec.layout import LINE, PAGE
from headwater.spec.rules import Rule

Array = NDArray[np.float32]

VALUES, DIRECTIONS = -1, -2
"""Numbers of the two in `Sum`: a tensor's values with themselves, and the directions with themselves."""

_NOBODY = np.empty(0, dtype=np.int64)


def scaled(scalars: Sequence[float], ratio: float) -> tuple[float, ...]:
    """A layerwise rule's scalars for a step `ratio` times as long: the first is the direction's factor."""
    return scalars[0] * ratio, *scalars[1:]


def directions(
    rule: Rule,
    scalars: Sequence[float],
    values: Array,
    states: Sequence[Array],
    gradients: NDArray[np.int64],
    divisor: float,
) -> Array:
    """float32[n]: what a layerwise rule would take away from these values for a factor of 1; changes nothing.

    `gradients`: addresses of float32[n], whose sum over `divisor` is the gradient. Blocks for a pass.
    """
    moved = values.copy()
    kept = tuple([state.copy() for state in states])
    dense(rule)(gradients, divisor, moved, kept, (-1.0, 0.0, *scalars[2:]), _NOBODY)
    return moved


def products(pieces: Iterable[tuple[int, Array, Array]], low: int, high: int) -> Iterator[tuple[int, Node]]:
    """Sums of squares over elements [low, high) of a model's vector, which are of one tensor.

    `pieces`: where each begins, the values and the directions there. Yields (number, a node of the sum).
    """
    first = low // PAGE
    shape = (-(-high // PAGE) - first, LINE)
    lanes = {VALUES: np.zeros(shape), DIRECTIONS: np.zeros(shape)}
    for begin, *both in pieces:
        for sums, array in zip(lanes.values(), both, strict=True):
            at = array.ctypes.data
            multiply_up(at, at, begin - first * PAGE, len(array), sums)
    for number, sums in lanes.items():
        for node in nodes_of(sums, first):
            yield number, node
