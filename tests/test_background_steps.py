"""Steps that are sent while their worker goes on computing: what holds, and what is refused meanwhile."""

import contextlib
import threading

import numpy as np
import pytest

import headwater as hw
from headwater.errors import ConfigurationError, UsageError

ENGINES = ["inline", "local"]


def run(train, **options):
    return hw.run(train, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


def test_until_a_step_is_answered_nothing_that_the_servers_use_is_touched():
    others = threading.Event()

    def work(worker):
        model = worker.model("net", {"w": np.zeros(2, np.float32)}, hw.SGD(lr=1.0))
        table = worker.table("rows", 1, hw.SGD(lr=1.0))
        model.push({"w": [1.0, 2.0]})
        table.push([5], [[2.0]])
        if worker.rank == 1:
            assert others.wait(30)
            return worker.step().version
        pending = worker.begin_step()
        assert not pending.done
        with pytest.raises(TimeoutError, match=r"step 1 has no answer after 0\.05 s"):
            pending.result(timeout=0.05)
        touching = [
            lambda: model.push({"w": [1.0, 1.0]}),
            lambda: model.pull(),
            lambda: model.assign({"w": [1.0, 1.0]}),
            lambda: table.push([1], [[1.0]]),
            lambda: table.pull([5]),
            lambda: table.prefetch([5]),
            worker.step,
            worker.begin_step,
            worker.barrier,
        ]
        for touch in touching:
            with pytest.raises(UsageError, match=r"step 1 is under way.*take the result\(\)"):
                touch()
        worker.log(loss=1.0)
        others.set()
        result = pending.result(timeout=30)
        assert pending.done
        assert pending.result() is result
        assert (result.applied, result.contributors, worker.steps) == (True, 2, 1)
        assert model.pull()["w"].tolist() == [-1.0, -2.0]
        assert table.pull([5]).tolist() == [[-2.0]]
        return result.version

    assert len(set(run(work, workers=2, servers=2).values)) == 1


@pytest.mark.parametrize("sync", ["sync", "async", "ssp:1"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_steps_in_the_background_count_once(engine, transport, sync):
    def work(worker):
        model = worker.model("counts", {"n": np.zeros((2, 5000), np.float32)}, hw.Accumulate())
        pending = None
        for _ in range(20):
            if pending is not None:
                assert pending.result(timeout=30).applied
                assert pending.done
            gradient = np.zeros((2, 5000), np.float32)
            gradient[worker.rank] = 1
            model.push({"n": gradient})
            pending = worker.begin_step()
        while not pending.done:
            pass
        pending.result()
        worker.barrier()
        return model.pull(copy=True)["n"][:, ::999].tolist()

    result = run(work, workers=2, servers=2, engine=engine, transport=transport, sync=sync)
    assert result.values == [[[20.0] * 6] * 2] * 2


@pytest.mark.parametrize("splits", ["static", "dynamic"])
def test_data_is_read_on_meanwhile_and_each_sample_counts_once(splits):
    samples = np.arange(1, 41, dtype=np.float32)

    def work(worker):
        model = worker.model("sum", {"s": np.zeros(1, np.float32)}, hw.Accumulate())
        pending = None
        for batch in worker.batches(samples, 3, splits=splits):
            if pending is not None:
                pending.result()
            model.push({"s": [batch.sum()]})
            pending = worker.begin_step()
        if pending is not None:  # the end of the data has waited for it
            assert pending.done
            pending.result()
        worker.barrier()
        return float(model.pull()["s"][0])

    assert run(work, workers=2, sync="async").values == [820.0] * 2


def test_leaving_takes_what_is_under_way():
    def work(worker):
        model = worker.model("net", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        model.push({"w": [1.0]})
        worker.begin_step()

    assert run(work, workers=1).parameters["net"]["w"].tolist() == [-1.0]


def test_an_impossible_weight_begins_nothing():
    def work(worker):
        with pytest.raises(ConfigurationError, match="weight"):
            worker.begin_step(weight=-1)
        return worker.step().version

    assert run(work, workers=1).values == [1]


def test_a_pending_step_of_a_cluster_that_is_closed_fails():
    cluster = hw.Cluster(workers=2, deadline=30)
    workers = [cluster.worker() for _ in range(2)]
    pending = workers[0].begin_step()
    cluster.close()
    with pytest.raises(hw.errors.HeadwaterError):
        pending.result(timeout=30)
    with pytest.raises(hw.errors.ClosedError):
        pending.result()
    with pytest.raises(hw.errors.ClosedError):
        workers[0].step()
    for worker in workers:
        with contextlib.suppress(hw.errors.HeadwaterError):  # the other one hears of the end only now
            worker.leave()


def test_what_is_kept_while_a_step_is_under_way_belongs_to_the_next():
    def work(worker):
        worker.keep(at=0)
        pending = worker.begin_step()
        worker.keep(at=1)
        pending.result()
        assert worker.kept == {"at": 1}
        assert worker._program.unsent() is not None, "the log knows of the first alone"
        worker.step()
        assert worker._program.unsent() is None

    run(work, workers=1)
