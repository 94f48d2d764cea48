"""Real processes, killed at random while they train: the numbers stay exact.

Every worker adds 1 to a tensor of its rank's, to one that spans all servers, and to rows of a table; it notes
each step once `step` has returned. What was noted must be there, and nothing else but, for each worker
killed, at most the one step that it could not note any more.
"""

import functools
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest

import headwater as hw

WORKERS, SERVERS = 4, 3
SHAPES = {"all": (9000,), **{f"rank{rank}": (3,) for rank in range(WORKERS)}}


def train(folder, worker):
    model = worker.model("sums", {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}, hw.Accumulate())
    table = worker.table("rows", 2, hw.Accumulate())
    own = f"rank{worker.rank}"
    ones = {name: np.ones(SHAPES[name], np.float32) for name in ("all", own)}
    ids = [-1, *range(100), 1000 + worker.rank]
    rows = np.ones((len(ids), 2), np.float32)
    with open(folder / f"{worker.rank}-{os.getpid()}", "ab", buffering=0) as noted:
        while not (folder / "stop").exists():
            model.push(ones)
            table.push(ids, rows)
            result = worker.step()
            assert result.applied
            noted.write(b".")


def noted(folder):
    """Steps noted by rank."""
    counts = Counter()
    for path in folder.glob("*-*"):
        counts[int(path.name.partition("-")[0])] += path.stat().st_size
    return counts


class Chaos:
    """Kills processes of a cluster, one every now and then, and starts dead workers again."""

    def __init__(self, cluster, work, seed):
        self.cluster, self.work = cluster, work
        self.random = random.Random(seed)
        self.killed = Counter()
        self.pids = set()
        self.running = set(range(WORKERS))

    def go_on(self, until):
        """Until monotonic time `until`, or for one look when that has passed."""
        while True:
            self._replace_dead_workers()
            self._kill_one()
            if time.monotonic() >= until:
                return

    def _replace_dead_workers(self):
        outcome = self.cluster.next_outcome(0.05)
        if outcome is not None:
            assert outcome.failure is not None, "a worker ended by itself"
            assert outcome.failure.died, outcome.failure.trace
            self.cluster.start_worker(outcome.index, self.work)

    def _kill_one(self):
        statistics = self.cluster.statistics()
        kinds = ["worker"] * 2 + ["server", "standby"] * (not statistics.unreplicated)
        kind = self.random.choice(kinds)
        if any(node.pid in self.pids for node in statistics.nodes):
            return  # the coordinator has not noticed yet: what looks replicated may be so no more
        nodes = [node for node in statistics.nodes if node.role == kind]
        if len(nodes) < (WORKERS if kind == "worker" else SERVERS) or statistics.version == 0:
            return  # what was killed last is not back yet
        node = self.random.choice(nodes)
        try:
            os.kill(node.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has just ended by itself
        self.pids.add(node.pid)
        self.killed[kind if kind != "worker" else node.rank] += 1

    def finish(self, folder):
        """Let all workers end by themselves."""
        (folder / "stop").touch()
        ended, deadline = set(), time.monotonic() + 60
        while len(ended) < WORKERS:
            assert time.monotonic() < deadline, self.cluster.statistics()
            outcome = self.cluster.next_outcome(1.0)
            if outcome is not None and outcome.failure is not None:
                assert outcome.failure.died, outcome.failure.trace
                self.cluster.start_worker(outcome.index, self.work)
            elif outcome is not None:
                ended.add(outcome.index)


def check(cluster, folder, killed):
    _, parameters = cluster.parameters()
    sums = {name: np.unique(values) for name, values in parameters["sums"].items()}
    assert all(len(values) == 1 for values in sums.values()), f"servers differ: {sums}"
    steps = {rank: int(sums[f"rank{rank}"][0]) for rank in range(WORKERS)}
    assert sums["all"][0] == sum(steps.values())
    counts = noted(folder)
    for rank in range(WORKERS):
        assert counts[rank] <= steps[rank] <= counts[rank] + killed[rank], (rank, counts, steps, killed)
    with hw.connect(cluster.address) as reader:
        table = reader.table("rows", 2, hw.Accumulate())
        assert (table.pull([-1, *range(100)]) == sum(steps.values())).all()
        assert table.pull([1000 + rank for rank in range(WORKERS)])[:, 0].tolist() == list(steps.values())
    return steps


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["sync", "async", "ssp:2"])
def test_whoever_is_killed_no_step_is_lost_or_counted_twice(mode, tmp_path, long):
    work = functools.partial(train, tmp_path)
    seconds, seed = (30 if long else 5), random.randrange(2**32)
    print(f"seed {seed}")
    options = {"engine": "local", "replicas": 1, "patience": 5, "deadline": 60, "output": print}
    with hw.Cluster(workers=WORKERS, servers=SERVERS, sync=mode, **options) as cluster:
        chaos = Chaos(cluster, work, seed)
        for rank in range(WORKERS):
            cluster.start_worker(rank, work)
        started = time.monotonic() + 60
        while cluster.statistics().unreplicated or cluster.statistics().version < 10:
            assert time.monotonic() < started, cluster.statistics()
            assert cluster.next_outcome(0.1) is None
        chaos.go_on(time.monotonic() + seconds)
        chaos.finish(tmp_path)
        steps = check(cluster, tmp_path, chaos.killed)
        print(f"{sum(steps.values())} steps, killed {dict(chaos.killed)}")
        assert sum(chaos.killed.values()) > 0


def train_until_killed(folder, worker):
    """Count together until the test has killed what it wants to kill, and a while longer."""
    model = worker.model("sums", {"all": np.zeros(9000, np.float32)}, hw.Accumulate())
    left = 50
    while left:
        model.push({"all": np.ones(9000, np.float32)})
        worker.step()
        killed = worker.sum(killed=(folder / "killed").exists())["killed"]
        left -= killed == worker.workers
    return worker.version


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_shard_lost_with_all_its_copies_rewinds_everything_to_the_last_checkpoint(mode, tmp_path):
    killed = []

    def kill_both(statistics):
        ready = statistics.version > 40 and not statistics.unreplicated and not killed
        copies = [n for n in statistics.nodes if n.role in ("server", "standby") and n.index == 1]
        if ready and len(copies) == 2:
            killed.extend(node.pid for node in copies)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            (tmp_path / "killed").touch()

    result = hw.run(
        functools.partial(train_until_killed, tmp_path),
        workers=2,
        servers=2,
        sync=mode,
        replicas=1,
        checkpoint=tmp_path / "checkpoints",
        every=20,
        watch=kill_both,
    )
    assert len(killed) == 2
    assert result.statistics.generation == 1
    steps = result.version * (2 if mode == "sync" else 1)
    assert (result.parameters["sums"]["all"] == steps).all()
    assert "g001-" in result.checkpoint


def leave_early(folder, worker):
    """Rank 1 has soon done its work; the other goes on until a server was killed, and a while longer."""
    model = worker.model("sums", {"all": np.zeros(5000, np.float32)}, hw.Accumulate())
    left = 10
    while left:
        model.push({"all": np.ones(5000)})
        worker.step()
        left -= worker.rank == 1 or (folder / "killed").exists()
    return worker.generation


def test_a_worker_that_had_finished_is_started_again_when_everything_begins_anew(tmp_path):
    def kill_server(statistics):
        finished = {node.rank for node in statistics.nodes if node.role == "worker"} == {0}
        servers = [node.pid for node in statistics.nodes if node.role == "server"]
        if statistics.version > 20 and finished and servers and not (tmp_path / "killed").exists():
            os.kill(servers[0], signal.SIGKILL)
            (tmp_path / "killed").touch()

    result = hw.run(
        functools.partial(leave_early, tmp_path),
        workers=2,
        servers=2,
        checkpoint=tmp_path / "checkpoints",
        every=5,
        watch=kill_server,
        patience=5,
        deadline=60,
    )
    assert result.values == [1, 1]
    assert result.statistics.generation == 1
