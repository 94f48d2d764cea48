"""The ids that tables are measured with: 2 M of them, drawn as a recommender's batch draws them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headwater.kernels.arrange import arrange

Ids = NDArray[np.int64]

ROWS = 2_000_000
DRAWS = 4096 * 26
"""Draws of a step: a batch of 4096 with 26 features."""
UNIQUE = 34_500
"""About as many different ids as `DRAWS` zipf(1.05) draws of `ROWS` have."""


def known_ids() -> Ids:
    """int64[ROWS], spread over all of int64, in random order."""
    return np.random.default_rng(0).integers(-(2**63), 2**63 - 1, ROWS)


def uniform_batches(ids: Ids, count: int) -> list[Ids]:
    """Batches of `UNIQUE` different ids each, all equally likely, in the order that servers see."""
    generator = np.random.default_rng(1)
    return [arrange(generator.choice(ids, UNIQUE, replace=False), 1).ids for _ in range(count)]


def zipf_draws(ids: Ids, count: int) -> list[Ids]:
    """Batches of `DRAWS` ids each with repeats; the k-th of `ids` is as likely as k^−1.05."""
    generator = np.random.default_rng(2)
    chances = np.cumsum(np.arange(1, len(ids) + 1, dtype=np.float64) ** -1.05)
    draws = (generator.random(DRAWS) * chances[-1] for _ in range(count))
    return [ids[np.searchsorted(chances, draw)] for draw in draws]


def zipf_batches(ids: Ids, count: int) -> list[Ids]:
    """The different ids of each of `zipf_draws`, in the order that servers see."""
    return [arrange(draws, 1).ids for draws in zipf_draws(ids, count)]


def forever(count: int) -> Iterator[int]:
    """Which batch is next, round and round, so that no round finds its own rows still in the cache."""
    return itertools.cycle(range(count))
