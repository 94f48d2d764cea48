"""What no call can use is refused by the call, by name, and the worker goes on as if it had not been made."""

import math
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater import messages as m
from headwater.cluster import NodeConfig
from headwater.errors import CheckpointError, UsageError
from headwater.spec.amounts import real, text, whole

HUGE, RAGGED, NO_TEXT = 10**400, [[1], [2, 3]], "\udc80"
W, SGD = {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0)

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
    "a group that is none": lambda worker, model, table: model.set(group=-0.5, lr=1.0),
    "no groups": lambda worker, model, table: worker.model("n", W, SGD, groups=None),
    "no aliases": lambda worker, model, table: worker.model("n", W, SGD, aliases=["w"]),
    "an outer that is no yes or no": lambda worker, model, table: worker.model("n", W, SGD, outer=None),
    "an array as a merge": lambda worker, model, table: worker.model("n", W, SGD, merge=np.ones(2)),
    "an array as a choice": lambda worker, model, table: worker.sum(x=1.0, of=np.ones(2)),
    "a norm beyond float64": lambda worker, model, table: worker.model("n", W, SGD, clip_norm=HUGE),
    "a text as data": lambda worker, model, table: next(worker.batches(np.str_("abc"), 1)),
    "a scalar as data": lambda worker, model, table: next(worker.batches(np.float32(1), 1)),
    "a copy that is no yes or no": lambda worker, model, table: model.pull(copy=np.ones(2)),
    "a state that is no dict": lambda worker, model, table: model.load_state(3),
    "states that are no dicts": lambda worker, model, table: model.load_state({"w": 3}),
    "an array as a state": lambda worker, model, table: table.assign([1], [[1.0]], state=np.ones(2)),
    "a vector's name": lambda worker, model, table: model.vectors.create(NO_TEXT),
    "an array as a vector's name": lambda worker, model, table: model.vectors.copy(np.ones(2), "v"),
    "a vector's value": lambda worker, model, table: model.vectors.create("v", value=HUGE),
    "no pairs": lambda worker, model, table: model.vectors.dots([1]),
    "no combinations": lambda worker, model, table: model.vectors.combine_all(None),
    "operations that are none": lambda worker, model, table: model.vectors.run(["fill"]),
    "what no message has": lambda worker, model, table: worker._session.ask(
        lambda number: m.CountRows(number, "t"), "count"
    ),
}

WELCOME = {
    "dim and seed": lambda worker: worker.table("numpy", np.int64(2), SGD, seed=np.int32(1)).dim == 2,
    "a name": lambda worker: worker.model(np.str_("numpy"), {np.str_("w"): W["w"]}, SGD).name == "numpy",
    "a norm": lambda worker: worker.model("clipped", W, SGD, clip_norm=np.float32(2)).name == "clipped",
    "a group": lambda worker: worker.models["m"].set(group=np.int64(0), lr=np.float32(1.0)) is None,
    "epochs": lambda worker: list(worker.epochs(np.int64(2))) == [0, 1],
    "a root": lambda worker: worker.broadcast(7, root=np.int64(0)) == 7,
    "a batch": lambda worker: list(worker.table("scanned", 1, SGD).scan(np.int64(5))) == [],
}
"""What NumPy makes of numbers and texts is as good as Python's."""


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


def test_what_numpy_makes_of_a_number_is_one():
    def train(worker):
        worker.model("m", W, SGD)
        return {what: call(worker) for what, call in WELCOME.items()}

    (found,) = hw.run(train, workers=1, engine="inline", patience=5, deadline=30).values
    assert found == dict.fromkeys(WELCOME, True)


def test_whatever_a_refused_value_is_the_error_is_short():
    class Loud:
        def __repr__(self):
            raise RuntimeError("no text")

    for value in (10**5000, Loud(), "x" * 10**6, np.ones((100, 100)), [Loud()]):
        for call in (lambda v: whole("n", v), lambda v: real("n", v), lambda v: text("n", [v])):
            with pytest.raises(UsageError) as raised:
                call(value)
            assert len(str(raised.value)) < 300


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


ODD = {"an array": np.ones((2, 2)), "bytes": b"x", "nothing": None, "a number": 1.5, "an object": object()}
MADE_WITH_TEXTS = {
    "a transport": lambda odd: NodeConfig(transport=odd),
    "a loss of servers": lambda odd: hw.Cluster(workers=1, on_server_loss=1 if odd is None else odd),
    "a reduction": lambda odd: hw.Synchronous(reduce=odd),
    "names of a group": lambda odd: hw.Group(names=odd, rule=SGD),
    "a delimiter": lambda odd: hw.Csv(delimiter=odd),
    "paths": lambda odd: hw.Files(odd, hw.Csv()),
    "a format": lambda odd: hw.Files("x.csv", odd),
    "a file of lines": lambda odd: hw.sinks.Jsonl(odd),
    "a directory": lambda odd: hw.data.Tail(odd),
    "a checkpoint": hw.load_checkpoint,
    "weights": hw.load_weights,
    "an address": hw.connect,
    "a line search": lambda odd: hw.LBFGS(line_search_fn=1 if odd is None else odd),
    "an address of Ray": lambda odd: hw.RayEngine(address=1 if odd is None else odd),
    "resources of Ray": lambda odd: hw.RayEngine(server_resources=odd),
    "a time of Ray": lambda odd: hw.RayEngine(timeout=math.nan if isinstance(odd, float) else odd),
    "parameters": lambda odd: hw.minimize(lambda params, batch: 0, odd, data=[1], portions=1, workers=1),
    "models to follow": lambda odd: hw.follow("unix:@nobody", 1 if odd is None else odd),
    "a type to follow": lambda odd: hw.follow("unix:@nobody", dtype=odd),
    "a trace": lambda odd: NodeConfig(trace=1 if odd is None else odd),
}
"""What takes texts, paths and the like, given something else."""


@pytest.mark.parametrize("what", MADE_WITH_TEXTS)
def test_what_is_no_text_or_path_is_refused_where_it_is_given(what):
    for odd in ODD.values():
        with pytest.raises(UsageError):
            MADE_WITH_TEXTS[what](odd)


def test_paths_and_names_that_no_system_has_are_refused(tmp_path):
    with pytest.raises(UsageError, match="zero byte"):
        hw.load_checkpoint("a\0b")
    with pytest.raises(CheckpointError, match="too long"):
        hw.load_checkpoint(tmp_path / ("x" * 5000))
    with pytest.raises(UsageError, match="bind"):
        hw.Cluster(workers=1, bind="x" * 100 + ":0")
