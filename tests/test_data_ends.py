"""What ends a worker's data: the end of the data, `stop` and `close`; no exception, and no finaliser."""

import gc
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater.machines.splits import part_of
from headwater.runtime import client as clients
from headwater.worker import Worker

MODES = ["sync", "async"]


def joined(cluster, rank=0):
    """A worker with this rank, once the coordinator has noticed that the one before it is gone."""

    def taken():
        living = {node.rank for node in cluster.statistics().nodes if node.role == "worker" and node.pid}
        return rank in living

    wait_until(lambda: not taken())
    worker = Worker(cluster.address, rank)
    return worker, worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate())


def step(worker, model):
    model.push({"w": np.ones(1)})
    return worker.step()


def read(worker, model, batches, most=None):
    """Step after each batch; what was read. With `most` the loop is left after so many."""
    found = []
    for batch in batches:
        step(worker, model)
        found += batch.tolist()
        if most is not None and len(found) >= most:
            break
    return found


def die(worker):
    """End a worker as a crash does: its connections close, nobody is told."""
    worker._session.close()
    worker._close()


class Interrupted(Exception):
    pass


# ── exceptions ──────────────────────────────────────────────────────────────────────────────────


def _raises(worker, model):
    for number, _ in enumerate(worker.batches(np.arange(20), 2)):
        step(worker, model)
        if number == 2:
            raise Interrupted


def _dismissed(worker, model):
    for number, _ in enumerate(worker.batches(np.arange(20), 2)):
        step(worker, model)
        if number == 2:
            worker.dismiss(143)  # as SIGTERM does to a served worker


def _raises_where_it_fetches(worker, model):
    class Damaged:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 6:
                raise Interrupted
            return np.int64(index)

    for _ in worker.batches(Damaged(), 2):
        step(worker, model)


def _collected_at_once(worker, model):
    loader = worker.batches(np.arange(20), 2)
    read(worker, model, loader, most=6)
    del loader
    raise Interrupted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", [_raises, _dismissed, _raises_where_it_fetches, _collected_at_once])
def test_an_exception_does_not_end_the_data_for_the_next_worker_with_that_rank(program, mode):
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        worker, model = joined(cluster)
        with pytest.raises((Interrupted, SystemExit)), worker:
            program(worker, model)
        worker, model = joined(cluster)
        with worker:
            assert read(worker, model, worker.batches(np.arange(20), 2)) == list(range(6, 20))
        assert cluster.statistics().unvisited == ()


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_reads_what_an_exception_left(mode, tmp_path):
    failing = [True]

    def train(worker):
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate())
        found = []
        for batch in worker.batches(np.arange(40), 2, splits="static"):
            step(worker, model)
            found += batch.tolist()
            if failing[0] and worker.rank == 1 and len(found) == 8:
                raise Interrupted
        return found

    options = {"workers": 2, "engine": "inline", "sync": mode, "checkpoint": tmp_path, "every": 1}
    with hw.Cluster(**options, deadline=30) as cluster:
        workers = [cluster.worker() for _ in range(2)]
        threads = [threading.Thread(target=_quietly, args=(train, worker)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        cluster.take_last_checkpoint()
    failing[0] = False
    result = hw.run(train, **options, resume=True, deadline=30)
    assert result.values == [[], list(part_of(40, 1, 2, grouped=False))[8:]]
    assert result.parameters["m"]["w"].tolist() == [20.0], "every batch had its step"


def _quietly(train, worker):
    try:
        with worker:
            train(worker)
    except Interrupted:
        pass


def test_a_sample_that_cannot_be_fetched_is_asked_for_again():
    class Flaky:
        failed = False

        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index == 2 and not self.failed:
                self.failed = True
                raise Interrupted
            return np.int64(index)

    for mode in MODES:
        with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
            worker, model = joined(cluster)
            with worker:
                batches, found = worker.batches(Flaky(), 2), []
                found += next(batches).tolist()
                step(worker, model)
                with pytest.raises(Interrupted):
                    next(batches)
                assert found + read(worker, model, batches) == list(range(6))


def test_a_split_whose_lease_was_interrupted_is_leased_again(monkeypatch):
    with hw.Cluster(workers=1, sync="async", deadline=30) as cluster:
        worker, model = joined(cluster)
        with worker:
            batches, client = worker.batches(np.arange(16), 2), worker._session
            receive, interrupted = client._next_answer, []

            def interrupt_once():
                reply = receive()
                if not interrupted:
                    interrupted.append(reply)
                    raise KeyboardInterrupt
                return reply

            monkeypatch.setattr(client, "_next_answer", interrupt_once)
            with pytest.raises(KeyboardInterrupt):
                next(batches)
            assert interrupted, "the answer had come"
            assert read(worker, model, batches) == list(range(16))


# ── leaving the loop, and ends by name ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_left_by_break_is_over_once_the_worker_has_gone_on(mode):
    def program(worker, model):
        first = read(worker, model, worker.batches(np.arange(20), 2, splits="static"), most=6)
        return first, read(worker, model, worker.batches(np.arange(9), 2, splits="static"), most=4)

    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        worker, model = joined(cluster)
        assert program(worker, model) == (list(range(6)), list(range(4)))
        die(worker)
        worker, model = joined(cluster)
        with worker:
            assert program(worker, model) == ([], list(range(4, 8)))


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_left_by_break_goes_on_for_the_next_worker_where_nothing_came_after_it(mode):
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        for expected in (list(range(6)), list(range(6, 12)), list(range(12, 18)), [18, 19]):
            worker, model = joined(cluster)
            with worker:
                batches = worker.batches(np.arange(20), 2, splits="static")
                assert read(worker, model, batches, most=6) == expected


def test_the_step_after_a_break_makes_the_last_batch_done():
    with hw.Cluster(workers=2, sync="async", deadline=30) as cluster:
        worker, model = joined(cluster)
        other, others = joined(cluster, 1)
        with other:
            with worker:
                for batch in worker.batches(np.arange(32), 2):
                    first = batch.tolist()
                    break
                step(worker, model)
            rest = read(other, others, other.batches(np.arange(32), 2))
            assert sorted(first + rest) == list(range(32))


@pytest.mark.parametrize("mode", MODES)
def test_close_ends_the_data_for_good(mode):
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        worker, model = joined(cluster)
        with worker:
            batches = worker.batches(np.arange(20), 2, splits="static")
            assert read(worker, model, batches, most=6) == list(range(6))
            batches.close()
            batches.close()
            assert next(batches, None) is None
        worker, model = joined(cluster)
        with worker:
            assert read(worker, model, worker.batches(np.arange(20), 2, splits="static")) == []


def test_what_is_closed_of_leased_splits_is_read_by_the_others_and_rounds_do_not_wait():
    with hw.Cluster(workers=2, sync="async", deadline=30) as cluster:
        worker, model = joined(cluster)
        other, others = joined(cluster, 1)
        with worker, other:
            batches = worker.batches(np.arange(32), 2)
            first = read(worker, model, batches, most=2)
            next(batches)  # no step is taken for this one
            batches.close()
            rest = read(other, others, other.batches(np.arange(32), 2))
            assert sorted(first + rest) == list(range(32))
    with hw.Cluster(workers=2, deadline=30) as cluster:
        worker, model = joined(cluster)
        other, others = joined(cluster, 1)
        with worker, other:
            batches = worker.batches(np.arange(8), 1)
            next(batches)
            batches.close()
            assert read(other, others, other.batches(np.arange(8), 1)) == [1, 3, 5, 7]


# ── the garbage collector ───────────────────────────────────────────────────────────────────────


class Trainer:
    """Refers to itself, so that only the collector ends it."""

    def __init__(self, worker, splits):
        self.itself, self.batches = self, worker.batches(np.arange(100), 4, splits=splits)


@pytest.mark.parametrize("splits", ["static", "dynamic"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in this thread", "in another thread"])
def test_what_is_collected_in_the_middle_of_an_exchange_sends_nothing(elsewhere, splits, monkeypatch):
    exchange, collected = clients.exchange, []

    def collecting(*arguments):
        if elsewhere:
            collector = threading.Thread(target=gc.collect)
            collector.start()
            collector.join(20)
        else:
            gc.collect()
        collected.append(True)
        return exchange(*arguments)

    monkeypatch.setattr(clients, "exchange", collecting)
    gc.disable()
    gc.freeze()  # a collection takes long where torch and JAX are loaded
    try:
        with hw.Cluster(workers=1, servers=2, sync="async", deadline=20) as cluster:
            worker, model = joined(cluster)
            with worker:
                for epoch in range(5):
                    trainer = Trainer(worker, splits)
                    next(trainer.batches)
                    del trainer
                    assert step(worker, model).version == epoch + 1
                    assert len(worker._feed._open) <= 1, "what was collected is closed with the next call"
                assert len(collected) > 5
    finally:
        gc.unfreeze()
        gc.enable()


# ── the class ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "batch", "epochs"), [(23, 3, 2), (24, 4, 1), (5, 4, 3), (40, 5, 2)])
def test_len_is_the_number_of_batches_that_come(size, batch, epochs, drop_last):
    def train(worker):
        batches = worker.batches(np.arange(size), batch, epochs=epochs, drop_last=drop_last)
        expected = len(batches)
        found = [one.tolist() for one in batches]
        assert expected == len(found) == len(batches)
        return found

    values = hw.run(train, workers=2, engine="inline", deadline=30).values
    if drop_last:
        assert {len(found) for found in values} == {epochs * (size // 2 // batch)}
        assert all(len(one) == batch for found in values for one in found)
    else:
        read = [sample for found in values for one in found for sample in one]
        assert sorted(read) == sorted(list(range(size)) * epochs)


def test_dropped_ends_of_leased_epochs_are_read_by_nobody_and_missed_by_nobody():
    def train(worker):
        found = [one.tolist() for one in worker.batches(np.arange(23), 4, epochs=2, drop_last=True)]
        assert all(len(one) == 4 for one in found)
        return len(found)

    result = hw.run(train, workers=2, engine="inline", sync="async", deadline=30)
    assert sum(result.values) == 2 * (23 // 4)
    assert result.statistics.unvisited == ()


def test_nobody_knows_how_many_leased_batches_come():
    with hw.Cluster(workers=1, sync="async") as cluster, cluster.worker() as worker:
        batches = worker.batches(np.arange(8), 2)
        with pytest.raises(TypeError, match="splits='static'"):
            len(batches)
        assert len(list(batches)) == 4


@pytest.mark.parametrize("mode", MODES)
def test_batches_that_are_iterated_over_again_are_read_again_as_the_next_call(mode):
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        worker, model = joined(cluster)
        with worker:
            loader = worker.batches(np.arange(7), 2)
            for _ in range(3):
                assert read(worker, model, loader) == list(range(7))
            assert worker._feed.begun == 3
