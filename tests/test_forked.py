"""A forked child of a process with a worker: it has none of its connections, and is told what to do."""

import os
import pickle

import numpy as np
import pytest

import headwater as hw
from headwater.errors import UsageError


def in_child(body):
    """What `body` returns in a forked child, or the error that it raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome = body()
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told
            outcome = type(error).__name__, str(error)
        os.write(writing, pickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return outcome


def sockets():
    """The sockets and shared files that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:")):
            found.append(target)
    return found


@pytest.fixture(scope="module")
def before():
    return set(sockets())


@pytest.fixture
def cluster(before):
    with hw.Cluster(workers=1, servers=2, sync="async", deadline=20) as cluster:
        yield cluster


@pytest.fixture
def worker(cluster):
    with cluster.worker() as worker:
        yield worker


def test_a_forked_child_has_no_descriptor_of_its_parent_s_worker(worker, before):
    worker.model("m", {"w": np.zeros(4, np.float32)}, hw.SGD(lr=1.0))
    worker.table("t", 2, hw.SGD(lr=1.0)).pull([1, 2])
    assert set(sockets()) - before
    assert set(in_child(sockets)) <= before
    assert worker.step().version == 1


def verbs():
    yield "model", lambda w, m, t: w.model("n", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
    yield "table", lambda w, m, t: w.table("u", 2, hw.SGD(lr=1.0))
    yield "step", lambda w, m, t: w.step()
    yield "pull", lambda w, m, t: m.pull()
    yield "push", lambda w, m, t: m.push({"w": np.ones(4)})
    yield "assign", lambda w, m, t: m.assign({"w": np.ones(4)})
    yield "pull", lambda w, m, t: t.pull([1])
    yield "push", lambda w, m, t: t.push([1], np.ones((1, 2)))
    yield "delete", lambda w, m, t: t.delete([1])
    yield "barrier", lambda w, m, t: w.barrier()
    yield "sum", lambda w, m, t: w.sum(x=1)
    yield "batches", lambda w, m, t: next(iter(w.batches(np.arange(4), 2)))
    yield "stop", lambda w, m, t: w.stop()


def test_every_call_in_a_forked_child_is_refused_with_what_to_do_and_the_parent_goes_on(worker):
    model = worker.model("m", {"w": np.zeros(4, np.float32)}, hw.Accumulate())
    table = worker.table("t", 2, hw.Accumulate())
    model.push({"w": np.ones(4)})

    def body():
        said = []
        for _, call in verbs():
            try:
                said.append(("worked", call(worker, model, table)))
            except UsageError as error:
                said.append((type(error).__name__, str(error)))
        return said

    for (verb, _), (kind, text) in zip(verbs(), in_child(body), strict=True):
        assert kind == "UsageError", text
        assert f"{verb}: worker 0 belongs to process {os.getpid()}" in text, text
        assert "hw.connect" in text
    assert worker.step().version == 1
    assert (model.pull()["w"] == 1).all()


def test_the_end_of_a_forked_child_ends_nothing_of_its_parent_s(worker, cluster):
    def body():
        with worker:
            pass
        worker.leave()
        worker.finish()
        cluster.close()
        with cluster:
            pass
        return "left"

    assert in_child(body) == "left"
    assert worker.step().version == 1
    assert cluster.statistics().nodes


def test_a_cluster_is_refused_in_a_forked_child_with_what_to_do(cluster):
    for call in (cluster.worker, cluster.statistics, cluster.parameters, cluster.verify):
        kind, text = in_child(call)
        assert kind == "UsageError"
        assert f"belongs to process {os.getpid()}" in text
        assert "hw.connect(address)" in text


def test_a_forked_child_joins_with_a_worker_of_its_own(worker, cluster):
    address = cluster.address

    def body():
        with hw.connect(address) as own:
            return own.rank, own.step().version

    assert in_child(body) == (1, 1)
    assert worker.step().version == 2
