"""Real processes, killed at random while they train: the numbers stay exact."""

import functools
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
from noting import check, noting, stop
from waiting import wait_until

import headwater as hw
from headwater.checkpoint import list_checkpoints

WORKERS, SERVERS = 3, 2
SECONDS = 30
"""For which processes are killed with `--long`; otherwise until there was one of each kind that matters."""


class Chaos:
    """Kills processes of a cluster, one every now and then, and starts dead workers again."""

    def __init__(self, cluster, work, seed):
        self.cluster, self.work = cluster, work
        self.random = random.Random(seed)
        self.killed = Counter()
        self.pids = set()
        self.running = set(range(WORKERS))

    def go_on(self, seconds):
        """For so long, and until a server and a worker were killed and what was killed last is back."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds or not self._killed_enough():
            assert time.monotonic() < begin + seconds + 60, (self.killed, self.cluster.statistics())
            self._replace_dead_workers()
            self._kill_one()

    def _killed_enough(self):
        return self.killed["server"] and any(self.killed[rank] for rank in range(WORKERS))

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
        stop(folder)
        ended, deadline = set(), time.monotonic() + 60
        while len(ended) < WORKERS:
            assert time.monotonic() < deadline, self.cluster.statistics()
            outcome = self.cluster.next_outcome(1.0)
            if outcome is not None and outcome.failure is not None:
                assert outcome.failure.died, outcome.failure.trace
                self.cluster.start_worker(outcome.index, self.work)
            elif outcome is not None:
                ended.add(outcome.index)


def is_ready(statistics):
    return not statistics.unreplicated and statistics.version >= 10


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "mode",
    [
        "async",
        *(
            pytest.param(mode, marks=pytest.mark.long)
            for mode in ("sync", "ssp:2", "sync:quorum=2,grace=0.01")
        ),
    ],
)
def test_whoever_is_killed_no_step_is_lost_or_counted_twice(mode, tmp_path, long):
    work, seed = noting(tmp_path, WORKERS), random.randrange(2**32)
    print(f"seed {seed}")
    options = {"engine": "local", "replicas": 1, "patience": 5, "deadline": 60, "output": print}
    with hw.Cluster(workers=WORKERS, servers=SERVERS, sync=mode, **options) as cluster:
        chaos = Chaos(cluster, work, seed)
        for rank in range(WORKERS):
            cluster.start_worker(rank, work)
        wait_until(
            lambda: not cluster.statistics().unreplicated and cluster.statistics().version >= 10,
            watch=cluster,
        )
        chaos.go_on(SECONDS if long else 0)
        chaos.finish(tmp_path)
        _, parameters = cluster.parameters()
        steps = check(cluster.address, parameters, tmp_path, WORKERS, chaos.killed)
        print(f"{sum(steps.values())} steps, killed {dict(chaos.killed)}")


def train_until_killed(folder, worker):
    """Count together until the test has killed what it wants to kill, and a while longer.

    Returns the version and the sum with which the last training began, and the version at its end.
    """
    model = worker.model("sums", {"all": np.zeros(9000, np.float32)}, hw.Accumulate())
    began = worker.version, float(model.pull()["all"][0])
    left = 50
    while left:
        model.push({"all": np.ones(9000, np.float32)})
        worker.step()
        killed = worker.sum(killed=(folder / "killed").exists())["killed"]
        left -= killed == worker.workers
    return *began, worker.version


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.long)])
def test_a_shard_lost_with_all_its_copies_rewinds_everything_to_the_last_checkpoint(mode, tmp_path):
    killed, folder = [], tmp_path / "checkpoints"

    def kill_both(statistics):
        ready = statistics.version > 40 and not statistics.unreplicated and not killed
        copies = [n for n in statistics.nodes if n.role in ("server", "standby") and n.index == 1]
        if ready and len(copies) == 2 and list_checkpoints(folder):
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
        checkpoint=folder,
        every=20,
        watch=kill_both,
    )
    assert len(killed) == 2
    assert result.statistics.generation == 1
    in_a_version = 2 if mode == "sync" else 1
    assert (result.parameters["sums"]["all"] == result.version * in_a_version).all()
    assert "g001-" in result.checkpoint
    for version, total, last in result.values:
        assert 20 <= version < last, "it began from nothing, and not from a checkpoint"
        assert version * in_a_version <= total


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
