"""Clusters whose nodes are started one by one: they find together, in any order, and come and go."""

import signal
import urllib.request

import pytest
from serving import codes, site, values
from waiting import wait_until

CHECKPOINTS = ("--checkpoint", "runs", "--every", "20steps")


def all_joined(cluster, workers=2):
    return wait_until(lambda: len(cluster.pids("worker")) == workers)


def metric(node, name):
    """What a scrape of a node finds."""
    text = urllib.request.urlopen(node.metrics_url(), timeout=30).read().decode()
    return [float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} ")]


def ended_well(cluster, coordinator, *nodes):
    """Everybody finishes, and the last checkpoint has what all workers say that they pushed."""
    cluster.stop()
    assert codes(coordinator, *nodes) == [0] * (1 + len(nodes))
    assert cluster.summed() == [float(cluster.counted())]


@pytest.mark.parametrize("mode", ["sync", pytest.param("ssp:2", marks=pytest.mark.long)])
def test_nodes_find_together_in_any_order_and_end_when_every_worker_has_finished(mode, tmp_path):
    with site(tmp_path) as cluster:
        workers = [cluster.worker("--rank", rank) for rank in (1, 0)]
        servers = [cluster.server(), cluster.server()]
        assert workers[0].says("cannot connect", "tries again for 300 s")
        coordinator = cluster.coordinator(
            "--workers", 2, "--servers", 2, "--sync", mode, "--checkpoint", "runs", "--every", "1000s"
        )
        all_joined(cluster)
        cluster.goes_on()
        assert cluster.statistics().sync == mode
        ended_well(cluster, coordinator, *workers, *servers)
        assert f"{cluster.address}\n" in coordinator.lines


def test_a_worker_leaves_early_another_takes_its_rank_and_a_third_comes_later(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 2, "--sync", "async", *CHECKPOINTS)
        server, first, early = cluster.server(), cluster.worker("--rank", 0), cluster.worker("--rank", 1)
        all_joined(cluster)
        cluster.goes_on()
        early.signal(signal.SIGTERM)
        assert early.code() == 143
        assert "leaves after its next call" in early.text
        assert cluster.pids("worker") == (first.pid,)
        cluster.goes_on()
        heir = cluster.worker()
        wait_until(lambda: cluster.pids("worker") == (first.pid, heir.pid))
        third = cluster.worker()
        wait_until(lambda: cluster.pids("worker") == (first.pid, heir.pid, third.pid))
        cluster.goes_on()
        ended_well(cluster, coordinator, server, first, heir, third)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signalled_worker_finishes_its_step_and_leaves_and_the_cluster_waits_for_its_rank(number, tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator("--workers", 2, *CHECKPOINTS)
        server, first, second = cluster.server(), cluster.worker(), cluster.worker()
        all_joined(cluster)
        cluster.goes_on()
        second.signal(number)
        assert second.code() == 128 + number
        cluster.goes_on()
        assert "is gone without leaving" not in coordinator.text
        cluster.stop()
        assert first.says("waits until every declared worker has finished")
        again = cluster.worker()
        ended_well(cluster, coordinator, server, first, again)


# ── what dies ───────────────────────────────────────────────────────────────────────────────────


def test_a_killed_coordinator_goes_on_from_its_journal_and_so_do_its_checkpoints(tmp_path):
    with site(tmp_path) as cluster:
        coordinator = cluster.coordinator(
            "--workers", 2, "--servers", 2, "--journal", "journal", *CHECKPOINTS
        )
        others = [cluster.server(), cluster.server(), cluster.worker(), cluster.worker()]
        all_joined(cluster)
        wait_until(cluster.checkpoints)
        members = cluster.pids("server", "worker")
        for _ in range(2):
            coordinator.kill()
            coordinator = cluster.coordinator()
            cluster.later_checkpoint()
            assert cluster.pids("server", "worker") == members
        assert {name[:4] for name in cluster.checkpoints()} == {"g000"}
        ended_well(cluster, coordinator, *others)


def test_a_standby_takes_over_and_a_spare_becomes_its_standby(tmp_path):
    with site(tmp_path) as cluster:
        scraped = ("--metrics", "127.0.0.1:0")
        coordinator = cluster.coordinator("--workers", 2, "--replicas", 1, *CHECKPOINTS, *scraped)
        server = cluster.server("--role", "server")
        standby, workers = cluster.server("--role", "standby"), [cluster.worker(), cluster.worker()]
        all_joined(cluster)
        wait_until(lambda: cluster.statistics().unreplicated == ())
        spare = cluster.server()
        assert spare.says("it waits as a spare")
        assert cluster.statistics().spares == 1
        assert metric(coordinator, "headwater_failovers_total") == [0]
        server.kill()
        wait_until(lambda: cluster.pids("server") == (standby.pid,))
        wait_until(lambda: cluster.pids("standby") == (spare.pid,))
        wait_until(lambda: cluster.statistics().unreplicated == ())
        cluster.goes_on()
        wait_until(lambda: metric(coordinator, "headwater_failovers_total") == [1])
        standby.signal(signal.SIGTERM)
        assert standby.code() == 143
        wait_until(lambda: cluster.pids("server") == (spare.pid,))
        cluster.goes_on()
        ended_well(cluster, coordinator, spare, *workers)


SEEN = """
import pathlib, threading
import numpy as np
import headwater as hw

FOLDER = pathlib.Path(__file__).parent

def train(worker):
    model = worker.model("seen", {"seen": np.zeros(240, np.float32)}, hw.Accumulate())
    for read, batch in enumerate(worker.batches(np.arange(240), 4, splits="static")):
        while worker.rank == 1 and read == 20 and not (FOLDER / "go").exists():
            (FOLDER / "here").touch()
            threading.Event().wait(0.02)
        seen = np.zeros(240, np.float32)
        seen[batch] = 1
        model.push({"seen": seen})
        worker.step()
"""


def test_after_a_rewind_servers_and_workers_begin_anew_by_themselves_those_that_had_finished_too(tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)
    with site(tmp_path) as cluster:
        ahead = "--sync", "ssp:99"
        coordinator = cluster.coordinator("--workers", 2, "--servers", 2, *ahead, *CHECKPOINTS)
        lost, kept = cluster.server("--index", 0), cluster.server("--index", 1)
        workers = [cluster.worker(script="seen.py") for _ in range(2)]
        wait_until((tmp_path / "here").exists)
        spare = cluster.server()
        assert spare.says("it waits as a spare")
        wait_until(cluster.checkpoints)
        done = next(worker for worker in workers if worker.pid == cluster.pids("worker")[0])
        lost.kill()
        assert spare.says("it is server 0 of 2, from", "runs/g000")
        assert kept.says("it is server 1 of 2, from", "runs/g000")
        assert done.says("training begins anew from the last checkpoint")
        (tmp_path / "go").touch()
        assert codes(coordinator, kept, spare, *workers) == [0] * 5
        assert cluster.checkpoints()[-1].startswith("g001")
        assert (values(tmp_path, "seen", "seen") == 1).all()
