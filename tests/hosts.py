"""Clusters some of whose nodes are reached over TCP alone, as if they were on other machines."""

import contextlib
import os
import signal
import threading

import numpy as np
from waiting import wait_until

import headwater as hw
from headwater.engines import Launch
from headwater.engines.local import LocalEngine
from headwater.messages import Assignment
from headwater.runtime.coordinator import CoordinatorNode
from headwater.spec.cluster import ClusterConfig
from headwater.wire.endpoint import LOCAL, Endpoint

WAIT_S = 60.0

NEAR = LOCAL
"""Reached over a Unix socket, with shared memory."""


def far(security):
    """Reached over TCP alone."""
    return Endpoint("127.0.0.1", security=security, local=False)


def both(security):
    """Reached as whoever dials likes it best."""
    return Endpoint("127.0.0.1", security=security)


class Field:
    """A coordinator of this process, and servers in processes of their own, each with a reach of its own."""

    def __init__(self, security, *, workers=2, servers=3, sync="sync", replicas=0, lease=15.0):
        self.workers, self.servers, self.sync, self.replicas = workers, servers, sync, replicas
        self.security = security
        self.lines = []
        self._engine = LocalEngine(Launch(workers, output=self.lines.append, security=security))
        settings = ClusterConfig(
            workers=workers,
            servers=servers,
            sync=sync,
            patience=2.0,
            deadline=WAIT_S,
            lease=lease,
            replicas=replicas,
        )
        self.coordinator = CoordinatorNode(settings, reach=both(security))

    def start(self, index, reach, role="server"):
        """Start a server or standby; where others reach it, `reach` says."""
        assignment = Assignment(index, self.servers, self.sync, role, self.replicas, patience=5.0)
        reach = reach if reach is not NEAR else Endpoint(security=self.security)
        self._engine.start_server(self.coordinator.address, assignment, reach)

    def nodes(self, role):
        """As the coordinator shows them, by index."""
        return {node.index: node for node in self.coordinator.statistics().nodes if node.role == role}

    def wait_until(self, condition):
        """Look until it is true."""
        wait_until(condition, WAIT_S, lambda: self.lines)

    def kill(self, role, index):
        """As nobody wants it to end; returns once the coordinator knows."""
        pid = self.nodes(role)[index].pid
        os.kill(pid, signal.SIGKILL)
        self.wait_until(lambda: index not in self.nodes(role) or self.nodes(role)[index].pid != pid)

    def replicated(self):
        """Whether every server has a standby that could take over."""
        statistics = self.coordinator.statistics()
        return not statistics.unreplicated and len(self.nodes("server")) == self.servers

    def close(self):
        self.coordinator.close()
        self._engine.close()
        print(*self.lines, sep="\n")


@contextlib.contextmanager
def field(security, **options):
    made = Field(security, **options)
    try:
        yield made
    finally:
        made.close()


def in_threads(count, work):
    """Run `work(number)` that often at once; returns what each returned, and raises what one raised."""
    results, failures = {}, []

    def guarded(number):
        try:
            results[number] = work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


SHAPES = {"w": (3000,), "b": (7,), "v": (50, 90)}


def train(worker, steps=8):
    """Train a model and a table on numbers that depend on rank and step alone; returns all bytes of both."""
    random = np.random.default_rng(worker.rank)
    start = np.random.default_rng(99)
    values = {name: start.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    model = worker.model("net", values, hw.Adam(lr=0.01))
    table = worker.table("rows", 8, hw.Adagrad(lr=0.1), initializer=hw.Normal(std=0.1), seed=3)
    for step in range(steps):
        ids = random.integers(0, 400, 60)
        table.prefetch(ids)
        grads = table.pull(ids) * np.float32(0.5) + random.standard_normal((60, 8), dtype=np.float32)
        model.push({name: random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()})
        table.push(ids, grads)
        assert worker.step().version == step + 1
    worker.barrier()
    rows = table.pull(np.arange(400))
    return b"".join(array.tobytes() for array in (*model.pull().values(), rows))
