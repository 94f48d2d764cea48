"""Sums over a server's range that commits need beforehand: how long gradients are, and how alike.

Invariants:
- What is summed is what `Vector.apply` would apply.
- Sums are over blocks in one tree over the whole vector, so they are the same for any number of servers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from headwater.kernels import multiply_up, square_up
from headwater.log.norms import Node, nodes_of, total
from headwater.shard.layers import directions, products
from headwater.shard.merges import Merge
from headwater.shard.staging import Update
from headwater.shard.vector import CHUNK, Vector, room_for
from headwater.spec.layout import LINE, PAGE

Array = NDArray[np.float32]

_ITEM = 4


def squares(vector: Vector, updates: Sequence[Update], merge: Merge) -> list[Node]:
    """Sums of the squares of what `apply` would apply of this range, unclipped.

    Blocks for one pass over the range.
    """
    merge = vector.own_merge(merge)
    carried = np.stack([update.carried for update in updates])
    lanes = np.zeros(((vector.stop - vector.start) // PAGE, LINE))
    room = room_for(merge)
    for low, high, tensor in vector.segments(carried):
        for here, gradients in vector.merged(updates, merge, tensor, low, high, room):
            square_up(gradients, merge.divisor, here.start, here.stop - here.start, lanes)
    return nodes_of(lanes, vector.start // PAGE)


def likenesses(vector: Vector, updates: Sequence[Update], merge: Merge) -> Iterator[tuple[int, int, Node]]:
    """Sums of products of what `apply` would merge of this range, undivided, and what it merged last.

    Yields (first, second, a node of the sum), numbered as in `Sum`. Blocks for some passes.
    """
    assert vector.last is not None
    merge = vector.own_merge(merge)
    carried = np.stack([update.carried for update in updates])
    room = room_for(merge)
    pieces = (
        piece
        for low, high, tensor in vector.segments(carried)
        for piece in vector.merged(updates, merge, tensor, low, high, room)
    )
    for (one, other), lanes in vector.last.products(pieces).items():
        for node in nodes_of(lanes, vector.start // PAGE):
            yield one, other, node


def step_lengths(vector: Vector, updates: Sequence[Update], merge: Merge) -> Iterator[tuple[int, int, Node]]:
    """Sums of squares of each carried tensor's values, and of the direction of its step.

    Yields (tensor, number as in `Sum`, a node of the sum). Blocks for some passes over the range.
    """
    merge = vector.own_merge(merge)
    carried = np.stack([update.carried for update in updates])
    room = room_for(merge)
    for low, high, tensor in vector.segments(carried, each_tensor=True):
        if carried[:, tensor].any():
            pieces = _directed(vector, updates, merge, tensor, low, high, room)
            for number, node in products(pieces, low, high):
                yield tensor, number, node


def _directed(
    vector: Vector, updates: Sequence[Update], merge: Merge, tensor: int, low: int, high: int, room: Array
) -> Iterator[tuple[int, Array, Array]]:
    rule = vector.rules[vector.layout.groups[tensor]]
    scalars = rule.scalars(vector.updates, int(vector.counts[tensor]) + 1)
    for whole, gradients in vector.merged(updates, merge, tensor, low, high, room):
        for begin in range(whole.start, whole.stop, CHUNK):
            here = slice(begin, min(begin + CHUNK, whole.stop))
            states = [vector.states[name][here] for name in rule.states()]
            there = gradients + _ITEM * (begin - whole.start)
            values = vector.values[here]
            yield (
                begin + vector.start,
                values,
                directions(rule, scalars, values, states, there, merge.divisor),
            )


def pair_products(
    vector: Vector, updates: Sequence[Update], contributors: Sequence[int], last: int = -1
) -> Iterator[tuple[int, int, int, Node]]:
    """Sums of the products of all pairs of `updates`, of each tensor that any of them carries.

    Yields (tensor, place of one, place of the other, a node of the sum); a tensor that lies within this
    range has one node. `contributors`: places of all that contribute to the commit; one that does not
    carry a tensor has a product of 0 with itself there. `last`: the place of the last commit's change, of
    a model that keeps it. Blocks for a pass over the range for each pair.
    """
    carried = np.stack([update.carried for update in updates])
    for low, high, tensor in vector.segments(carried, each_tensor=True):
        by = [update for update in updates if update.carried[tensor]]
        if not by:
            continue
        whole = vector.start <= vector.layout.starts[tensor] and vector.layout.stops[tensor] <= vector.stop
        first = low // PAGE
        vectors = [(update.place, update.staging.gradients_at) for update in by]
        if vector.last is not None:
            vectors.append((last, vector.last.array.ctypes.data))
        for one, other in itertools.combinations_with_replacement(vectors, 2):
            lanes = np.zeros((-(-high // PAGE) - first, LINE))
            at = [address + _ITEM * (low - vector.start) for _, address in (one, other)]
            multiply_up(at[0], at[1], low - first * PAGE, high - low, lanes)
            nodes = nodes_of(lanes, first)
            for node in [(0, 0, total(nodes))] if whole else nodes:
                yield tensor, one[0], other[0], node
        for place in set(contributors) - {update.place for update in by}:
            yield tensor, place, place, (0, 0, 0.0)
