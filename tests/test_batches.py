"""Data through a whole cluster: a committed batch adds ones to a vector of samples, so counts are exact."""

import functools
import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater import messages as m
from headwater.cli.summary import summarize
from headwater.errors import ConfigurationError, StalledError
from headwater.machines.splits import Order, part_of
from headwater.wire.listener import dial
from headwater.worker import Worker

DYNAMIC = ["async", "ssp:0", "ssp:2"]


def train(function, **options):
    return hw.run(function, engine="inline", patience=5, deadline=60, **options)


def counter(worker, size):
    """A model that counts how often each sample was part of a committed step."""
    return worker.model("seen", {"seen": np.zeros(size, np.float32)}, hw.Accumulate())


def count(worker, model, batch):
    ones = np.zeros(model.pull()["seen"].shape, np.float32)
    np.add.at(ones, batch, 1)
    model.push({"seen": ones})
    worker.step()


def seen(source):
    parameters = source.parameters() if isinstance(source, hw.Cluster) else (0, source.parameters)
    return parameters[1]["seen"]["seen"].tolist()


def die(worker):
    """End a worker as a crash does: its connections close, nobody is told."""
    worker._session.close()
    worker._close()


def expected_part(size, rank, workers, *, epochs, seed):
    """What a worker reads of shuffled samples, all epochs one after the other."""
    orders = [Order(size, None, shuffle=True, seed=seed, epoch=epoch) for epoch in range(epochs)]
    part = part_of(size, rank, workers, grouped=False)
    return [i for order in orders for i in order.at(part).tolist()]


# ── dynamic splits ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", DYNAMIC)
@pytest.mark.parametrize("servers", [1, 2])
def test_dynamic_splits_are_read_exactly_once_an_epoch(mode, servers):
    samples = np.arange(101)

    def work(worker):
        model = counter(worker, 101)
        for call in range(2):
            for batch in worker.batches(samples, 2 + worker.rank, epochs=2, shuffle=True, seed=call):
                count(worker, model, batch)
        worker.barrier()

    result = train(work, workers=3, servers=servers, sync=mode)
    assert seen(result) == [4.0] * 101
    progress = result.statistics.progress
    assert sum(report.samples for report in progress) == sum(report.planned for report in progress) == 404
    assert result.statistics.unvisited == ()


def test_dynamic_splits_without_any_step_are_read_once_by_all_together():
    def evaluate(worker):
        right = sum(len(batch) for batch in worker.batches(np.arange(50), 4))
        return worker.sum(right=right)["right"]

    assert train(evaluate, workers=3, sync="async").values == [50.0] * 3


def test_an_order_of_dynamic_splits_is_that_of_the_seed():
    with hw.Cluster(workers=1, sync="async") as cluster, cluster.worker() as worker:
        found = [i for b in worker.batches(np.arange(40), 3, epochs=2, shuffle=True, seed=9) for i in b]
    assert found == expected_part(40, 0, 1, epochs=2, seed=9)


def test_static_parts_in_asynchronous_mode_are_those_of_synchronous_mode():
    def work(worker, splits):
        return [i for b in worker.batches(np.arange(31), 4, shuffle=True, seed=2, splits=splits) for i in b]

    expected = [expected_part(31, rank, 2, epochs=1, seed=2) for rank in range(2)]
    assert train(functools.partial(work, splits=None), sync="sync").values == expected
    assert train(functools.partial(work, splits="static"), sync="async").values == expected


def test_one_who_breaks_off_leaves_the_rest_to_the_others():
    broke = threading.Event()

    def work(worker):
        model = counter(worker, 64)
        if worker.rank == 1:
            assert broke.wait(30)
        for number, batch in enumerate(worker.batches(np.arange(64), 2)):
            if worker.rank == 0 and number == 1:
                break  # this batch was read, but no step was taken for it
            count(worker, model, batch)
        broke.set()
        worker.barrier()

    assert seen(train(work, workers=2, sync="async")) == [1.0] * 64


def test_stop_ends_dynamic_splits_for_everybody():
    def work(worker):
        worker.model("v", {"v": np.zeros(1, np.float32)}, hw.Accumulate())
        for _ in worker.batches(np.arange(10_000), 1, epochs=1000):
            worker.step()
            if worker.version >= 20:
                worker.stop()
        return worker.version

    result = train(work, workers=3, sync="async")
    assert max(result.values) < 200
    assert result.statistics.unvisited == ()


def test_two_data_sets_at_a_time_end_with_the_shorter_one():
    def work(worker):
        pairs = zip(worker.batches(np.arange(40), 1), worker.batches(np.arange(30), 1), strict=False)
        model = counter(worker, 30)
        for _, second in pairs:
            count(worker, model, second)
        worker.barrier()

    assert seen(train(work, workers=3, sync="async")) == [1.0] * 30


def test_the_end_waits_for_the_last_split_of_another_no_longer_than_the_deadline():
    held, over = threading.Event(), threading.Event()

    def work(worker):
        reading = worker.batches(np.arange(16), 1)
        if worker.rank == 1:
            next(reading)
            held.set()
            assert over.wait(30)
            return
        assert held.wait(30)
        try:
            with pytest.raises(StalledError, match=r"for 3 s: .* worker 1 has samples 0–0 of epoch 0"):
                list(reading)
        finally:
            over.set()

    hw.run(work, engine="inline", sync="async", workers=2, patience=0.3, deadline=3)


def test_other_data_in_another_worker_is_refused_with_both_named():
    begun, refused = threading.Event(), threading.Event()

    def work(worker):
        reading = worker.batches(np.arange(10 + worker.rank), 1)
        if worker.rank == 0:
            first = next(reading)
            begun.set()
            assert refused.wait(30)
            return 1 + len(list(reading)), first
        assert begun.wait(30)
        with pytest.raises(ConfigurationError, match="11 samples in order, others 1 × 10 samples in order"):
            next(reading)
        refused.set()
        return None

    assert train(work, workers=2, sync="async").values == [(10, [0]), None]


def test_splits_are_leased_for_a_loader_of_ones_own():
    def work(worker):
        model = counter(worker, 77)
        for split in worker.splits(77, epochs=2, shuffle=True, batch_size=4):
            assert split.dtype == np.int64
            for start in range(0, len(split), 4):
                count(worker, model, split[start : start + 4])
        worker.barrier()

    assert seen(train(work, workers=3, sync="async")) == [2.0] * 77
    assert seen(train(work, workers=3, sync="sync")) == [2.0] * 77


# ── deaths ──────────────────────────────────────────────────────────────────────────────────────


def _reads(worker, size, epochs, dies_at=None, in_batch=False, dying=None):
    """Read and count everything; with `dies_at`, die at that batch, before or after its step.

    `dying`: a file that is there from then on; whoever lives begins to read when it is.
    """
    model, read = counter(worker, size), []
    if dying is not None and dies_at is None:
        wait_until(dying.exists)
    for number, batch in enumerate(worker.batches(np.arange(size), 3, epochs=epochs, shuffle=True, seed=5)):
        if number == dies_at and in_batch:
            _die(dying)
        count(worker, model, batch)
        read += batch.tolist()
        if number == dies_at:
            _die(dying)
    worker.barrier()
    return read


def _die(dying):
    if dying is not None:
        dying.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _outcome(cluster, deadline=60):
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        outcome = cluster.next_outcome(1.0)
        if outcome is not None:
            return outcome
    raise AssertionError("no worker ended")


def _statistics_when(cluster, holds, deadline=30):
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        statistics = cluster.statistics()
        if holds(statistics):
            return statistics
    raise AssertionError(f"never held: {statistics}")


@pytest.mark.parametrize("in_batch", [False, True])
def test_what_a_killed_process_leased_is_read_by_the_others(in_batch, tmp_path):
    reads = functools.partial(_reads, size=200, epochs=2, dying=tmp_path / "dying")
    with hw.Cluster(workers=2, sync="async", engine="local", deadline=60) as cluster:
        cluster.start_worker(0, reads)
        cluster.start_worker(1, functools.partial(reads, dies_at=1, in_batch=in_batch))
        outcomes = [_outcome(cluster), _outcome(cluster)]
        assert seen(cluster) == [2.0] * 200
        assert cluster.statistics().unvisited == ()
    failures = {outcome.index: outcome.failure for outcome in outcomes}
    assert failures[0] is None
    assert "SIGKILL" in failures[1].summary


@pytest.mark.parametrize("in_batch", [False, True])
def test_a_killed_ranks_part_is_told_and_continued_by_the_next_worker_with_that_rank(in_batch, caplog):
    size, epochs = 60, 2
    reads = functools.partial(_reads, size=size, epochs=epochs)
    with hw.Cluster(workers=2, servers=2, engine="local", deadline=60) as cluster:
        cluster.start_worker(0, reads)
        cluster.start_worker(1, functools.partial(reads, dies_at=13, in_batch=in_batch))
        values = {}
        while True:
            outcome = _outcome(cluster)
            if outcome.failure is not None:
                break
            values[outcome.index] = outcome.value
        done = 3 * (13 + (not in_batch))
        left = _statistics_when(cluster, lambda statistics: statistics.unvisited)
        assert left.unvisited == (m.Unvisited(0, 1, 2 * 30 - done),)
        told = f"{2 * 30 - done} samples of worker 1's part wait for the next worker"
        _statistics_when(cluster, lambda statistics: told in caplog.text)
        cluster.start_worker(1, reads)
        while len(values) < 2:
            outcome = _outcome(cluster)
            values[outcome.index] = outcome.value
        assert seen(cluster) == [2.0] * size
        assert cluster.statistics().unvisited == ()
        servers = [node.address for node in cluster.statistics().nodes if node.role == "server"]
        wait_until(lambda: len(set(map(_recorded, servers))) == 1)  # one may be an entry ahead
    assert values[0] == expected_part(size, 0, 2, epochs=epochs, seed=5)
    assert values[1] == expected_part(size, 1, 2, epochs=epochs, seed=5)[done:]


def _recorded(address):
    channel = dial(address, timeout=10)
    try:
        channel.send(m.Ask())
        return repr(channel.receive(timeout=10).message.recorded)
    finally:
        channel.close()


def _taken(cluster, program, batches):
    """Run `program(worker)` until it has yielded this many times, then crash; what it yielded."""
    worker = Worker(cluster.address, 0)
    running = program(worker)  # kept, as a generator that is dropped has left its loop in order
    found = list(itertools.islice(running, batches))
    die(worker)
    _statistics_when(cluster, lambda s: all(node.role != "worker" for node in s.nodes))
    return found


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("first", range(14))
def test_earlier_calls_yield_nothing_the_recorded_one_goes_on_and_later_ones_run_whole(mode, first):
    def program(worker):
        counter(worker, 1)
        for call in range(3):
            for batch in worker.batches(np.arange(9), 2, shuffle=True, seed=call):
                worker.step()
                yield call, batch.tolist()

    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        whole = _taken(cluster, program, 99)
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        begun = _taken(cluster, program, first)
        assert begun + _taken(cluster, program, 99) == whole
        assert _taken(cluster, program, 99) == []


def test_a_batch_that_no_step_followed_is_read_again():
    def program(worker):
        counter(worker, 1)
        for number, batch in enumerate(worker.batches(np.arange(8), 2)):
            yield batch.tolist()
            if number == 1:
                worker.step()  # for the first two

    for mode in ("sync", "async"):
        with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
            assert _taken(cluster, program, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
            assert _taken(cluster, program, 1) == [[4, 5]]


def test_an_evaluation_inside_of_the_loop_does_not_end_it_for_a_restarted_worker():
    def program(worker):
        counter(worker, 1)
        for batch in worker.batches(np.arange(12), 2):
            worker.step()
            evaluated = sum(len(part) for part in worker.batches(np.arange(5), 2, splits="static"))
            yield batch.tolist(), evaluated

    with hw.Cluster(workers=1, deadline=30) as cluster:
        assert _taken(cluster, program, 2) == [([0, 1], 5), ([2, 3], 5)]
        assert _taken(cluster, program, 2) == [([4, 5], 5), ([6, 7], 5)]


def test_two_data_sets_at_a_time_are_both_continued():
    def program(worker):
        counter(worker, 1)
        for first, second in zip(
            worker.batches(np.arange(12), 2), worker.batches(np.arange(6), 1), strict=True
        ):
            worker.step()
            yield first.tolist(), second.tolist()

    with hw.Cluster(workers=1, deadline=30) as cluster:
        assert _taken(cluster, program, 2) == [([0, 1], [0]), ([2, 3], [1])]
        assert _taken(cluster, program, 1) == [([4, 5], [2])]
        assert _taken(cluster, program, 99)[-1] == ([10, 11], [5])


def test_a_part_of_another_size_begins_its_epoch_anew_and_says_so(caplog):
    def program(worker, size):
        counter(worker, 1)
        for batch in worker.batches(np.arange(size), 2, epochs=2):
            worker.step()
            yield batch.tolist()

    with hw.Cluster(workers=1, deadline=30) as cluster:
        assert len(_taken(cluster, functools.partial(program, size=6), 4)) == 4
        again = _taken(cluster, functools.partial(program, size=8), 99)
    assert again == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert "has 8 samples, but had 6 when it was recorded: epoch 1 begins anew" in caplog.text


def test_what_dead_workers_left_of_dynamic_splits_is_told():
    def program(worker):
        counter(worker, 1)
        for batch in worker.batches(np.arange(64), 2):
            worker.step()
            yield batch.tolist()

    with hw.Cluster(workers=1, sync="async", deadline=30) as cluster:
        _taken(cluster, program, 3)
        left = _statistics_when(cluster, lambda statistics: statistics.unvisited)
        assert left.unvisited == (m.Unvisited(0, None, 58),)
        assert len(_taken(cluster, program, 99)) == 29
        assert cluster.statistics().unvisited == ()


# ── what a user writes ──────────────────────────────────────────────────────────────────────────


class WithoutLength:
    def __getitem__(self, index):
        return index


class LengthUnknown(WithoutLength):
    def __len__(self):
        raise TypeError("object of type 'stream' has no len()")


@pytest.mark.parametrize(
    ("dataset", "options", "text"),
    [
        (np.ones(4), {"batch_size": 2.5}, "batch_size must be an integer ≥ 1, got 2.5"),
        (np.ones(4), {"seed": -1}, "seed must be an integer ≥ 0, got -1"),
        (np.ones(4), {"splits": "half"}, "splits must be 'static' or 'dynamic', got 'half'"),
        (np.ones(4), {"splits": "dynamic"}, "in synchronous mode"),
        (np.ones(0), {}, "has 0 samples"),
        ((), {}, "an empty tuple"),
        (WithoutLength(), {}, "needs __len__ and __getitem__, got WithoutLength"),
        (LengthUnknown(), {}, "needs a length, got LengthUnknown"),
        (iter([1]), {}, "needs __len__ and __getitem__"),
        ((np.ones(3), np.ones(4)), {}, r"one length, got \[3, 4\]"),
    ],
)
def test_impossible_batches_are_refused_when_they_are_asked_for(dataset, options, text):
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        with pytest.raises(ConfigurationError, match=text):
            worker.batches(dataset, **{"batch_size": 2, **options})
        if "batch_size" not in options:
            with pytest.raises(ConfigurationError, match=text):
                worker.splits(dataset, **options)


def test_the_summary_of_a_run_tells_what_nobody_read():
    def give_up(worker):
        for _ in worker.batches(np.arange(10), 1):
            worker.step()
            if worker.rank == 1:
                die(worker)
                break

    result = hw.run(give_up, workers=2, engine="inline", patience=5, deadline=30)
    assert "4 samples of call 0 of batches, for worker 1, were read by nobody" in summarize(result)
