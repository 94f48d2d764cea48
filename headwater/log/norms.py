"""The norm of a model's gradient from parts that servers have, the same to the bit however it is cut.

Squares are summed over blocks of `PAGE` elements; two neighbours make a block of the next level, so that all
sums form one binary tree over the whole vector, whose shape depends on the vector alone. A server sends the
largest whole subtrees of its range, at most two of each level.

Pure; used by servers and the sequencer alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Node: TypeAlias = tuple[int, int, float]
"""Level, index, and the sum of blocks [index · 2**level, (index + 1) · 2**level)."""


def subtrees(blocks: NDArray[np.float64], first: int) -> list[Node]:
    """The largest whole subtrees over blocks `first`, `first` + 1, …, whose sums are given."""
    found: list[Node] = []
    level, here = 0, blocks
    with np.errstate(all="ignore"):
        while len(here):
            if first % 2:
                found.append((level, first, float(here[0])))
                first, here = first + 1, here[1:]
            if len(here) % 2:
                found.append((level, first + len(here) - 1, float(here[-1])))
                here = here[:-1]
            level, first, here = level + 1, first // 2, here[0::2] + here[1::2]
    return found


def nodes_of(lanes: NDArray[np.float64], first: int) -> list[Node]:
    """The largest whole subtrees over blocks from number `first` on; `lanes`: float64[blocks, 2**k], which
    are added up in pairs.
    """
    with np.errstate(all="ignore"):
        while lanes.shape[1] > 1:
            lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return subtrees(lanes[:, 0], first)


def norm(nodes: Iterable[Node]) -> float:
    """The root of the whole, from subtrees that cover it once; a missing end counts as zeros."""
    return math.sqrt(total(nodes))


def total(nodes: Iterable[Node]) -> float:
    """The sum over the whole, from subtrees that cover it once; what is missing counts as zeros."""
    levels: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for level, index, value in nodes:
        levels[level][index] = value
    level, here = 0, levels.pop(0, {})
    while levels or any(here):
        parents = levels.pop(level + 1, {})
        for index in sorted(here):
            parents[index // 2] = parents.get(index // 2, 0.0) + here[index]
        level, here = level + 1, parents
    return here.get(0, 0.0)


def scale(clip_norm: float, norm: float) -> float:
    """What a gradient of this norm is multiplied by: min(1, clip_norm / (norm + 1e-6)), as torch does it.

    NaN where the norm is NaN.
    """
    ratio = clip_norm / (norm + 1e-6)
    return 1.0 if ratio > 1 else ratio
