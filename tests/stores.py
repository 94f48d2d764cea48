"""Scripts of one KVStore a worker, run for several numbers of workers and servers."""

import functools

import numpy as np
import pytest

import headwater as hw

S, B = (2, 3), (1200, 1200)
"""Shapes of MXNet's tests; the larger one is cut between servers unevenly."""

COUNTS = [
    (3, 2),
    *[
        pytest.param(workers, servers, marks=pytest.mark.long)
        for workers in (1, 2, 3, 4, 7)
        for servers in (1, 2, 7)
        if (workers, servers) != (3, 2)
    ],
]


def in_all(body, workers=1, servers=1, sync="sync"):
    """Run `body(store)` in every worker; what each returned, by rank."""
    type = "dist_sync" if sync == "sync" else "dist_async"
    train = lambda worker: body(hw.kvstore.create(worker, type))  # noqa: E731
    return hw.run(train, workers=workers, servers=servers, sync=sync, engine="inline").values


def scripted(body):
    """A test of both counts, whose body holds on every worker right after its own pull."""

    @pytest.mark.parametrize(("workers", "servers"), COUNTS)
    @functools.wraps(body)
    def test(workers, servers):
        in_all(body, workers, servers)

    del test.__wrapped__
    return test


def equal(array, value):
    """Exactly, everywhere."""
    return bool((np.asarray(array) == value).all())
