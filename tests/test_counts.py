"""More or fewer workers than before: what is left of static parts is cut anew, and each sample read once."""

import collections
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headwater as hw
from examples import examples
from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.log.positions import Positions
from headwater.worker.parts import StaticPart
from headwater.worker.plan import ReadPlan

few = examples(60)


def reads(positions, plan, rank, workers, call, most):
    """What a worker reads of a call, at most so many batches, each recorded with a step."""
    known = positions.of(rank) or m.Position(rank, 0)
    if call < known.over:
        return []
    place = next((place for place in known.places if place.call == call), None)
    recuts = [cut for cut in positions.recuts if cut.call == call]
    part, found = StaticPart(call, plan, rank, workers, place, recuts), []
    while (piece := part.next_piece()) is not None:
        epoch, left = piece
        while len(left):
            if not most:
                return found
            most -= 1
            batch, left = left[: plan.batch], left[plan.batch :]
            found += [(epoch, int(sample)) for sample in batch]
            part.hand_out(epoch, batch)
            positions.record(m.Position(rank, call, (part.place(),)))
    positions.record(m.Position(rank, call + 1))
    return found


@few
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=4, max_size=4)), max_size=4),
    st.integers(1, 4),
)
def test_whatever_counts_come_after_each_other_every_sample_is_read_once(
    size, batch, epochs, grouped, interrupted, last
):
    plan = ReadPlan(size, (size,) if grouped else None, batch, epochs, False, 0, "static")
    positions, read = Positions(), collections.Counter()
    for workers, most in [*interrupted, (last, [10**6] * 4)]:
        positions = Positions(positions.recorded())  # as a checkpoint keeps it
        positions.cut_for(workers)
        for rank in range(workers):
            for call in range(2):
                found = reads(positions, plan, rank, workers, call, most[rank])
                read.update((call, *one) for one in found)
                if most[rank] < 10**6:
                    break  # it is in its first call that is not over
    assert read == dict.fromkeys(
        ((call, epoch, sample) for call in range(2) for epoch in range(epochs) for sample in range(size)), 1
    )
    assert positions.recuts == (), "nothing is kept of calls that are over"


def trains(worker, most, shuffle, read):
    """An ordinary loop over three epochs, which an error ends after so many steps."""
    model, steps = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate()), 0
    for epoch in worker.epochs(3):
        for batch in worker.batches(np.arange(60), 2, seed=epoch, shuffle=shuffle):
            model.push({"w": np.ones(1)})
            worker.step()
            read.extend((epoch, int(sample)) for sample in batch)
            steps += 1
            if steps == most + worker.rank:
                raise RuntimeError("enough")
        worker.sum(epoch=epoch)


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (2, 1, 3)])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_run_that_is_resumed_with_other_counts_reads_the_rest_once(counts, mode, shuffle, tmp_path):
    read = []

    def body(worker, most):
        with contextlib.suppress(RuntimeError), worker:
            trains(worker, most, shuffle, read)

    for number, workers in enumerate(counts):
        most = 10**6 if number == len(counts) - 1 else (4, 9)[number]
        options = {"workers": workers, "sync": mode, "checkpoint": tmp_path, "resume": number > 0}
        with hw.Cluster(**options, deadline=30) as cluster:
            joined = [cluster.worker() for _ in range(workers)]
            threads = [threading.Thread(target=body, args=(worker, most)) for worker in joined]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            cluster.take_last_checkpoint()
            assert most < 10**6 or cluster.statistics().unvisited == ()
    assert sorted(read) == [(epoch, sample) for epoch in range(3) for sample in range(60)]


def test_who_joins_beyond_the_declared_workers_is_told_how_to_read():
    with hw.Cluster(workers=1, deadline=20) as cluster, cluster.worker() as first, cluster.worker() as second:
        with pytest.raises(ConfigurationError, match=r"worker 1 joined beyond .* resume with workers=2"):
            next(second.batches(np.arange(8), 2))
        second.leave()
        assert len(list(first.batches(np.arange(8), 2))) == 4


def test_a_stop_before_all_have_joined_reaches_the_last_one():
    with hw.Cluster(workers=2, sync="async", deadline=20) as cluster, cluster.worker() as first:
        first.stop()
        with cluster.worker() as second:
            for worker in (first, second):
                steps = 0
                for _ in worker.batches(np.arange(40), 2, splits="static"):
                    worker.step()
                    steps += 1
                assert steps == 1
