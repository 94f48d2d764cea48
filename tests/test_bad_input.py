"""What callers and strangers do wrong: a typed error or a closed connection, and nothing changed."""

import functools
import math
import os
import random
import socket
import struct

import msgspec
import numpy as np
import pytest
from connections import TOKEN
from typer.testing import CliRunner

import headwater as hw
from headwater import messages as m
from headwater.cli.app import app
from headwater.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    GradientError,
    HeadwaterError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    RegistrationError,
    UsageError,
)
from headwater.runtime.client import Client
from headwater.spec.cluster import ClusterConfig
from headwater.spec.rules import RowwiseAdagrad
from headwater.standalone import StandaloneServer, StandaloneWorker
from headwater.wire import frames
from headwater.wire.channel import Outgoing
from headwater.wire.listener import dial
from headwater.wire.window import Window
from headwater.worker import Worker

SHAPES = {"w": (2, 3), "b": (3,)}


@pytest.fixture
def cluster():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=30) as cluster:
        yield cluster


@pytest.fixture
def worker(cluster):
    with cluster.worker() as worker:
        yield worker


@pytest.fixture
def model(worker):
    return worker.model(
        "net", {name: np.ones(shape).astype(np.float32) for name, shape in SHAPES.items()}, hw.SGD(lr=1.0)
    )


def ones(names=SHAPES):
    return {name: np.ones(SHAPES[name], np.float32) for name in names}


# ── what a user writes ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 0}, "workers must be an integer ≥ 1, got 0"),
        ({"workers": 2.0}, "workers must be an integer ≥ 1, got 2.0"),
        ({"workers": 2**70}, "workers must be at most 65,536, got 1180591620717411303424"),
        ({"workers": 1, "servers": 4097}, "servers must be at most 4,096, got 4097"),
        ({"workers": 1, "sync": "sync:quorum=1,grace=1e300"}, "pass grace_s ≥ 0 seconds and at most a year"),
        ({"workers": 1, "sync": "sync:quorum=1,grace=inf"}, "grace_s.* (finite|impossible)"),
        ({"workers": 1, "engine": []}, r"engine: got \[\], expected one of"),
        ({"workers": 1, "rules": 5}, "rules: got 5, expected a list of module names"),
        ({"workers": 1, "bind": 5}, "bind: got 5, expected HOST or HOST:PORT"),
        ({"workers": 1, "settings": {"\udc80": 1}}, "cannot be encoded as UTF-8"),
        ({"workers": 1, "checkpoint": "x", "every": f"{10**30}steps"}, "expected commits such as 100"),
        ({"workers": 1, "servers": -1}, "servers must be an integer ≥ 1, got -1"),
        ({"workers": 1, "sync": "sometimes"}, "sync: got 'sometimes', expected 'sync'"),
        ({"workers": 1, "sync": "ssp:-1"}, "sync: got 'ssp:-1'"),
        ({"workers": 1, "sync": 3}, "sync: got 3"),
        ({"workers": 1, "engine": "cloud"}, "engine: got 'cloud', expected one of 'inline', 'local'"),
        ({"workers": 1, "patience": 0}, "patience must be > 0 seconds"),
        ({"workers": 1, "transport": "pigeon"}, "transport must be 'unix' or 'tcp', got 'pigeon'"),
    ],
)
def test_an_impossible_cluster_is_refused_before_anything_starts(options, text):
    with pytest.raises(ConfigurationError, match=text):
        hw.Cluster(**options)


TIMES = ["patience", "deadline", "lease"]


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(
    "value",
    [0, -1.0, math.inf, -math.inf, math.nan, 1e10, 366 * 86400.0, 10**400, "5", None, True],
    ids=lambda value: f"{value!r:.12}",
)
def test_a_time_that_is_none_or_that_nothing_can_wait_for_is_refused_at_once_everywhere(name, value):
    text = rf"{name} must be (> 0 seconds and at most a year \(31536000 s\)|a number of seconds), got"
    for takes_it in (hw.Cluster, functools.partial(hw.run, lambda worker: None)):
        with pytest.raises(ConfigurationError, match=text):
            takes_it(workers=1, **{name: value})


@pytest.mark.parametrize("command", [["run", "train.py"], ["serve", "coordinator", "--workers", "1"]])
@pytest.mark.parametrize("value", ["inf", "nan", "0", "1e10"])
def test_the_command_line_refuses_such_times_too(command, value, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("def train(worker):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    for name in TIMES:
        done = CliRunner().invoke(app, [*command, f"--{name}", value])
        assert done.exit_code == 2, done.output
        assert f"{name} must be" in done.stderr


def test_a_served_node_refuses_to_wait_for_ever():
    for kind in (StandaloneServer, functools.partial(StandaloneWorker, print)):
        with pytest.raises(ConfigurationError, match="wait must be ≥ 0 seconds"):
            kind("unix:@nobody", wait=math.inf)


@pytest.mark.parametrize("every", ["infs", "nans", "1e300s", "0s"])
def test_checkpoints_every_so_long_that_nothing_can_wait_for_it_are_refused(every, tmp_path):
    with pytest.raises(ConfigurationError, match="every"):
        hw.Cluster(workers=1, checkpoint=tmp_path, every=every)


def test_times_of_a_month_and_of_a_year_work(caplog):
    month, year = 30 * 86400.0, 365 * 86400.0
    for times in (
        {"deadline": month},
        {"patience": month},
        {"lease": 40 * 86400.0},
        dict.fromkeys(TIMES, year),
    ):
        with (
            hw.Cluster(workers=1, servers=2, sync="async", bind="127.0.0.1", token=TOKEN, **times) as cluster,
            hw.connect(cluster.address, token=TOKEN) as worker,
        ):
            table = worker.table("t", 2, hw.SGD(lr=1.0))
            table.prefetch([1, 2])
            assert table.pull([1, 2]).shape == (2, 2)
            assert worker.step().version == 1
            assert cluster.statistics().nodes
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_patience_of_more_than_half_of_the_deadline_is_cut_to_it():
    assert ClusterConfig(patience=50.0, deadline=60.0).patience == 30.0
    assert ClusterConfig(patience=20.0, deadline=60.0).patience == 20.0


@pytest.mark.parametrize(
    ("address", "options", "text"),
    [
        (3, {}, "the address of a coordinator is a text"),
        (None, {}, "the address of a coordinator is a text"),
        (b"unix:@x", {}, "the address of a coordinator is a text"),
        ("nonsense", {}, "address 'nonsense' is not one of"),
        ("tcp:127.0.0.1:1", {"token": 3}, "token must be a text, got a int"),
        ("tcp:127.0.0.1:1", {"token": b"t" * 32}, "token must be a text, got a bytes"),
        ("tcp:127.0.0.1:1", {"tls": "ca.pem"}, "tls must be a headwater.TLS"),
    ],
)
def test_what_cannot_be_connected_to_is_refused_at_once(address, options, text):
    with pytest.raises(ConfigurationError, match=text):
        hw.connect(address, **options)


@pytest.mark.parametrize("rank", ["a", -1, 1.5, True, 2**70])
def test_what_is_no_rank_is_refused_at_once(rank):
    with pytest.raises(ConfigurationError, match="rank must be"):
        Worker("unix:@nobody", rank)


def _wrong_types():
    w, sgd = {"w": np.zeros(2, np.float32)}, hw.SGD(lr=1.0)
    yield "model(name=1)", lambda k: k.model(1, w, sgd)
    yield "model(name=surrogate)", lambda k: k.model("\udc80", w, sgd)
    yield "model(params=list)", lambda k: k.model("m", [np.zeros(2, np.float32)], sgd)
    yield "model with int names", lambda k: k.model("m", {0: np.zeros(2, np.float32)}, sgd)
    yield "model(groups=pairs)", lambda k: k.model("m", w, sgd, groups=[("w", sgd)])
    yield "model(clip_norm=inf)", lambda k: k.model("m", w, sgd, clip_norm=1e400)
    yield "model(nonfinite=1)", lambda k: k.model("m", w, sgd, nonfinite=1)
    yield "table(name=None)", lambda k: k.table(None, 2, sgd)
    yield "table(dim=2.0)", lambda k: k.table("t", 2.0, sgd)
    yield "table(seed=None)", lambda k: k.table("t", 2, sgd, seed=None)
    yield "pull of bools", lambda k: k.table("t", 2, sgd).pull([True])
    yield "push of a list", lambda k: k.model("net", ones(), sgd).push([1.0])
    yield "assign of a list", lambda k: k.model("net", ones(), sgd).assign([1.0])
    yield "set(lr='high')", lambda k: k.model("net", ones(), sgd).set(lr="high")
    yield "set(group='w')", lambda k: k.model("net", ones(), sgd).set(group="w", lr=1.0)
    yield "step(read='net')", lambda k: k.step(read="net")
    yield "step(read=[3])", lambda k: k.step(read=[3])
    yield "step(read=None)", lambda k: k.step(read=None)
    yield "step(weight='1')", lambda k: k.step(weight="1")
    yield "batches(shuffle='no')", lambda k: k.batches(np.arange(4), 2, shuffle="no")
    yield "batches(shuffle=2)", lambda k: k.batches(np.arange(4), 2, shuffle=2)
    yield "batches(drop_last=None)", lambda k: k.batches(np.arange(4), 2, drop_last=None)
    yield "batches(seed='x')", lambda k: k.batches(np.arange(4), 2, seed="x")
    yield "splits(epochs=1.5)", lambda k: k.splits(10, epochs=1.5)
    yield "epochs('all')", lambda k: k.epochs("all")
    yield "log(loss='high')", lambda k: k.log(loss="high")
    yield "sum(x=None)", lambda k: k.sum(x=None)
    yield "keep(x=object)", lambda k: k.keep(x=object())


@pytest.mark.parametrize(
    ("what", "call"), list(_wrong_types()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_an_argument_of_a_wrong_type_is_refused_and_the_worker_goes_on(worker, model, what, call):
    with pytest.raises(UsageError):
        call(worker)
    model.push(ones())
    assert worker.step().version == 1
    assert (model.pull()["w"] == 0).all()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_yes_or_no_may_be_a_number_or_numpy_s(mode):
    with hw.Cluster(workers=1, sync=mode, deadline=20) as cluster, cluster.worker() as worker:
        for shuffle in (1, np.True_, 0):
            read = [worker.step() and batch for batch in worker.batches(np.arange(4), 2, shuffle=shuffle)]
            assert sorted(np.concatenate(read)) == [0, 1, 2, 3]


def test_a_model_that_no_message_can_hold_is_refused_where_it_is_declared(worker, model):
    names = [f"{'a long name ' * 1000}{number}" for number in range(800)]
    with pytest.raises(RegistrationError, match=r"800 tensors take 9,.* bytes, at most 8,388,608"):
        worker.model("large", {name: np.zeros(1, np.float32) for name in names}, hw.SGD(lr=1.0))
    assert worker.step().version == 1


@pytest.mark.parametrize("servers", [1, 2])
def test_a_request_that_cannot_be_sent_is_refused_before_any_of_it_is_and_the_worker_goes_on(servers):
    with (
        hw.Cluster(workers=1, servers=servers, sync="async", deadline=20) as cluster,
        cluster.worker() as worker,
    ):
        client = worker._session
        for values in ({"x": object()}, {"x" * (17 << 20): 1.0}):
            number = client.machine.number
            with pytest.raises(UsageError, match="cannot be sent"):
                client.ask(lambda number, values=values: m.Meet(number, "sum", values), "sum")
            assert client.machine.number == number
        assert worker.step().version == 1


def test_a_prefetch_that_cannot_be_sent_is_refused_and_the_worker_goes_on(worker):
    client = worker._session
    with pytest.raises(UsageError, match="cannot be sent"):
        client.begin(lambda server, number: Outgoing(m.Pull(number, ("x", object()), 0)), "x", None, print)
    assert worker.step().version == 1


@pytest.mark.parametrize(
    ("params", "rule", "options", "text"),
    [
        ({}, hw.SGD(lr=1.0), {}, "model 'net' has no tensors"),
        ({"w": np.ones(2)}, hw.SGD(lr=1.0), {}, "'w' is float64.*astype"),
        ({"w": np.ones(2, np.int32)}, hw.SGD(lr=1.0), {}, "'w' has dtype int32"),
        ({"w": np.ones(2, np.complex64)}, hw.SGD(lr=1.0), {}, "'w' must be of a real dtype"),
        ({"w": object()}, hw.SGD(lr=1.0), {}, "'w'"),
        ({"w": np.ones(2, np.float32)}, 0.1, {}, "rule must be a Rule such as"),
        ({"w": np.ones(2, np.float32)}, RowwiseAdagrad(lr=1.0), {}, "is a rule for tables' rows only"),
        (
            {"w": np.ones(2, np.float32)},
            hw.SGD(lr=1.0),
            {"groups": [hw.Group(["v"], hw.SGD(lr=2.0))]},
            "a group names 'v', the tensors are 'w'",
        ),
        (
            {"w": np.ones(2, np.float32)},
            hw.SGD(lr=1.0),
            {"groups": [hw.Group(["w"], hw.Adam())]},
            "one kind of rule, got SGD and Adam",
        ),
    ],
)
def test_what_is_no_model_cannot_be_registered(worker, params, rule, options, text):
    with pytest.raises(RegistrationError, match=text):
        worker.model("net", params, rule, **options)
    worker.model("net", {"w": np.ones(2, np.float32)}, hw.SGD(lr=1.0))


@pytest.mark.parametrize(
    ("params", "rule", "text"),
    [
        (
            {"w": (2, 4), "b": (3,)},
            hw.SGD(lr=1.0),
            r"exists with other tensors .*w float32\[2, 3\].*w float32\[2, 4\]",
        ),
        ({"w": (2, 3)}, hw.SGD(lr=1.0), "exists with other tensors"),
        (SHAPES, hw.Adam(), r"exists with rule \['SGD'\], got \['Adam'\]"),
    ],
)
def test_a_second_model_of_the_name_must_be_the_same(worker, model, params, rule, text):
    with pytest.raises(RegistrationError, match=text):
        worker.model("net", {name: np.zeros(shape, np.float32) for name, shape in params.items()}, rule)
    assert (model.pull()["w"] == 1).all()


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        ({"x": np.ones(3)}, "model 'net' has no tensor 'x', it has 'w', 'b'"),
        ({"w": np.ones((3, 2))}, r"'w' of model 'net' has shape \(2, 3\), got \(3, 2\)"),
        ({"w": np.ones((2, 3)), "b": np.ones(4)}, r"'b' of model 'net' has shape \(3,\), got \(4,\)"),
        ({"b": np.array(["a", "b", "c"])}, "'b' must be of a real dtype"),
        ({"b": np.ones(3, np.complex64)}, "'b' must be of a real dtype"),
        ({"b": [[1], [1, 2], [3]]}, "cannot read a list as an array"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_and_nothing_is_staged(worker, model, grads, text):
    with pytest.raises(GradientError, match=text):
        model.push(grads)
    with pytest.raises(GradientError, match=text):
        model.assign(grads)
    assert worker.step().contributors == 0
    assert all((values == 1).all() for values in model.pull().values())


def test_refused_calls_of_every_kind_change_nothing(worker, model):
    table = worker.table("rows", 2, hw.SGD(lr=1.0))
    table.push([1, 2], -np.ones((2, 2)))
    assert worker.step().version == 1
    calls = {
        "an unknown setting": lambda: model.set(rate=2.0),
        "a setting of an unknown group": lambda: model.set(group=1, lr=2.0),
        "a setting of a table": lambda: table.set(rate=2.0),
        "another model of the name": lambda: worker.model(
            "net", {"w": np.zeros(9, np.float32)}, hw.SGD(lr=2.0)
        ),
        "another table of the name": lambda: worker.table("rows", 3, hw.SGD(lr=2.0)),
        "a gradient of no tensor": lambda: model.push({"w": np.ones((2, 3)), "x": np.ones(3)}),
        "a gradient that is not finite": lambda: model.push({"w": np.ones((2, 3)), "b": [1.0, np.nan, 1.0]}),
        "values of no tensor": lambda: model.assign({"w": np.zeros((2, 3)), "x": np.ones(3)}),
        "rows of another number": lambda: table.push([1, 2], np.ones((3, 2))),
        "rows of another dim": lambda: table.push([1, 2], np.ones((2, 3))),
        "rows that are not finite": lambda: table.push([1, 2], [[1.0, 1.0], [np.inf, 1.0]]),
        "ids that are no integers": lambda: table.push([1.5], np.ones((1, 2))),
        "rows to assign of another number": lambda: table.assign([1, 2], np.ones((3, 2))),
        "batches of nothing": lambda: worker.batches(np.ones(4), batch_size=0),
    }
    for what, call in calls.items():
        with pytest.raises(HeadwaterError):
            pytest.fail(f"{what} was not refused, but gave {call()}")
    result = worker.step()
    assert (result.version, result.contributors) == (2, 0)
    assert all((values == 1).all() for values in model.pull().values())
    assert table.pull([1, 2, 3]).tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    model.push(ones())
    table.push([1], np.ones((1, 2)))
    worker.step()
    assert all((values == 0).all() for values in model.pull().values())
    assert table.pull([1]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("again", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_whole(worker, model, bad, dtype, again):
    if again:
        model.push(ones())
    grads = {"b": np.ones(3, dtype), "w": np.ones((2, 3), dtype)}
    grads["w"][1, 2] = bad
    with pytest.raises(NonFiniteError, match="'w' of model 'net' holds NaN or infinity"):
        model.push(grads)
    assert worker.step().contributors == int(again)
    assert all((values == 1 - again).all() for values in model.pull().values())


def test_a_gradient_that_is_not_finite_can_make_an_empty_turn(worker):
    model = worker.model("net", ones(), hw.SGD(lr=1.0), nonfinite="skip")
    model.push(ones())
    model.push({"b": np.full(3, np.nan)})
    assert worker.step().contributors == 0
    assert worker.statistics().skipped == 1
    assert (model.pull()["b"] == 1).all()


def test_a_gradient_that_is_not_finite_passes_when_the_test_is_off(worker):
    model = worker.model("net", ones(), hw.SGD(lr=1.0), nonfinite="off")
    model.push({"b": np.full(3, np.inf)})
    worker.step()
    assert (model.pull()["b"] == -np.inf).all()


def test_arrays_need_not_be_contiguous(worker, model):
    model.push({"w": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.arange(6.0)[::2]})
    worker.step()
    assert model.pull()["w"].tolist() == [[1, 0, -1], [-2, -3, -4]]
    assert model.pull()["b"].tolist() == [1, -1, -3]


def test_settings_the_rule_does_not_have_are_refused(worker, model):
    with pytest.raises(ConfigurationError, match="lr"):
        model.set(rate=1.0)
    with pytest.raises(ConfigurationError, match="group must be at most 0, got 1"):
        model.set(group=1, lr=1.0)


def test_calls_after_leave_are_refused(worker, model):
    worker.leave()
    calls = [worker.step, worker.barrier, worker.sum, worker.stop, model.pull]
    calls += [
        lambda: model.push(ones()),
        lambda: model.assign(ones()),
        lambda: worker.model("m", ones(), hw.SGD(lr=1.0)),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="worker 0 has left the cluster"):
            call()


@pytest.mark.parametrize(
    ("dataset", "options", "text"),
    [
        (np.ones(4), {"batch_size": 0}, "batch_size must be an integer ≥ 1, got 0"),
        (np.ones(4), {"batch_size": 1, "epochs": -1}, "epochs must be an integer ≥ 0, got -1"),
        ((np.ones(4), np.ones(5)), {"batch_size": 1}, r"one length, got \[4, 5\]"),
        (iter([1]), {"batch_size": 1}, "needs __len__ and __getitem__"),
    ],
)
def test_impossible_batches_are_refused(worker, dataset, options, text):
    with pytest.raises(ConfigurationError, match=text):
        worker.batches(dataset, **options)


@pytest.mark.parametrize(
    "address", ["nonsense", "unix:@headwater-nobody", "tcp:127.0.0.1:1", "tcp:127.0.0.1:x"]
)
def test_an_address_where_nobody_is_says_so(address):
    with pytest.raises((ConnectionLostError, ConfigurationError), match=address.split(":")[-1]):
        hw.connect(address)


# ── what a stranger sends ───────────────────────────────────────────────────────────────────────


def _bytes_of_strangers():
    good = frames.encode(m.Hello(1, "worker", 1))
    claim = struct.pack("<4sHHIQQ", b"HWTR", frames.VERSION, 0, 2**31, 0, 0)
    payload = struct.pack("<4sHHIQQ", b"HWTR", frames.VERSION, 0, 1, 2**63, 0)
    noise = random.Random(7)
    yield "http", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield "truncated prefix", good[:5]
    yield "truncated header", good[:-1]
    yield "another version", good[:4] + b"\xff\xff" + good[6:]
    yield "oversized header", claim
    yield "oversized payload", payload
    yield "unknown message", good[:8] + struct.pack("<IQQ", 4, 0, 0) + msgspec.msgpack.encode({"a": 1})[:4]
    yield "nothing", b""
    for i in range(20):
        yield f"noise {i}", noise.randbytes(noise.randrange(1, 300))


def _addresses(cluster):
    return [node.address for node in cluster.statistics().nodes if node.role in ("coordinator", "server")]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_bytes_of_strangers_close_their_connection_and_change_nothing(transport):
    with (
        hw.Cluster(workers=1, servers=2, transport=transport, deadline=30) as cluster,
        cluster.worker() as worker,
    ):
        model = worker.model("net", ones(), hw.Accumulate())
        for step, (_, data) in enumerate(_bytes_of_strangers(), start=1):
            for address in _addresses(cluster):
                with _connect(address) as stranger:
                    stranger.sendall(data)
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(4096):
                        pass
            model.push(ones())
            assert worker.step().version == step
        assert (model.pull()["w"] == 1 + step).all()


def _connect(address):
    kind, _, rest = address.partition(":")
    if kind == "unix":
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect("\0" + rest.removeprefix("@") if rest.startswith("@") else rest)
    else:
        host, _, port = rest.rpartition(":")
        stranger = socket.create_connection((host, int(port)))
    stranger.settimeout(30)
    return stranger


def test_a_member_that_is_in_no_roster_is_refused_with_the_reason(cluster, model):
    for address in _addresses(cluster)[1:]:
        channel = dial(address, timeout=5)
        channel.send(m.Hello(999, "worker", 1))
        received = channel.receive(timeout=5)
        term = cluster.statistics().term
        assert received.message == m.Refused(
            "RefusedError", f"member 999 is not in the roster of term {term}: join the coordinator first"
        )
        channel.close()


def test_a_rank_that_is_taken_is_refused(cluster, worker):
    with pytest.raises(RefusedError, match="worker rank 0 is taken by a living worker"):
        hw.Worker(cluster.address, rank=0)


class _Attacker:
    """An observer that knows the protocol and breaks it."""

    def __init__(self, cluster):
        self._session = Client(cluster.address, "observer")
        self.channel = self._session.channels[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._session.close()

    def is_hung_up_on(self, message, buffers=(), descriptors=()):
        try:
            self.channel.send(message, buffers=buffers, descriptors=descriptors)
            received = self.channel.receive(timeout=10)
            if received is not None:  # it is told why
                assert received.message.error == "ProtocolError"
                received = self.channel.receive(timeout=10)
            return received is None
        except ConnectionLostError:
            return True


def _broken_requests():
    step = m.Step(1, 1, 0, (), (), True)
    carried = m.Carried(0, b"\x03")
    yield "step of a model it did not register", msgspec.structs.replace(step, carried=(carried,))
    yield "step out of order", msgspec.structs.replace(step, step=5)
    yield "pull of an unknown model", m.Pull(1, (7,), 0)
    yield "assign to an unknown model", m.Assign(1, m.Carried(7, b"\x01"))
    yield (
        "settings of an unknown model",
        msgspec.structs.replace(step, settings=(m.Setting(7, 0, {"lr": 1.0}),)),
    )
    yield "attach to an unknown model", m.Attach(1, 7, None)
    yield "a window without descriptor", m.Attach(1, 0, m.WindowSpec(8192))
    yield "a message no member sends", m.Entries(())
    yield "a barrier of an observer", m.Meet(1, "barrier", {})
    yield "a step of an observer", step


@pytest.mark.parametrize(
    ("what", "request_"), list(_broken_requests()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_request_that_breaks_the_protocol_ends_its_connection_only(cluster, worker, model, what, request_):
    with _Attacker(cluster) as attacker:
        assert attacker.is_hung_up_on(request_), what
    model.push(ones())
    worker.step()
    assert (model.pull()["w"] == 0).all()


@pytest.mark.parametrize("claim", [4096, 8192 + 4096, 2**40, 0, -1])
def test_a_window_that_is_not_as_large_as_it_claims_ends_its_connection_only(cluster, worker, model, claim):
    window = Window(1024)
    with _Attacker(cluster) as attacker:
        assert attacker.is_hung_up_on(m.Attach(1, 0, m.WindowSpec(claim)), descriptors=[window.descriptor])
    window.release()
    assert (model.pull()["w"] == 1).all()


def test_a_descriptor_that_is_no_window_ends_its_connection_only(cluster, worker, model, tmp_path):
    (tmp_path / "file").write_bytes(bytes(8192))
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    with _Attacker(cluster) as attacker:
        assert attacker.is_hung_up_on(m.Attach(1, 0, m.WindowSpec(8192)), descriptors=[descriptor])
    os.close(descriptor)
    assert (model.pull()["w"] == 1).all()


@pytest.mark.parametrize("run", [(0, 2048), (-1024, 0), (5, 2), (2**62, 2**62 + 4)])
def test_payload_outside_the_servers_range_ends_its_connection_only(run):
    with hw.Cluster(workers=1, transport="tcp", deadline=30) as cluster, cluster.worker() as worker:
        model = worker.model("net", ones(), hw.SGD(lr=1.0))
        broken = m.Step(2, 1, 0, (m.Carried(0, b"\x03"),), (), True, (m.Run(0, *run),))
        with pytest.raises(ProtocolError):
            worker._session.call(
                lambda server, number: Outgoing(
                    broken, [np.zeros(max(1, min(run[1] - run[0], 9999)), np.float32)]
                ),
                "step",
            )
        assert (cluster.parameters()[1]["net"]["w"] == 1).all()
        assert model


def test_a_second_connection_of_a_member_is_refused_and_the_first_goes_on(cluster, worker, model):
    channel = dial(_addresses(cluster)[1], timeout=5)
    channel.send(m.Hello(worker._session.welcome.member.id, "worker", 1))
    assert "is connected to this server already" in channel.receive(timeout=5).message.reason
    channel.close()
    assert worker.step().version == 1
