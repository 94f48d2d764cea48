"""Radial-directional averaging: contributions are scaled so that their sum has length and direction apart.

By tensor: the length is Σ wᵢ ‖gᵢ‖ / Σ wᵢ, the direction that of Σ wᵢ gᵢ / ‖gᵢ‖. So the merged gradient is a
sum Σ cᵢ gᵢ, and the cᵢ follow from the products of all pairs of gradients alone.

Pure; the sequencer computes the cᵢ once, from what all servers have measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

CANCELLED = 1e-6
"""Where unit vectors cancel to less than this share of their weight, what is left is float32's rounding."""


def coefficients(
    products: Mapping[tuple[int, int], float], weights: Mapping[int, float]
) -> tuple[dict[int, float], float]:
    """The cᵢ of each contributor with a gradient other than 0, and the length of the result.

    Args:
        products: of each pair (i, j), i ≤ j, that carries the tensor: the sum of gᵢ · gⱼ.
        weights: of every contributor, by the same numbers; whoever is in no pair has a zero gradient.
    """
    largest = max(weights.values())
    shares = {i: weight / largest for i, weight in weights.items()}
    lengths = {i: math.sqrt(products.get((i, i), 0.0)) for i in shares}
    length = sum(share * lengths[i] for i, share in shares.items()) / sum(shares.values())
    units = {i: shares[i] / lengths[i] for i in shares if lengths[i] != 0.0}
    squared = 0.0
    for (i, j), product in sorted(products.items()):
        if i in units and j in units:
            squared += (1 if i == j else 2) * units[i] * units[j] * product
    direction = math.sqrt(max(squared, 0.0)) if squared == squared else squared
    if direction <= CANCELLED * sum(shares[i] for i in units):
        return dict.fromkeys(units, 0.0), 0.0
    return {i: length / direction * unit for i, unit in units.items()}, length
