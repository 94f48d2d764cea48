"""Connections are cut while everybody lives: members connect anew and repeat; no step is lost or doubled."""

import os
import random
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from connections import TOKEN
from members import cut_from_coordinator

import headwater as hw
from headwater.runtime import dialling

SHAPES = {"a": (9000,), "b": (5,)}


class Cutter:
    """Cuts one of the sockets that `choose` gives, again and again, until its block ends."""

    def __init__(self, choose, seed=0):
        self._choose = choose
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.cuts = 0

    def _run(self):
        while not self._over.wait(self._random.random() * 0.02):
            channels = self._choose()
            if channels:
                try:
                    self._random.choice(channels)._stream.shutdown(socket.SHUT_RDWR)
                    self.cuts += 1
                except OSError:
                    pass  # it is closed already

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()


def steps_with_cuts(mode, steps, *, seconds=30.0, choose_of=None, **options):
    """Count `steps` steps of each of two workers while connections are cut; returns cluster results."""
    sessions, results = [], {}
    ready = threading.Barrier(3)

    def work(cluster):
        with cluster.worker() as worker:
            model = worker.model(
                "sums", {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}, hw.Accumulate()
            )
            table = worker.table("rows", 2, hw.Accumulate())
            sessions.append(worker._session)
            ready.wait(10)
            versions = []
            for step in range(1, steps + 1):
                model.push(
                    {name: np.full(shape, worker.rank + 1, np.float32) for name, shape in SHAPES.items()}
                )
                table.prefetch([1, 2])
                table.push([1, 2, 1], np.ones((3, 2), np.float32))
                result = worker.step()
                assert result.applied
                versions.append(result.version)
                if step % 10 == 0:
                    assert (table.pull([2]) >= step).all()
                    assert worker.sum(one=1.0) == {"one": 2.0}
            worker.barrier()
            rows = table.pull([[1], [2]])  # not the ids that were asked for ahead
            results[worker.rank] = (versions, model.pull(copy=True), rows[:, 0])

    with hw.Cluster(workers=2, servers=2, sync=mode, patience=5, deadline=seconds, **options) as cluster:
        threads = [threading.Thread(target=work, args=(cluster,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        ready.wait(20)
        choose = choose_of(cluster) if choose_of else lambda: [c for s in sessions for c in s.channels]
        with Cutter(choose) as cutter:
            for thread in threads:
                thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert cutter.cuts > 0
    return results


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("mode", ["sync", "async", "ssp:1"])
def test_steps_count_once_however_often_connections_to_servers_are_cut(mode, transport):
    steps = 60
    results = steps_with_cuts(mode, steps, transport=transport)
    for versions, values, rows in results.values():
        assert all((array == steps * 3).all() for array in values.values())
        assert rows.tolist() == [[steps * 4] * 2, [steps * 2] * 2]
        assert versions == sorted(set(versions))  # each its own step, none answered twice
    if mode == "sync":
        assert all(versions == list(range(1, steps + 1)) for versions, _, _ in results.values())


@pytest.fixture
def kinds(monkeypatch):
    """Every connection is over a Unix socket or over TCP, as it happens; returns how often each was."""
    counts, chance, known = Counter(), random.Random(5), dialling.reachable

    def either(member):
        addresses = known(member)
        chance.shuffle(addresses)
        counts[addresses[0].partition(":")[0]] += 1
        return addresses

    monkeypatch.setattr(dialling, "reachable", either)
    return counts


BEYOND = {"bind": "127.0.0.1", "token": TOKEN}


@pytest.mark.parametrize("mode", ["sync", "async", "ssp:1"])
def test_steps_count_once_though_each_new_connection_may_share_memory_or_not(mode, kinds):
    results = steps_with_cuts(mode, 60, **BEYOND)
    for _, values, rows in results.values():
        assert all((array == 180).all() for array in values.values())
        assert rows.tolist() == [[240, 240], [120, 120]]
    assert kinds["unix"] > 5
    assert kinds["tcp"] > 5


def test_values_are_assigned_as_they_were_given_though_connections_are_cut_and_change(kinds):
    def full(value):
        return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}

    cluster = hw.Cluster(workers=1, servers=2, patience=5, deadline=30, **BEYOND)
    with cluster, cluster.worker() as worker:
        model = worker.model("m", full(0), hw.SGD(lr=1))
        with Cutter(lambda: worker._session.channels) as cutter:
            for turn in range(150):
                model.push(full(1 + turn))
                model.assign(full(turn))
                assert all((array == turn).all() for array in model.pull(copy=True).values())
                worker.step()
                assert all((array == -1).all() for array in model.pull().values())
        assert cutter.cuts > 5
    assert kinds["unix"] > 2
    assert kinds["tcp"] > 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_log_goes_on_when_the_connection_between_servers_is_cut(mode):
    def link(cluster):
        second = cluster._engine._servers[1]
        return lambda: [c for c in [second.pump.channel(second.machine.log.conn)] if c is not None]

    results = steps_with_cuts(mode, 60, choose_of=link)
    for _, values, rows in results.values():
        assert all((array == 180).all() for array in values.values())
        assert rows.tolist() == [[240, 240], [120, 120]]


def test_a_standby_whose_connection_is_cut_is_replaced_and_training_goes_on():
    def link(cluster):
        def choose():
            links = [(server, server.machine.standby) for server in cluster._engine._servers]
            found = [server.pump.channel(link.conn) for server, link in links if link is not None]
            return [channel for channel in found if channel is not None]

        return choose

    results = steps_with_cuts("sync", 40, choose_of=link, replicas=1, seconds=60.0)
    for _, values, _ in results.values():
        assert all((array == 120).all() for array in values.values())


def step_until_it_fails(worker, model):
    until = time.monotonic() + 10
    while time.monotonic() < until:
        model.push({"a": np.ones(3)})
        worker.step()


def test_a_worker_whose_connection_to_the_coordinator_is_lost_goes_on_until_it_is_declared_dead():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=20) as cluster:
        worker = cluster.worker()
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        cut_from_coordinator(worker)
        try:
            with pytest.raises(hw.errors.HeadwaterError, match=r"gone|retired|declared dead|no member"):
                step_until_it_fails(worker, model)
        finally:
            worker.leave()
        with cluster.worker() as other:
            values = other.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate()).pull()["a"]
            assert (values == values[0]).all()


def test_a_pending_wait_ends_when_its_worker_is_declared_dead():
    failures = []

    def wait_for_the_other(worker):
        try:
            worker.barrier()
        except hw.errors.HeadwaterError as error:
            failures.append(error)

    with hw.Cluster(workers=2, servers=2, patience=5, deadline=60) as cluster:
        first, second = cluster.worker(), cluster.worker()
        waiting = threading.Thread(target=wait_for_the_other, args=(first,))
        waiting.start()
        until = time.monotonic() + 30
        while not any(node.waits_for for node in cluster.statistics().nodes if node.rank == 0):
            assert time.monotonic() < until
        cut_from_coordinator(first)
        waiting.join(30)
        assert "declared dead" in str(failures[0])
        first.leave()
        second.leave()


def test_a_member_that_connects_anew_goes_on_in_other_memory_with_the_same_content():
    """A server that was taken for dead may still write to what it was given."""
    cluster = hw.Cluster(workers=1, servers=2, sync="async", patience=5, deadline=20)
    with cluster, cluster.worker() as worker:
        model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
        table = worker.table("rows", 2, hw.Accumulate())
        values, memories = model.parameters["a"], set()
        for step in range(1, 4):
            model.push({"a": np.ones(3)})
            table.push([1, 2], np.ones((2, 2), np.float32))
            worker._session.channels[0]._stream.shutdown(socket.SHUT_RDWR)
            worker.step()
            own = model.local.buffer.memory, worker._rows._scratch
            memories |= {os.fstat(one.descriptors[0]).st_ino for one in own}
            assert len(memories) == 2 * step
            assert (values == step).all(), "the user's arrays are where they were"
            assert (table.pull([1, 2]) == step).all()
