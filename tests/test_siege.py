"""Training while strangers do to its addresses whatever they can: exact, and no larger afterwards."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import forking
import numpy as np
import psutil
import pytest
from connections import TOKEN, tls
from waiting import wait_until

import headwater as hw

IDLE = 300
"""Connections that stay open without a word, at each address."""

STRANGERS = """
import json, random, socket, struct, sys, threading, time
from connections import GREETING, HUGE, HUGE_HEADER

places, seconds, seed = json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
until = time.monotonic() + seconds
TLS_HELLO = bytes.fromhex("16030100050100000100")

def connected(place):
    stranger = socket.create_connection(place, timeout=5)
    stranger.settimeout(0.2)
    return stranger

def throw(place, chance):
    made = 0
    while time.monotonic() < until:
        noise = chance.randbytes(chance.randrange(1, 400))
        words = chance.choice([
            noise, GREETING, GREETING[: chance.randrange(len(GREETING))], GREETING + noise, HUGE, HUGE_HEADER,
            TLS_HELLO, TLS_HELLO + noise, b"GET / HTTP/1.1\\r\\nHost: here\\r\\n\\r\\n",
        ])
        try:
            with connected(place) as stranger:
                stranger.sendall(words)
                if chance.random() < 0.5:
                    stranger.shutdown(socket.SHUT_WR)
                stranger.recv(4096)
        except OSError:
            pass
        made += 1
    counts.append(made)

def sit(place):
    sitting = []
    while time.monotonic() < until:
        try:
            sitting.append(connected(place))
        except OSError:
            pass
        if len(sitting) > IDLE:
            sitting.pop(0).close()
        time.sleep(0.005)
    for one in sitting:
        one.close()

counts, IDLE = [], int(sys.argv[4])
threads = [threading.Thread(target=sit, args=(tuple(place),)) for place in places]
threads += [
    threading.Thread(target=throw, args=(tuple(place), random.Random(seed + i)))
    for i, place in enumerate(places * 2)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(counts))
"""


def step_and_compare(folder, worker):
    """Every element is what all rounds of two workers add up to, after every step."""
    model = worker.model("sums", {"a": np.zeros(50_000, np.float32)}, hw.Accumulate())
    while not worker.sum(told=float((folder / "stop").exists()))["told"]:
        model.push({"a": np.ones(50_000)})
        worker.step()
        assert set(model.pull()["a"].tolist()) == {2 * worker.version}
    return worker.version


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "security",
    [
        pytest.param({"token": TOKEN}, id="token"),
        pytest.param({"tls": tls()}, id="tls", marks=pytest.mark.long),
    ],
)
def test_strangers_change_nothing_and_leave_nothing(security, tmp_path, long):
    """With `--long` their memory is looked at too: a second is too short for what grows slowly."""
    seconds = 60 if long else 1.5
    options = {"engine": "local", "bind": "127.0.0.1", "deadline": 60, **security}
    with hw.Cluster(workers=2, servers=2, output=lambda line: None, **options) as cluster:
        for rank in range(2):
            cluster.start_worker(rank, functools.partial(step_and_compare, tmp_path))
        wait_until(lambda: cluster.statistics().version > 10, watch=cluster)
        nodes = [node for node in cluster.statistics().nodes if node.role in ("coordinator", "server")]
        places = [split(node.address) for node in nodes]
        arguments = [json.dumps(places), str(seconds), "7", str(IDLE)]
        held = {node.pid: holds(node) for node in nodes}
        before = cluster.statistics().version
        strangers = forking.spawn(
            [sys.executable, "-c", STRANGERS, *arguments],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + seconds / 3, seconds + 60)
        early = resident(nodes)
        output, _ = strangers.communicate(timeout=seconds + 60)
        late = resident(nodes)
        assert int(output) > 20
        assert cluster.statistics().version > before + 10
        wait_until(lambda: all(holds(node) <= held[node.pid] for node in nodes), why=lambda: held)
        (tmp_path / "stop").touch()
        outcomes = [cluster.next_outcome(30) for _ in range(2)]
        assert [outcome.failure for outcome in outcomes] == [None, None]
        grown = {node.pid: late[node.pid] - early[node.pid] for node in nodes}
        assert max(grown.values()) < 16e6 or not long, grown


def split(address):
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


def holds(node):
    """How many descriptors and threads a node has."""
    process = psutil.Process(node.pid)
    return process.num_fds() + process.num_threads()


def resident(nodes):
    return {node.pid: psutil.Process(node.pid).memory_info().rss for node in nodes}
