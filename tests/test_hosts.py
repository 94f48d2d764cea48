"""Clusters beyond one machine: TCP with a token and TLS, mixed with Unix sockets, and who is not let in."""

import contextlib
import functools
import importlib
import json
import logging
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import typer
from connections import TOKEN, running, tls
from hosts import NEAR, both, far, field, in_threads, train
from typer.testing import CliRunner
from waiting import wait_until

import headwater as hw
from headwater.cli.app import COMMANDS, app
from headwater.cli.options import security_of
from headwater.errors import (
    ConfigurationError,
    EngineError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from headwater.messages import Assignment
from headwater.runtime.server import ServerNode
from headwater.wire.addresses import split_place
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import Security

PROOFS = {
    "token": {"token": TOKEN},
    "tls": {"tls": tls()},
    "tls and token": {"token": TOKEN, "tls": tls()},
}


@functools.cache
def expected(servers=2):
    """What training comes to on one machine, over Unix sockets."""
    result = hw.run(train, workers=2, servers=servers, engine="inline")
    assert result.values[0] == result.values[1]
    return result.values[0]


# ── the same bits ───────────────────────────────────────────────────────────────────────────────


def test_a_cluster_without_bind_listens_on_unix_sockets_alone():
    with hw.Cluster(workers=1, servers=2) as cluster:
        cluster.worker().leave()
        assert cluster.address.startswith("unix:")
        assert all(node.address.startswith("unix:") for node in cluster.statistics().nodes if node.pid)


@pytest.mark.parametrize("proof", PROOFS.values(), ids=PROOFS)
def test_training_over_tcp_ends_with_the_bits_of_training_over_unix_sockets(proof):
    result = hw.run(train, workers=2, servers=2, transport="tcp", bind="127.0.0.1", **proof)
    assert result.values == [expected()] * 2


@pytest.mark.parametrize("bind", ["::1", "[::1]", "localhost", "127.0.0.1", "0.0.0.0", "::"])
def test_workers_join_at_any_kind_of_address(bind):
    advertise = "localhost" if bind in ("0.0.0.0", "::") else None
    options = {"bind": bind, "advertise": advertise, "tls": tls(), "transport": "tcp"}
    with hw.Cluster(workers=2, servers=2, **options) as cluster:
        host = cluster.address.removeprefix("tcp:").rpartition(":")[0]
        assert host == (advertise or {"::1": "[::1]"}.get(bind, bind))

        def work(_):
            with hw.connect(cluster.address, tls=tls()) as worker:
                return train(worker)

        assert set(in_threads(2, work).values()) == {expected()}


def test_nodes_of_the_same_machine_share_memory_though_the_cluster_listens_beyond_it():
    with hw.Cluster(workers=1, bind="127.0.0.1", token=TOKEN) as cluster:
        with cluster.worker() as worker:
            assert worker._session.shares == [True]
        with hw.connect(cluster.address, token=TOKEN) as worker:
            assert worker._session.shares == [True]


# ── mixtures ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "mixture",
    [
        (both, NEAR, far),
        *(
            pytest.param(mixture, marks=pytest.mark.long)
            for mixture in ((NEAR, far, far), (far, NEAR, both), (far, far, far))
        ),
    ],
)
def test_a_mixture_of_shared_memory_and_tcp_ends_with_the_same_bits(mixture):
    security = Security(TOKEN)
    with field(security) as at:
        for index, reach in enumerate(mixture):
            at.start(index, reach if reach is NEAR else reach(security))

        def work(_):
            with hw.connect(at.coordinator.address, token=TOKEN) as worker:
                assert worker._session.shares == [reach is not far for reach in mixture]
                return train(worker)

        assert set(in_threads(2, work).values()) == {expected()}


class Turns:
    """Two workers that add known integers, and stop between steps while the test changes the servers."""

    def __init__(self, at):
        self._at = at
        self._pause = threading.Barrier(3)
        self._go_on = threading.Barrier(3)
        self.kinds = []

    def work(self, phases, _):
        with hw.connect(self._at.coordinator.address, token=TOKEN) as worker:
            model = worker.model("sums", {"a": np.zeros(9000, np.float32)}, hw.Accumulate())
            table = worker.table("rows", 2, hw.Accumulate())
            for _ in range(phases):
                for _ in range(5):
                    model.push({"a": np.full(9000, worker.rank + 1, np.float32)})
                    table.push([1, 2], np.ones((2, 2), np.float32))
                    assert worker.step().applied
                self._pause.wait(60)
                self._go_on.wait(60)
            sums = model.pull(copy=True)["a"]
            worker.barrier()
            if worker.rank == 0:
                model.assign({"a": np.arange(9000, dtype=np.float32)})
                self.kinds = list(worker._session.shares)
            worker.barrier()
            return sums, model.pull(copy=True)["a"], table.pull([1, 2])

    def between(self, change):
        """Do something while both workers stand between two steps."""
        self._pause.wait(60)
        try:
            change()
        finally:
            self._go_on.wait(60)


@pytest.mark.parametrize("first", [pytest.param(NEAR, marks=pytest.mark.long), far], ids=["near", "far"])
def test_a_worker_follows_a_shard_from_shared_memory_to_tcp_and_back(first):
    security = Security(TOKEN)
    second = far(security) if first is NEAR else NEAR
    first = NEAR if first is NEAR else first(security)
    with field(security, servers=2, replicas=1) as at:
        for index in range(2):
            at.start(index, first)
        for index in range(2):
            at.start(index, second, role="standby")
        at.wait_until(lambda: len(at.nodes("server")) == 2)
        turns = Turns(at)
        answers = {}
        thread = threading.Thread(
            target=lambda: answers.update(in_threads(2, functools.partial(turns.work, 3)))
        )
        thread.start()

        def to_the_standbys():
            at.wait_until(at.replicated)
            at.kill("server", 1)

        def and_back():
            at.start(1, first, role="standby")
            at.wait_until(at.replicated)
            at.kill("server", 1)
            at.kill("server", 0)

        turns.between(to_the_standbys)
        turns.between(and_back)
        turns.between(lambda: None)
        thread.join(120)
        assert not thread.is_alive()
        assert len(answers) == 2
        for sums, values, rows in answers.values():
            assert (sums == 45).all()
            assert (values == np.arange(9000)).all()
            assert (rows == 30).all()
        assert turns.kinds == [second is NEAR, first is NEAR]


# ── who is not let in ───────────────────────────────────────────────────────────────────────────

OTHER = "another token, which these nodes were not given"


@pytest.fixture(params=PROOFS)
def training(request):
    """A cluster with that proof, in which a worker steps on for as long as the test runs; gives both."""
    proof = PROOFS[request.param]
    over, steps = threading.Event(), []
    with hw.Cluster(workers=1, servers=2, bind="127.0.0.1", **proof) as cluster:

        def work():
            with hw.connect(cluster.address, **proof) as worker:
                model = worker.model("sums", {"a": np.zeros(3, np.float32)}, hw.Accumulate())
                while not over.is_set():
                    model.push({"a": np.ones(3, np.float32)})
                    steps.append(worker.step().version)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield request.param, cluster
        finally:
            over.set()
            thread.join(60)
        assert steps == list(range(1, len(steps) + 1))
        assert cluster.parameters()[0] == len(steps)


STRANGERS = {
    "plain": ({}, {"token": "token", "tls": "TLS", "tls and token": "TLS"}),
    "wrong token": (
        {"token": OTHER},
        {"token": "token", "tls": "TLS", "tls and token": "TLS"},
    ),
    "wrong token over tls": (
        {"token": OTHER, "tls": tls()},
        {"token": "TLS", "tls": "token", "tls and token": "token"},
    ),
    "no token over tls": ({"tls": tls()}, {"token": "TLS", "tls and token": "token"}),
    "foreign certificate": (
        {"token": TOKEN, "tls": tls(signed_by="theirs", believes="ours")},
        {"tls": "certificate", "tls and token": "certificate"},
    ),
    "expired certificate": (
        {"token": TOKEN, "tls": tls(days=-1.0)},
        {"tls": "certificate.*expired", "tls and token": "certificate.*expired"},
    ),
}


def test_strangers_are_told_what_they_lack_and_training_goes_on(training):
    kind, cluster = training
    for proof, reasons in STRANGERS.values():
        if kind in reasons:
            with pytest.raises(
                (RefusedError, ProtocolError), match=rf"(?s)cannot connect to.*{reasons[kind]}"
            ):
                hw.connect(cluster.address, **proof)


def test_a_node_with_tls_is_told_that_a_cluster_has_none():
    with hw.Cluster(workers=1, bind="127.0.0.1", insecure=True) as cluster:
        with pytest.raises((RefusedError, ProtocolError), match=r"cannot connect to.*TLS"):
            hw.connect(cluster.address, tls=tls())
        with pytest.raises((RefusedError, ProtocolError), match=r"cannot connect to.*token"):
            hw.connect(cluster.address, token=TOKEN)
        hw.connect(cluster.address).leave()


def test_a_rank_that_a_living_worker_has_is_refused_over_tcp_too():
    security = Security(TOKEN)
    cluster = hw.Cluster(workers=2, bind="127.0.0.1", token=TOKEN)
    with cluster, hw.Worker(cluster.address, 1, security=security) as first:
        with pytest.raises(RefusedError, match="worker rank 1 is taken by a living worker"):
            hw.Worker(cluster.address, 1, security=security)
        assert first.rank == 1


@pytest.mark.parametrize("proof", [{}, *PROOFS.values()], ids=["nothing", *PROOFS])
def test_an_address_where_something_speaks_http_is_told_at_once(proof):
    def answer(server):
        with server.accept()[0] as connection, contextlib.suppress(OSError):  # who was told may have hung up
            connection.recv(1)
            with contextlib.suppress(OSError):  # the caller may have hung up already
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1 << 16)

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        running(lambda: answer(server)),
        pytest.raises(ProtocolError, match=r"cannot connect to tcp:127.*not a Headwater node"),
    ):
        hw.connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", **proof)


# ── addresses that lead nowhere ─────────────────────────────────────────────────────────────────

ELSEWHERE = "127.0.0.2"
"""Is this machine too, but nobody listens there."""


def test_a_server_that_advertises_an_address_where_nobody_reaches_it_is_refused(caplog):
    security = Security(TOKEN)
    with field(security, servers=1, workers=1) as at:
        reach = Endpoint("127.0.0.1", ELSEWHERE, security)
        node = ServerNode(at.coordinator.address, Assignment(0, 1, "sync"), reach)
        with pytest.raises(UnreachableError, match=rf"server 0 .*tcp:{ELSEWHERE}:\d+.*refused.*--advertise"):
            node.start()
        assert any(
            record.levelno == logging.WARNING and ELSEWHERE in record.message for record in caplog.records
        )
        at.start(0, far(security))
        with hw.connect(at.coordinator.address, token=TOKEN) as worker:
            assert worker.rank == 0


def test_a_server_that_only_its_own_machine_reaches_is_refused_by_a_coordinator_of_another(monkeypatch):
    security = Security(TOKEN)
    with field(security, servers=1, workers=1) as at:
        monkeypatch.setattr("headwater.runtime.coordinator_client.machine", lambda: "another")
        node = ServerNode(at.coordinator.address, Assignment(0, 1, "sync"), Endpoint(security=security))
        with pytest.raises(UnreachableError, match=r"server 0 .*unix:.*--bind"):
            node.start()


def test_a_worker_that_no_server_s_address_leads_from_is_told_at_once(monkeypatch):
    security = Security(TOKEN)
    with field(security, servers=1, workers=1) as at:
        at.start(0, NEAR)
        at.wait_until(lambda: at.nodes("server"))
        monkeypatch.setattr("headwater.runtime.dialling.machine", lambda: "another")
        with pytest.raises(UnreachableError, match=r"server 0 .*unix:.*--bind"):
            hw.connect(at.coordinator.address, token=TOKEN)


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_cluster_whose_servers_nobody_reaches_ends_with_the_reason(replicas):
    options = {"bind": "127.0.0.1", "advertise": ELSEWHERE, "token": TOKEN, "replicas": replicas}
    with hw.Cluster(workers=1, **options) as cluster:
        with pytest.raises(EngineError, match=rf"server 0: .*tcp:{ELSEWHERE}:\d+.*--advertise"):
            cluster.worker()
        with pytest.raises(EngineError, match="--advertise"):
            cluster.next_outcome(20)
    with pytest.raises(EngineError, match="--advertise"):
        hw.run(train, workers=1, engine="inline", **options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"bind": "0.0.0.0"}, "tls or a token"),
        ({"bind": "::"}, "tls or a token"),
        ({"bind": "127.0.0.1", "token": "short"}, "can be guessed"),
        ({"advertise": "node1"}, "without a TCP address"),
        ({"bind": "127.0.0.1", "advertise": "0.0.0.0"}, "is not an address that others can dial"),
        ({"bind": "127.0.0.1:port"}, "expected a host to listen on"),
        ({"bind": "[::1"}, "expected a host to listen on"),
        ({"bind": ""}, "expected a host to listen on"),
        ({"bind": "127.0.0.1", "advertise": "a b:1:2"}, "expected a host to listen on"),
        ({"bind": "192.0.2.1", "token": TOKEN}, "cannot listen on tcp:192.0.2.1"),
        ({"bind": "no-such-host.invalid", "token": TOKEN}, "cannot listen on"),
    ],
)
def test_impossible_addresses_are_refused_before_anything_starts(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        hw.Cluster(workers=1, **arguments)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("node1", ("node1", 0)),
        ("node1:7000", ("node1", 7000)),
        ("10.0.0.1:7000", ("10.0.0.1", 7000)),
        ("::1", ("::1", 0)),
        ("::", ("::", 0)),
        ("[::]", ("::", 0)),
        ("[fe80::1%eth0]:7000", ("fe80::1%eth0", 7000)),
    ],
)
def test_a_place_is_a_host_with_or_without_a_port(place, parts):
    assert split_place(place) == parts


# ── what a person sees ──────────────────────────────────────────────────────────────────────────


def test_statistics_and_status_show_the_addresses_that_others_dial(tmp_path, monkeypatch):
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    with hw.Cluster(workers=1, servers=2, bind="127.0.0.1", advertise="localhost", token=TOKEN) as cluster:
        cluster.worker().leave()
        nodes = [node for node in cluster.statistics().nodes if node.role in ("coordinator", "server")]
        shown = {(node.role, node.index): node.address for node in nodes}
        assert shown["coordinator", 0] == cluster.address
        assert all(address.startswith("tcp:localhost:") for address in shown.values())
        assert len(set(shown.values())) == 3

        status = functools.partial(CliRunner().invoke, app)
        by_file = status(["status", cluster.address, "--token-file", str(secret), "--json"])
        assert by_file.exit_code == 0, by_file.output
        assert {node["address"] for node in json.loads(by_file.output)["nodes"]} >= set(shown.values())
        assert status(["status", cluster.address]).exit_code == 1
        monkeypatch.setenv("HEADWATER_TOKEN", TOKEN)
        assert status(["status", cluster.address]).exit_code == 0


@pytest.mark.parametrize("proof", PROOFS.values(), ids=PROOFS)
@pytest.mark.parametrize("only_tcp", [False, True])
def test_a_cluster_that_demands_proofs_can_verify_itself(proof, only_tcp):
    transport = {"transport": "tcp"} if only_tcp else {"bind": "127.0.0.1"}
    cluster = hw.Cluster(workers=1, servers=1, replicas=1, deadline=20, **transport, **proof)
    with cluster, cluster.worker() as worker:
        worker.step()
        assert [shard.index for shard in cluster.verify().shards] == [0]


def dialling_commands():
    """Every command that dials a cluster, by its words."""
    for name in COMMANDS:
        command = typer.main.get_command(importlib.import_module(f"headwater.cli.{name}").app)
        parts = {(name, part): one for part, one in getattr(command, "commands", {}).items()}
        for words, one in (parts or {(name,): command}).items():
            if name not in ("bench", "checkpoint", "compare") and words[-1] != "certificates":
                yield words, one


def test_every_command_that_dials_a_cluster_takes_the_same_credentials():
    commands = dict(dialling_commands())
    assert {("status",), ("stop",), ("ping",), ("verify",), ("serve", "worker")} <= set(commands)
    for words, command in commands.items():
        names = {one.name for one in command.params}
        assert {"token_file", "tls_ca", "tls_certificate", "tls_key"} <= names, words
        assert command.context_settings["auto_envvar_prefix"] == "HEADWATER", words


def test_verify_proves_what_the_cluster_demands(tmp_path):
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    verify = functools.partial(CliRunner().invoke, app)
    cluster = hw.Cluster(workers=1, servers=1, replicas=1, bind="127.0.0.1", token=TOKEN)
    with cluster, cluster.worker() as worker:
        worker.step()
        wait_until(lambda: cluster.verify().equal)
        assert verify(["verify", cluster.address]).exit_code == 1
        done = verify(["verify", cluster.address, "--token-file", str(secret), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["shards"][0]["reason"] == ""


def test_run_takes_addresses_and_proofs_and_never_shows_the_token(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "script.py").write_text(
        "import psutil\n"
        "def train(worker):\n"
        "    for process in psutil.Process().parent().children():\n"
        "        print(process.cmdline())\n"
    )
    files, arguments = tls(), []
    for name in ("ca", "certificate", "key"):
        arguments += [f"--tls-{name}", str(getattr(files, name))]
    command = [sys.executable, "-m", "headwater", "run", str(tmp_path / "script.py"), *arguments]
    command += ["--bind", "127.0.0.1", "--token-file", str(tmp_path / "token"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "cluster address: tcp:127.0.0.1:" in done.stderr
    assert done.stdout.count("headwater.engines.child") >= 2
    assert TOKEN not in done.stdout + done.stderr


def test_half_a_set_of_tls_files_and_an_unreadable_token_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--tls-key is missing"):
        security_of(tls_ca=tmp_path, tls_certificate=tmp_path)
    with pytest.raises(ConfigurationError, match="cannot read a token from"):
        security_of(token_file=tmp_path / "nothing")
