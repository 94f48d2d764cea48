"""`clip_norm` through whole clusters: against torch, the same bits however cut, and whoever is killed."""

import functools
import os
import signal
import time

import numpy as np
import pytest
import torch
from clusters import model_spec
from test_training import train
from torch_loops import STEPS, assert_agrees, loss_of, network, optimizer, reference

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError, RegistrationError
from headwater.shard import Shard

HALVES = 0.5 * (5 + 1e-6)
"""Scales a gradient of norm 5 by exactly one half."""


@pytest.mark.parametrize("workers", [1, 3])
def test_clipped_training_agrees_with_torch_in_one_process(workers):
    norms = []

    def clip(net):
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.4)))

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01, weight_decay=0.1), clip_norm=0.4)
        seen = []
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, worker.rank).backward()
            opt.step()
            seen.append(opt.result.norms["model"])
        return seen

    expected = reference(
        lambda net: [torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.1)], workers, adjust=clip
    )
    result = train(work, workers=workers, servers=2)
    assert_agrees(result.parameters["model"], expected, atol=1e-6)
    assert max(norms) > 0.4
    for seen in result.values:
        np.testing.assert_allclose(seen, norms, rtol=1e-5)


def bits(servers, transport="unix", clip_norm=0.5, replicas=0):
    def work(worker):
        numbers = np.random.default_rng(worker.rank)
        shapes = {"w": (83, 71), "b": (513,)}
        values = {name: np.full(shape, 0.25, np.float32) for name, shape in shapes.items()}
        model = worker.model("net", values, hw.AdamW(0.01), clip_norm=clip_norm)
        norms = []
        for _ in range(5):
            model.push({name: numbers.standard_normal(shape) for name, shape in shapes.items()})
            norms.append(worker.step().norms)
        return norms

    result = train(work, workers=3, servers=servers, transport=transport, replicas=replicas)
    assert all(norms == result.values[0] for norms in result.values)
    return result.values[0], {name: array.tobytes() for name, array in result.parameters["net"].items()}


def test_clipped_training_gives_the_same_bits_for_any_number_of_servers():
    expected = bits(1)
    assert all(bits(servers) == expected for servers in (2, 3, 4, 5))
    assert bits(2, "tcp") == expected
    assert bits(2, replicas=1) == expected
    assert bits(1, clip_norm=None)[1] != expected[1]


@pytest.mark.parametrize("mode", ["async", "ssp:1"])
def test_without_rounds_every_update_is_clipped_by_its_own_norm(mode):
    def work(worker):
        model = worker.model("m", {"v": np.zeros(5000, np.float32)}, hw.Accumulate(), clip_norm=HALVES)
        for _ in range(20):
            for first, last, norm in ((3, 4, 5.0), (1, 0, 1.0)):
                gradient = np.zeros(5000)
                gradient[[worker.rank, -1]] = first, last
                model.push({"v": gradient})
                assert worker.step().norms == {"m": norm}

    values = train(work, workers=3, servers=2, sync=mode).parameters["m"]["v"]
    assert values[:3].tolist() == [20 * (1.5 + 1)] * 3
    assert values[-1] == 3 * 20 * 2.0
    assert np.count_nonzero(values) == 4


def test_a_gradient_that_is_not_finite_makes_all_of_its_commit_so_as_in_torch():
    def work(worker):
        model = worker.model(
            "m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=1.0, nonfinite="off"
        )
        model.push({"v": [1.0, np.nan, 2.0, 3.0]})
        return np.isnan(worker.step().norms["m"])

    result = train(work, workers=1, servers=2)
    assert result.values == [True]
    assert np.isnan(result.parameters["m"]["v"]).all()


def test_workers_must_agree_on_the_limit():
    def work(worker):
        worker.model("m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=1)
        for other in (2.0, None):
            with pytest.raises(RegistrationError, match=f"exists with clip_norm=1.0, got clip_norm={other}"):
                worker.model("m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=other)

    train(work, workers=1, servers=2)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_an_impossible_limit_is_refused(bad):
    def work(worker):
        with pytest.raises(ConfigurationError, match="clip_norm must be a finite number > 0"):
            worker.model("m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=bad)
        with pytest.raises(ConfigurationError, match="clip_norm must be a finite number > 0"):
            optimizer(worker, network(), hw.SGD(lr=0.1), clip_norm=bad)

    train(work, workers=1)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_server_refuses_an_impossible_limit_whoever_sends_it(bad):
    spec = model_spec(clip_norm=bad)
    with pytest.raises(RegistrationError, match="expected a number > 0"):
        Shard(0, 1, "mean").hold(1, m.Register(1, spec, None))


def test_a_module_of_tables_alone_has_nothing_to_clip():
    def work(worker):
        net = hw.torch.Embedding(worker, "rows", 4, hw.SGD(lr=0.1))
        with pytest.raises(ConfigurationError, match="rows of tables only"):
            optimizer(worker, net, None, clip_norm=1.0)

    train(work, workers=1)


def test_after_a_resume_the_limit_may_be_another_and_says_so(tmp_path, caplog):
    def work(clip_norm, worker):
        model = worker.model("m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=clip_norm)
        model.push({"v": [3.0, 4.0, 0.0, 0.0]})
        worker.step()
        with pytest.raises(RegistrationError, match=f"exists with clip_norm={clip_norm}"):
            worker.model("m", {"v": np.zeros(4, np.float32)}, hw.Accumulate(), clip_norm=7.0)

    options = {"workers": 2, "servers": 2, "sync": "async", "checkpoint": tmp_path}
    first = train(functools.partial(work, HALVES), **options)
    assert first.parameters["m"]["v"].tolist() == [3.0, 4.0, 0.0, 0.0]
    again = train(functools.partial(work, None), resume=True, **options)
    assert again.parameters["m"]["v"].tolist() == [9.0, 12.0, 0.0, 0.0]
    said = [record.message for record in caplog.records if "in the checkpoint" in record.message]
    assert said == [f"model 'm': clip_norm was {HALVES} in the checkpoint and is None from now on"]


# ── real processes ──────────────────────────────────────────────────────────────────────────────


def halving(folder, worker):
    """Push what is halved until the test has killed what it wants to kill, and a while longer."""
    model = worker.model("m", {"v": np.zeros(9000, np.float32)}, hw.Accumulate(), clip_norm=HALVES)
    gradient = np.zeros(9000, np.float32)
    gradient[[worker.rank, -1]] = 3, 4
    left, steps = 30, 0
    while left:
        model.push({"v": gradient})
        assert worker.step().norms["m"] > 0
        steps += 1
        left -= (folder / "killed").exists()
    return steps


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_server_that_is_killed_leaves_no_trace_in_clipped_training(index, tmp_path):
    killed, began = [], time.monotonic()

    def kill(statistics):
        assert time.monotonic() < began + 100, statistics
        servers = [node for node in statistics.nodes if node.role == "server" and node.index == index]
        if statistics.version > 40 and not statistics.unreplicated and servers and not killed:
            killed.append(servers[0].pid)
            os.kill(servers[0].pid, signal.SIGKILL)
            (tmp_path / "killed").touch()

    result = hw.run(
        functools.partial(halving, tmp_path),
        workers=2,
        servers=2,
        sync="async",
        replicas=1,
        watch=kill,
        deadline=60,
    )
    assert len(killed) == 1
    values = result.parameters["m"]["v"]
    assert values[:2].tolist() == [1.5 * steps for steps in result.values]
    assert values[-1] == 2.0 * sum(result.values)
