"""The coordinator is killed and starts again while real processes train: no step is lost."""

import functools
import os
import signal

import numpy as np
import pytest
from coordinators import count_until_stop, field
from noting import check, noting, stop
from waiting import wait_until

import headwater as hw
from headwater.worker.reader import read_parameters


def finish(cluster, folder):
    """Let the workers end; what they returned by rank, and the version and the distinct sums at the end."""
    (folder / "stop").touch()
    steps = cluster.values()
    version, parameters = read_parameters(cluster.coordinator.address)
    return steps, version, np.unique(parameters["sums"]["a"]).tolist()


def told_by(coordinator):
    """Ids of both workers, once both have told of their progress."""
    told = [progress.member for progress in coordinator.statistics().progress]
    return told if len(told) == 2 else None


def total(steps):
    return float(sum((rank + 1) * taken for rank, taken in steps.items()))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("sync", "unix"),
        ("ssp:2", "tcp"),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("async", "unix"), ("sync", "tcp"))),
    ],
)
def test_training_goes_on_without_a_coordinator_and_the_next_one_has_the_same_roster(mode, kind, tmp_path):
    with field(tmp_path, kind, sync=mode) as cluster:
        cluster.train(functools.partial(count_until_stop, tmp_path))
        cluster.started()
        coordinator = cluster.coordinator
        before = coordinator.roster()
        ids = wait_until(lambda: told_by(coordinator))
        assert len(before[1]) == 4
        for _ in range(2):
            coordinator.kill()
            cluster.goes_on()
            coordinator.start()
            assert wait_until(coordinator.roster) == before
            cluster.goes_on()
        assert wait_until(lambda: told_by(coordinator)) == ids
        steps, version, sums = finish(cluster, tmp_path)
        assert sums == [total(steps)]
        assert version == (max(steps.values()) if mode == "sync" else sum(steps.values()))


# ── what happens to others while it is away ─────────────────────────────────────────────────────


@pytest.mark.parametrize(("mode", "index"), [("sync", 0), ("async", 1)])
def test_a_server_that_dies_meanwhile_is_replaced_after_the_restart(mode, index, tmp_path):
    with field(tmp_path, sync=mode, replicas=1) as cluster:
        cluster.train(functools.partial(count_until_stop, tmp_path))
        coordinator = cluster.coordinator
        cluster.started()
        wait_until(lambda: coordinator.statistics().unreplicated == ())
        term, _ = coordinator.roster()
        heir = next(node for node in coordinator.nodes("standby") if node.index == index)
        victim = next(node for node in coordinator.nodes("server") if node.index == index)
        coordinator.kill()
        cluster.goes_on()
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: cluster.says("[worker 0]", "cannot connect", "the coordinator at", "is away"))
        coordinator.start()
        wait_until(lambda: heir.pid in [node.pid for node in coordinator.nodes("server")])
        cluster.know_servers()
        cluster.goes_on()
        assert wait_until(coordinator.roster)[0] > term
        steps, _, sums = finish(cluster, tmp_path)
        assert sums == [total(steps)]


def test_a_standby_that_dies_meanwhile_holds_up_commits_until_the_restart_and_no_longer(tmp_path):
    with field(tmp_path, replicas=1, servers=1) as cluster:
        cluster.train(functools.partial(count_until_stop, tmp_path))
        coordinator = cluster.coordinator
        cluster.started()
        wait_until(lambda: coordinator.statistics().unreplicated == ())
        (standby,) = coordinator.nodes("standby")
        coordinator.kill()
        os.kill(standby.pid, signal.SIGKILL)
        wait_until(lambda: cluster.says("[worker 1]", "the coordinator at", "is away"))
        coordinator.start()
        cluster.goes_on()
        assert coordinator.statistics().unreplicated == (0,)
        steps, _, sums = finish(cluster, tmp_path)
        assert sums == [total(steps)]


def test_a_worker_that_dies_meanwhile_is_retired_when_its_lease_after_the_restart_ends(tmp_path):
    with field(tmp_path, lease=3.0) as cluster:
        cluster.train(noting(tmp_path, 2))
        cluster.started()
        coordinator = cluster.coordinator
        victim = next(node for node in coordinator.nodes("worker") if node.rank == 1)
        coordinator.kill()
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: cluster.says("[worker 0]", "worker 1", "is away"))
        coordinator.start()
        cluster.goes_on()
        assert [node.rank for node in coordinator.nodes("worker")] == [0]
        stop(tmp_path)
        wait_until(lambda: not coordinator.nodes("worker"))
        _, parameters = read_parameters(coordinator.address)
        check(coordinator.address, parameters, tmp_path, 2, {0: 0, 1: 1})


# ── data ────────────────────────────────────────────────────────────────────────────────────────

SAMPLES = 1200


def read_all(folder, worker):
    """Count every sample that is read; a quarter into the data everybody waits until there is a file `go`."""
    model = worker.model("seen", {"seen": np.zeros(SAMPLES, np.float32)}, hw.Accumulate())
    read = 0
    for batch in worker.batches(np.arange(SAMPLES), 4):
        read += len(batch)
        if read > SAMPLES // 8 and not (folder / "go").exists():
            (folder / f"here{worker.rank}").touch()
            wait_until(lambda: (folder / "go").exists())
        seen = np.zeros(SAMPLES, np.float32)
        seen[batch] = 1
        model.push({"seen": seen})
        worker.step()
    return read


def away_while_all_read(cluster, folder):
    """Kill the coordinator while every worker has a split and has read a part of it."""
    cluster.train(functools.partial(read_all, folder))
    wait_until(lambda: all((folder / f"here{rank}").exists() for rank in range(2)))
    cluster.coordinator.kill()


def times_seen(cluster):
    _, parameters = read_parameters(cluster.coordinator.address)
    return parameters["seen"]["seen"]


def test_splits_wait_while_the_coordinator_is_away_and_what_was_recorded_is_not_leased_again(tmp_path):
    with field(tmp_path, sync="async") as cluster:
        away_while_all_read(cluster, tmp_path)
        (tmp_path / "go").touch()
        for rank in range(2):
            wait_until(lambda rank=rank: cluster.says(f"[worker {rank}]", "split", "is away"))
        cluster.coordinator.start()
        read = cluster.values()
        assert (times_seen(cluster) == 1).all(), "nobody had a split when it came back"
        assert sum(read.values()) == SAMPLES


def test_splits_that_were_out_at_the_restart_are_read_again_at_most_from_what_was_recorded(tmp_path):
    with field(tmp_path, sync="async") as cluster:
        away_while_all_read(cluster, tmp_path)
        cluster.coordinator.start()
        wait_until(cluster.coordinator.roster)
        (tmp_path / "go").touch()
        read = cluster.values()
        seen = times_seen(cluster)
        largest = SAMPLES // 8 // 2  # of a split, for two workers
        assert seen.min() == 1
        assert seen.max() <= 2
        assert seen.sum() == sum(read.values()) <= SAMPLES + 2 * largest
