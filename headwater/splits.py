"""Who reads which part of a data set.

Pure: an order is a function of (length, seed, epoch), a part of (order, rank, workers).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def order(length: int, *, shuffle: bool, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits samples: int64[length], the same on every worker."""
    if not shuffle:
        return np.arange(length, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(length)


def static_batches(
    length: int, *, batch_size: int, rank: int, workers: int, shuffle: bool, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """The batches of one worker in one epoch: every `workers`-th sample of the order, from `rank` on.

    All samples are visited exactly once by all workers together; the last batch may be smaller and
    the number of batches may differ by one between workers.
    """
    mine = order(length, shuffle=shuffle, seed=seed, epoch=epoch)[rank::workers]
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
