"""Who reads which part of a data set."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headwater.splits import order, static_batches

lengths = st.integers(0, 200)
small = st.integers(1, 8)
seeds = st.integers(0, 2**40)


def batches(length, batch_size, rank, workers, shuffle=True, seed=0, epoch=0):
    return list(
        static_batches(
            length,
            batch_size=batch_size,
            rank=rank,
            workers=workers,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
        )
    )


@given(lengths, small, small, st.booleans(), seeds, st.integers(0, 5))
def test_all_workers_together_visit_every_sample_once(length, batch_size, workers, shuffle, seed, epoch):
    parts = [batches(length, batch_size, rank, workers, shuffle, seed, epoch) for rank in range(workers)]
    visited = [i for part in parts for batch in part for i in batch.tolist()]
    assert sorted(visited) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        assert all(len(batch) == batch_size for batch in part[:-1])
        assert all(1 <= len(batch) <= batch_size for batch in part)


@given(lengths, seeds, st.integers(0, 5))
def test_an_order_is_a_permutation_and_the_same_every_time(length, seed, epoch):
    one = order(length, shuffle=True, seed=seed, epoch=epoch)
    assert one.dtype == np.int64
    assert sorted(one.tolist()) == list(range(length))
    assert one.tolist() == order(length, shuffle=True, seed=seed, epoch=epoch).tolist()


def test_epochs_and_seeds_shuffle_differently():
    orders = [order(100, shuffle=True, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({one.tobytes() for one in orders}) == 9


def test_without_shuffling_each_worker_reads_every_nth_sample_in_order():
    assert order(5, shuffle=False, seed=3, epoch=2).tolist() == [0, 1, 2, 3, 4]
    assert [batch.tolist() for batch in batches(7, 2, 1, 2, shuffle=False)] == [[1, 3], [5]]
