"""A follower of real processes, of which one is killed: what it shows stays one version of everything."""

import contextlib
import os
import signal
import threading

import numpy as np
import pytest
from serving import Node, site
from waiting import wait_until

import headwater as hw
from headwater.cli.health import Health
from headwater.errors import HeadwaterError, StalledError
from headwater.runtime.inquiry import ask

pytestmark = pytest.mark.long


def train(worker):
    """Every step adds 1 to all parameters and to two rows, so values say their version."""
    model = worker.model("net", {"w": np.zeros(3000, np.float32)}, hw.Accumulate())
    table = worker.table("users", 2, hw.Accumulate())
    for _ in range(1500):
        model.push({"w": np.ones(3000, np.float32)})
        table.push(np.array([1, 2]), np.ones((2, 2), np.float32))
        worker.step()
    return worker.version


@pytest.mark.parametrize("index", [0, 1])
def test_every_view_is_right_while_a_server_is_killed_and_its_standby_takes_over(index):
    addresses, values = [], []

    def run():
        options = {"workers": 1, "servers": 2, "replicas": 1, "sync": "async", "deadline": 60}
        values.extend(hw.run(train, started=addresses.append, **options).values)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: addresses)
        with hw.follow(addresses[0], every=1) as follower:
            nodes = ask(addresses[0]).nodes
            (server,) = [node.pid for node in nodes if node.role == "server" and node.index == index]
            shown = []
            for change in follower.changes():
                assert not shown or change.version > shown[-1]
                shown.append(change.version)
                with follower.pin() as view:
                    (value,) = set(view.parameters("net")["w"].tolist())
                    assert value == view.version.number
                    assert (view.rows("users", [1, 2]) == value).all()
                if server and change.version.number > 300:
                    os.kill(server, signal.SIGKILL)
                    server, killed_at = 0, change.version.number
            assert not server
            assert shown[-1].number > killed_at + 100
            assert follower.statistics().reconnects == 0
    finally:
        thread.join(120)
    assert values == [1500]


def test_every_view_is_right_while_coordinator_standby_server_and_followers_are_killed(tmp_path):
    """A served follower goes on through all of it, and one that was killed is followed again."""
    with site(tmp_path) as cluster:
        cluster.coordinator(
            "--workers", 1, "--servers", 2, "--replicas", 1, "--sync", "async", "--journal", "journal"
        )
        for _ in range(6):
            cluster.server()
        cluster.worker()
        wait_until(lambda: caught_up(cluster))
        place = f"unix:{tmp_path}/readers"
        arguments = "follower", cluster.address, "--every", "1", "--bind", place
        served = [Node(tmp_path, *arguments)]
        wait_until(lambda: any(line.startswith("unix:") for line in served[0].lines))
        with hw.follow(place, every=1) as follower:
            for role in ("standby", "server", "coordinator", "follower"):
                if role == "follower":
                    served[-1].kill()
                    served.append(Node(tmp_path, *arguments))
                elif role == "coordinator":
                    kill(cluster.pids("coordinator")[0])
                    cluster.coordinator()
                else:
                    wait_until(lambda: caught_up(cluster))
                    kill(cluster.pids(role)[0])
                watch(follower, 30)
            assert follower.statistics().reconnects
        cluster.stop()
        for node in served:
            node.kill()


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def caught_up(cluster):
    """Whether every server has a standby with all that it has."""
    with contextlib.suppress(HeadwaterError):
        return Health.of(cluster.statistics()).is_ready
    return False


def watch(follower, versions):
    """So many newer versions, of which every view is one version: all values are its number."""
    until = follower.version.number + versions
    while follower.version.number < until:
        before = follower.wait(deadline=60)
        with follower.pin() as view:
            assert view.version >= before
            assert set(view.parameters("sums")["a"].tolist()) == {view.version.number}


def test_a_served_follower_that_was_stopped_is_up_to_date_again(tmp_path):
    addresses = []
    thread = threading.Thread(
        target=hw.run,
        args=(train,),
        kwargs={"workers": 1, "servers": 2, "sync": "async", "deadline": 60, "started": addresses.append},
    )
    thread.start()
    try:
        wait_until(lambda: addresses)
        node = Node(tmp_path, "follower", addresses[0], "--every", "1")
        wait_until(lambda: any(line.startswith("unix:") for line in node.lines))
        place = next(line for line in node.lines if line.startswith("unix:")).strip()
        with hw.follow(place, every=1) as behind, hw.follow(addresses[0], every=1) as direct:
            node.signal(signal.SIGSTOP)
            version = direct.wait(direct.version.number + 100, deadline=60).number
            with pytest.raises(StalledError):
                behind.wait(version, deadline=0.2)
            node.signal(signal.SIGCONT)
            behind.wait(version, deadline=60)
            with behind.pin() as view:
                assert set(view.parameters("net")["w"].tolist()) == {view.version.number}
    finally:
        thread.join(120)
    assert node.code() in (0, 75)
