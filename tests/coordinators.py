"""Coordinators in processes of their own, which tests kill and start again, and what trains meanwhile."""

import contextlib
import json
import queue
import secrets
import signal
import subprocess
from pathlib import Path

import numpy as np
from checkpoints import python
from waiting import wait_until

import headwater as hw
from headwater.engines import Launch
from headwater.engines.local import LocalEngine
from headwater.messages import Ask, Assignment
from headwater.wire.endpoint import LOCAL, Endpoint
from headwater.wire.listener import dial

ALONE = """
import json, sys
from headwater.spec.cluster import ClusterConfig
from headwater.runtime.coordinator import CoordinatorNode
from headwater.wire.endpoint import Endpoint

settings, journal, reach = json.loads(sys.argv[1])
node = CoordinatorNode(ClusterConfig(**settings), journal=journal, reach=Endpoint(**reach))
print(node.address, flush=True)
sys.stdin.read()
node.close()
"""


def asked(address):
    """The statistics of a node."""
    with contextlib.closing(dial(address, timeout=20)) as channel:
        channel.send(Ask(), timeout=20)
        return channel.receive(timeout=20).message


class Coordinator:
    """A process that `kill` ends as nobody wants it to, and `start` begins again on the same journal."""

    def __init__(self, folder, settings, bind):
        self.journal = str(Path(folder) / "journal.db")
        self._settings = settings
        self._reach = {"bind": bind, "local": bind.startswith("unix:")}
        self._process = None
        self.address = ""
        self.start()

    def start(self):
        start = json.dumps([self._settings, self.journal, self._reach])
        self._process = python(ALONE, start, stdin=subprocess.PIPE)
        self.address = self._process.stdout.readline().strip()
        assert self.address, self._process.communicate(timeout=20)[1]
        self._reach["bind"] = self.address.removeprefix("tcp:")

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=20)

    def close(self):
        """End the cluster."""
        with contextlib.suppress(ValueError):  # it was killed, and its pipes are closed
            self._process.communicate("", timeout=30)
        assert self._process.returncode in (0, -signal.SIGKILL)

    def statistics(self):
        return asked(self.address)

    def nodes(self, *roles):
        return [node for node in self.statistics().nodes if node.role in roles]

    def roster(self):
        """Term, and who is there as which process; None while somebody has not come back."""
        statistics = self.statistics()
        nodes = [node for node in statistics.nodes if node.role != "coordinator"]
        if any("has not come back" in (node.waits_for or "") for node in nodes):
            return None
        return statistics.term, [(node.role, node.index, node.rank, node.pid) for node in nodes]


class Field:
    """A coordinator, and servers and workers that are processes of this one: they outlive it."""

    def __init__(self, folder, bind, *, workers=2, servers=2, sync="sync", replicas=0, lease=15.0):
        settings = {
            "workers": workers,
            "servers": servers,
            "sync": sync,
            "patience": 0.5,
            "deadline": 90.0,
            "lease": lease,
            "replicas": replicas,
        }
        self.workers = workers
        self.lines = []
        self._ended = queue.SimpleQueue()
        self.coordinator = Coordinator(folder, settings, bind)
        reach = LOCAL if bind.startswith("unix:") else Endpoint(bind, local=False)
        self._engine = LocalEngine(Launch(workers, output=self.lines.append))
        for role in ("server", *["standby"] * replicas):
            for index in range(servers):
                assignment = Assignment(index, servers, sync, role, replicas, patience=5.0)
                self._engine.start_server(self.coordinator.address, assignment, reach)

    def train(self, work):
        for rank in range(self.workers):
            self._engine.start_worker(self.coordinator.address, rank, work)

    def version(self, server=0):
        """As that server says, whether there is a coordinator or not."""
        return asked(self._servers[server].address).version

    def know_servers(self):
        """Look up once where servers are."""
        self._servers = sorted(self.coordinator.nodes("server"), key=lambda node: node.index)

    def started(self, more=10):
        """Block until training is well under way."""
        wait_until(lambda: self.coordinator.statistics().version > more)
        self.know_servers()

    def goes_on(self, more=20):
        before = self.version()
        wait_until(lambda: self.version() > before + more)

    def says(self, *words):
        """Whether a node has printed a line with all of these."""
        return any(all(word in line for word in words) for line in list(self.lines))

    def values(self):
        """What every worker returned, by rank."""
        outcomes = []
        while len(outcomes) < self.workers:
            outcome = self._engine.next_outcome(60)
            assert outcome is not None, "a worker never ended"
            if outcome.role == "worker":
                assert outcome.failure is None, outcome.failure.trace
                outcomes.append(outcome)
        return {outcome.index: outcome.value for outcome in outcomes}

    def close(self):
        self._engine.close()
        self.coordinator.close()
        print(*self.lines, sep="\n")


@contextlib.contextmanager
def field(folder, kind="unix", **options):
    bind = "127.0.0.1" if kind == "tcp" else f"unix:@headwater-{secrets.token_hex(8)}"
    made = Field(folder, bind, **options)
    try:
        yield made
    finally:
        made.close()


SHAPE = (9000,)


def count_until_stop(folder, worker):
    """Add rank + 1 with every step until there is a file `stop`; returns the number of steps."""
    model = worker.model("sums", {"a": np.zeros(SHAPE, np.float32)}, hw.Accumulate())
    ones, steps = {"a": np.full(SHAPE, worker.rank + 1, np.float32)}, 0
    while not (folder / "stop").exists():
        model.push(ones)
        worker.step()
        steps += 1
    return steps
