"""The gradients of an evaluation's portions, added up in one fixed order whatever the order of their arrival.

They are the leaves of a binary tree whose shape depends on the number of portions alone: neighbours are added
as soon as both are there. So the sum has the same bits always, and what waits for its neighbour is about one
vector for each worker and for each level of the tree.

Invariant: what waits is among the model's named vectors, so it is in snapshots and on standbys.
"""

from __future__ import annotations

import numpy as np

from headwater.kernels.combinations import Combination, combine
from headwater.messages import Portion
from headwater.shard.named_vectors import Array, NamedVectors


def begin(named: NamedVectors) -> None:
    """Forget what an evaluation left that was given up."""
    for name in [name for name in named.arrays if name.startswith("portion ")]:
        named.spare.append(named.arrays.pop(name))


def add(named: NamedVectors, portion: Portion, gradient: Array) -> None:
    """The first gradient of a portion, float32[range], which is copied; blocks for passes over it."""
    level, index = 0, portion.index
    array = named.spare.pop() if named.spare else np.empty_like(gradient)
    array[:] = gradient
    while 1 << level < portion.count:
        alone = index % 2 == 0 and (index + 1) << level >= portion.count
        if not alone:
            other = named.arrays.pop(_node(level, index ^ 1), None)
            if other is None:
                break
            left, right = (other, array) if index % 2 else (array, other)
            combine(len(left), [Combination(left, [left, right], [1.0, 1.0])], ())
            named.spare.append(right)
            array = left
        level, index = level + 1, index // 2
    named.arrays[_node(level, index)] = array


def finish(named: NamedVectors, count: int, out: str) -> None:
    """All portions are added: their sum is vector `out` from now on."""
    root = named.arrays.pop(_node((count - 1).bit_length(), 0))
    named.spare.append(named.arrays[out])
    named.arrays[out] = root


def _node(level: int, index: int) -> str:
    return f"portion {index} of level {level}"
