"""A cluster on three hosts that are network namespaces: TLS between them, links that are cut and slow."""

import contextlib
import functools
import hashlib
import os
import threading

import pytest
from connections import TOKEN, tls
from hosts import train
from namespaces import LOCAL, Network, Node, impossible
from serving import Site, codes
from waiting import wait_until

import headwater as hw

pytestmark = pytest.mark.skipif(bool(impossible()), reason=f"no network namespaces: {impossible()}")

HOSTS = 3

BEGIN = """
import dataclasses, hashlib, json, logging, os, sys, threading, time
import msgspec
import numpy as np
import headwater as hw
from headwater.runtime.coordinator import CoordinatorNode
from headwater.messages import Assignment
from headwater.spec.cluster import ClusterConfig
from headwater.runtime.server import ServerNode
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import TLS, Security

logging.basicConfig(level=logging.INFO, format="%(message)s")
token, files, *arguments = json.loads(sys.argv[1])
files = TLS(*files)
security = Security(token, files)

def say(**answer):
    print(json.dumps(answer), flush=True)

def end_with_input():
    sys.stdin.read()
    os._exit(0)
"""

COORDINATOR = (
    BEGIN
    + """
bind, settings = arguments
node = CoordinatorNode(ClusterConfig(**settings), reach=Endpoint(bind, security=security))
say(address=node.address)
for line in sys.stdin:
    print(msgspec.json.encode(node.statistics()).decode(), flush=True)
node.close()
"""
)

SERVER = (
    BEGIN
    + """
threading.Thread(target=end_with_input, daemon=True).start()
bind, coordinator, assignment = arguments
node = ServerNode(coordinator, Assignment(**assignment), Endpoint(bind, security=security))
node.start()
say(started=True)
try:
    node.wait()
except hw.errors.HeadwaterError as error:
    say(ended=str(error))
"""
)

TRAINS = (
    BEGIN
    + """
from hosts import train
threading.Thread(target=end_with_input, daemon=True).start()
with hw.connect(*arguments, token=token, tls=files) as worker:
    say(rank=worker.rank, shares=worker._session.shares)
    began = time.monotonic()
    values = train(worker)
    say(rank=worker.rank, values=hashlib.sha256(values).hexdigest(), seconds=time.monotonic() - began)
"""
)

COUNTS = (
    BEGIN
    + """
# Add rank + 1 with every step until there is a line on the input, and say where it is now and then.
over = threading.Event()
def wait_for_input():
    if sys.stdin.readline():
        over.set()
        sys.stdin.read()
    os._exit(0)
steps = 0
try:
    with hw.connect(*arguments, token=token, tls=files) as worker:
        threading.Thread(target=wait_for_input, daemon=True).start()
        model = worker.model("sums", {"a": np.zeros(20000, np.float32)}, hw.Accumulate())
        say(rank=worker.rank)
        while not over.is_set():
            model.push({"a": np.full(20000, worker.rank + 1, np.float32)})
            result = worker.step()
            assert result.applied
            steps += 1
            if steps % 10 == 0:
                print("at", steps, flush=True)
            time.sleep(0.005)
        sums = model.pull(copy=True)["a"]
        say(rank=worker.rank, steps=steps, sum=float(sums[0]), same=bool((sums == sums[0]).all()))
except hw.errors.HeadwaterError as error:
    say(error=type(error).__name__, reason=str(error), steps=steps)
"""
)


@functools.cache
def files():
    made = tls(names=tuple(f"10.99.0.{host}" for host in range(1, HOSTS + 1)))
    return [str(made.ca), str(made.certificate), str(made.key)]


class Field:
    """A coordinator and a server on host 1, a server on host 2, a worker on each host."""

    def __init__(self, network, stack, **settings):
        self._network, self._stack = network, stack
        kept = {"patience": 2.0, "deadline": 90.0, **settings}
        self.settings = {"workers": HOSTS, "servers": 2, "sync": "sync", **kept}
        bind = network.address(1)
        self.coordinator = self.node(1, COORDINATOR, bind, self.settings)
        self.address = self.coordinator.answer()["address"]
        self.servers = [self.serve(index, index + 1) for index in range(2)]

    def node(self, host, code, *arguments):
        made = Node(self._network, host, code, TOKEN, files(), *arguments)
        self._stack.callback(made.close)
        return made

    def serve(self, index, host, role="server"):
        replicas = self.settings.get("replicas", 0)
        assignment = {"index": index, "servers": 2, "sync": "sync", "role": role, "replicas": replicas}
        return self.node(host, SERVER, self._network.address(host), self.address, assignment)

    def workers(self, code):
        """Joined one after the other, so that the worker on host n has rank n - 1."""
        made = []
        for host in range(1, HOSTS + 1):
            worker = self.node(host, code, self.address)
            wait_until(lambda host=host: len(self.ranks()) == host, 90, lambda worker=worker: worker.lines)
            made.append(worker)
        return made

    def statistics(self):
        return self.coordinator.ask()

    def ranks(self):
        return [node["rank"] for node in self.statistics()["nodes"] if node["role"] == "worker"]


@contextlib.contextmanager
def field(**settings):
    with Network(HOSTS) as network, contextlib.ExitStack() as stack:
        yield network, Field(network, stack, **settings)


@functools.cache
def expected():
    result = hw.run(train, workers=HOSTS, servers=2, engine="inline")
    return hashlib.sha256(result.values[0]).hexdigest()


def steps_of(worker):
    """How far it has said that it is."""
    said = [int(line.split()[1]) for line in list(worker.lines) if line.startswith("at ")]
    return said[-1] if said else 0


def go_on(workers, more=30):
    """Block until each of them has taken so many more steps."""
    for worker, before in [(worker, steps_of(worker)) for worker in workers]:
        wait_until(
            lambda worker=worker, before=before: steps_of(worker) >= before + more,
            90,
            lambda worker=worker: worker.lines,
        )


def ended(workers):
    """Tell them to end, and take what they come to, by rank."""
    for worker in workers:
        worker._process.stdin.write("\n")
        worker._process.stdin.flush()
    answers = [worker.answer() for worker in workers]
    assert all("sum" in answer for answer in answers), answers
    return {answer["rank"]: answer for answer in answers}


def test_training_on_three_hosts_ends_with_the_bits_of_training_on_one():
    with field() as (_, at):
        workers = at.workers(TRAINS)
        joined = [worker.answer() for worker in workers]
        assert [one["shares"] for one in joined] == [[True, False], [False, True], [False, False]]
        assert {worker.answer()["values"] for worker in workers} == {expected()}


SCRIPT = """
import hashlib
from pathlib import Path
from hosts import train as fit

def train(worker):
    (Path(__file__).parent / f"values-{worker.rank}").write_text(hashlib.sha256(fit(worker)).hexdigest())
"""


@pytest.mark.long
def test_nodes_that_headwater_serve_starts_on_three_hosts_end_with_the_same_bits(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    known = dict(zip(("CA", "CERTIFICATE", "KEY"), files(), strict=True))
    proofs = {"HEADWATER_TOKEN": TOKEN, **{f"HEADWATER_TLS_{name}": path for name, path in known.items()}}
    proofs["PYTHONPATH"] = os.pathsep.join([str(LOCAL.parent), str(LOCAL)])
    with (
        Network(HOSTS) as network,
        contextlib.closing(Site(tmp_path, f"tcp:{network.address(1)}:7000")) as at,
    ):

        def start(host, *arguments):
            return at.start(*arguments, inside=network.inside(host), **proofs)

        nodes = [start(1, "coordinator", "--workers", HOSTS, "--servers", 2, "--bind", "10.99.0.1:7000")]
        nodes += [start(host, "server", "--bind", "0.0.0.0") for host in (1, 2)]
        nodes += [start(host, "worker", "script.py", "--rank", host - 1) for host in (1, 2, 3)]
        assert codes(*nodes) == [0] * len(nodes)
    assert {path.read_text() for path in tmp_path.glob("values-*")} == {expected()}


def test_training_over_slow_links_ends_with_the_same_bits():
    with field() as (network, at):
        cannot = network.slow(2, "50ms") or network.slow(3, "50ms")
        if cannot:
            pytest.skip(f"no slow links: {cannot}")
        answers = [(worker.answer(), worker.answer()) for worker in at.workers(TRAINS)]
        assert {trained["values"] for _, trained in answers} == {expected()}
        assert min(trained["seconds"] for _, trained in answers) > 8 * 0.05


@pytest.mark.parametrize("host", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_host_that_is_cut_off_for_less_than_its_lease_goes_on_and_no_step_is_lost_or_doubled(host, long):
    """A server and a worker, or a worker; for so long that its connections are given up, or not."""
    with field(lease=90.0) as (network, at):
        workers = at.workers(COUNTS)
        ranks = [worker.answer()["rank"] for worker in workers]
        go_on(workers)
        network.cut(host)
        threading.Event().wait(45.0 if long else 1.0)
        network.mend(host)
        go_on(workers)
        lines = [line for node in (*workers, *at.servers) for line in node.lines]
        assert any("the connection is given up" in line for line in lines) == long
        assert at.ranks() == ranks
        answers = ended(workers)
        steps = {answer["steps"] for answer in answers.values()}
        assert max(steps) - min(steps) <= 1
        for answer in answers.values():
            assert answer["same"]
        # Whoever ended first no longer counts in the last rounds of the others.
        total = sum((rank + 1) * answer["steps"] for rank, answer in answers.items())
        assert max(answer["sum"] for answer in answers.values()) == total


@pytest.mark.parametrize("host", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_host_that_is_cut_off_for_longer_is_refused_and_the_others_go_on(host):
    """Host 3 has a worker; host 2 a worker and a server, whose standby is on host 3."""
    replicas = 1 if host == 2 else 0
    with field(lease=3.0, replicas=replicas) as (network, at):
        if replicas:
            for index in range(2):
                at.serve(index, 3, role="standby")
        workers = at.workers(COUNTS)
        for worker in workers:
            worker.answer()
        if replicas:
            wait_until(lambda: not at.statistics()["unreplicated"], 90, lambda: at.coordinator.lines)
        go_on(workers)
        network.cut(host)
        others = [worker for number, worker in enumerate(workers, start=1) if number != host]
        wait_until(lambda: host - 1 not in at.ranks(), 90, lambda: at.coordinator.lines)
        go_on(others)
        network.mend(host)
        lost = workers[host - 1].answer()
        assert lost["error"] == "DeclaredDeadError", lost
        assert "declared dead: nothing was heard of it for 3 s" in lost["reason"]
        answers = ended(others)
        known = sum((rank + 1) * answer["steps"] for rank, answer in answers.items())
        total = max(answer["sum"] for answer in answers.values())
        # Of the one that was lost counts what was answered, and at most the step that was not.
        assert (total - known) / host in (lost["steps"], lost["steps"] + 1)
        if replicas:
            wait_until(lambda: "declared dead" in at.servers[1].lines[-1], 90, lambda: at.servers[1].lines)


LISTENS = """
import json, os, sys, threading
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import Security
token, files, bind, busy = json.loads(sys.argv[1])
[listener], [address] = Endpoint(bind, security=Security(token), local=False).listen()
print(json.dumps({"address": address}), flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
channel = listener.accept()
while not busy and channel.receive() is not None:
    pass
threading.Event().wait()
"""

SENDS = """
# Send small frames, or more than a connection holds, and look whether the peer lives, until it is given up.
import json, sys, threading, time
from headwater.errors import ConnectionLostError
from headwater.messages import Heartbeat, Refused
from headwater.wire.liveness import PeerLiveness
from headwater.wire.listener import dial
from headwater.wire.security import Security
token, files, address, busy = json.loads(sys.argv[1])
channel = dial(address, timeout=10, security=Security(token))
words = Refused("", "x" * 100000) if busy else Heartbeat()
def send():
    try:
        while True:
            channel.send(words)
            time.sleep(0 if busy else 0.05)
    except ConnectionLostError:
        pass
sending = threading.Thread(target=send)
sending.start()
asked = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), asked.set()), daemon=True).start()
life, began = PeerLiveness(0.75), time.monotonic()
while channel.fileno() >= 0:
    life.look([channel], time.monotonic())
    if asked.is_set():
        asked.clear()
        print(json.dumps({"open": channel.fileno() >= 0, "sending": sending.is_alive()}), flush=True)
    time.sleep(0.1)
sending.join()
print(json.dumps({"given up": True}), flush=True)
"""


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.long), True], ids=["idle", "busy"])
def test_a_host_that_is_gone_is_told_from_one_that_is_busy(busy):
    with Network(2) as network, contextlib.ExitStack() as stack:

        def node(host, code, *arguments):
            made = Node(network, host, code, TOKEN, [], *arguments)
            stack.callback(made.close)
            return made

        address = node(1, LISTENS, network.address(1), busy).answer()["address"]
        sender = node(2, SENDS, address, busy)
        threading.Event().wait(2.5)  # the time passes in which a peer that says nothing would be given up
        assert sender.ask() == {"open": True, "sending": True}
        network.cut(1)
        assert sender.answer() == {"given up": True}
