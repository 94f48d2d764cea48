"""What no call can use is refused by the call, by name, and the worker goes on as if it had not been made."""

import math
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater.errors import UsageError

HUGE, RAGGED, NO_TEXT = 10**400, [[1], [2, 3]], "\udc80"

CALLS = {
    "ragged ids": lambda worker, model, table: table.pull(RAGGED),
    "ids beyond int64": lambda worker, model, table: table.push([2**70], [[1.0]]),
    "ragged rows": lambda worker, model, table: table.push([1, 2], RAGGED),
    "no state": lambda worker, model, table: table.assign([1], [[1.0]], state=None),
    "a state that is a number": lambda worker, model, table: table.assign([1], [[1.0]], state=5),
    "a sum beyond float64": lambda worker, model, table: worker.sum(x=HUGE),
    "ragged arrays": lambda worker, model, table: worker.gather(x=RAGGED),
    "a text that is none": lambda worker, model, table: worker.broadcast(NO_TEXT),
    "a name that is no text": lambda worker, model, table: worker.broadcast({NO_TEXT: 1}),
    "kept text that is none": lambda worker, model, table: worker.keep(name=[NO_TEXT]),
    "a weight beyond float64": lambda worker, model, table: worker.step(weight=HUGE),
    "an infinite weight": lambda worker, model, table: worker.step(weight=math.inf),
    "a mapping of parts": lambda worker, model, table: next(worker.batches({"train": [1, 2]}, 1)),
    "too many samples": lambda worker, model, table: next(worker.splits(2**70)),
    "a model's name": lambda worker, model, table: worker.model(5, {"w": np.zeros(1)}, hw.SGD(lr=1.0)),
    "a rule's class": lambda worker, model, table: worker.model("n", {"w": np.zeros(1)}, hw.SGD),
    "a setting": lambda worker, model, table: model.set(lr=HUGE),
}


@pytest.fixture(scope="module")
def joined():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=30) as cluster, cluster.worker() as worker:
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        yield worker, model, worker.table("t", 1, hw.SGD(lr=1.0))


@pytest.mark.parametrize("what", CALLS)
def test_a_refused_call_changes_nothing(what, joined):
    worker, model, table = joined
    before, steps = model.pull()["w"].item(), worker.statistics().steps
    with pytest.raises(UsageError):
        CALLS[what](worker, model, table)
    assert worker.statistics().steps == steps
    model.push({"w": [1.0]})
    worker.step()
    assert model.pull()["w"].item() == before - 1
    assert len(table) == 0


def test_a_worker_that_another_thread_uses_is_refused_and_that_thread_goes_on():
    refused = threading.Event()

    def work(worker):
        if worker.rank:
            assert refused.wait(20)
            return worker.sum(x=1.0)["x"]
        found = []
        other = threading.Thread(target=lambda: found.append(worker.sum(x=1.0)["x"]))
        other.start()
        wait_until(lambda: worker._session.machine._exchange is not None)
        with pytest.raises(UsageError, match="a Worker is used by one thread at a time"):
            worker.barrier()
        refused.set()
        other.join(20)
        return found[0]

    assert hw.run(work, workers=2, engine="inline", patience=5, deadline=30).values == [2.0, 2.0]
