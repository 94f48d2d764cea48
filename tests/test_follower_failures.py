"""A follower of real processes, of which one is killed: what it shows stays one version of everything."""

import os
import signal
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
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
