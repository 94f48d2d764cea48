"""Minimising in portions: the optimum, and the same bits whoever computes, copies, dies or stands still."""

import math
import os
import signal
import time

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import ConfigurationError, WorkerError

SAMPLES, FEATURES = 240, 5


def samples():
    random = np.random.default_rng(1)
    x = random.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ np.arange(1.0, FEATURES + 1) + random.standard_normal(SAMPLES) > 0).astype(np.float32)
    return x, y


def logistic(params, batch):
    """The sum over samples, and its gradients; float64 inside."""
    x, y = (array.astype(np.float64) for array in batch)
    scores = x @ params["w"] + params["b"]
    share = len(y) / SAMPLES
    loss = np.sum(np.logaddexp(0, scores) - y * scores) + share * 0.5 * np.sum(params["w"] ** 2)
    slope = 1 / (1 + np.exp(-scores)) - y
    return loss, {"w": x.T @ slope + share * params["w"], "b": slope.sum()}


START = {"w": np.zeros(FEATURES, np.float32), "b": np.zeros((), np.float32)}


def found(loss=logistic, params=START, **options):
    options = {"engine": "inline", "deadline": 60, "portions": 12, "workers": 2, **options}
    return hw.minimize(loss, params, data=samples(), **options)


def bits(minimum):
    return b"".join(minimum.parameters[name].tobytes() for name in sorted(minimum.parameters))


def test_the_optimum_is_that_of_all_data():
    minimum = found()
    _, gradients = logistic({n: v.astype(np.float64) for n, v in minimum.parameters.items()}, samples())
    assert max(np.abs(gradient).max() for gradient in gradients.values()) < 1e-3
    assert minimum.report.loss == pytest.approx(logistic(minimum.parameters, samples())[0], rel=1e-6)
    assert len(minimum.computed) == 2
    assert sum(minimum.computed) == minimum.report.evaluations * 12 + minimum.copies


def test_the_bits_do_not_depend_on_workers_servers_or_copies():
    first = found(workers=1, servers=1, backup=False)
    for workers, servers, more in (
        (2, 2, {}),
        (3, 3, {"backup": False}),
        (4, 5, {"transport": "tcp"}),
    ):
        other = found(workers=workers, servers=servers, **more)
        assert (bits(other), other.report) == (bits(first), first.report)


def test_a_module_of_torch_is_minimised_and_left_as_it_is():
    module = torch.nn.Linear(FEATURES, 1)
    before = module.weight.detach().clone()

    def loss(module, batch):
        x, y = (torch.from_numpy(array) for array in batch)
        scores = module(x)[:, 0]
        summed = torch.nn.functional.binary_cross_entropy_with_logits(scores, y, reduction="sum")
        return summed + len(y) / SAMPLES * 0.5 * (module.weight**2).sum()

    minimum = found(loss, module)
    expected = found()
    assert torch.equal(module.weight, before)
    assert minimum.parameters["weight"][0] == pytest.approx(expected.parameters["w"], abs=1e-2)
    assert minimum.parameters["bias"][0] == pytest.approx(float(expected.parameters["b"]), abs=1e-2)


def test_a_loss_that_is_not_a_number_ends_it_and_says_so():
    def loss(params, batch):
        return math.nan, {name: value * math.nan for name, value in params.items()}

    minimum = found(loss)
    assert minimum.report.reason == "the loss is nan at the first point"
    assert bits(minimum) == bits_of(START)


def bits_of(values):
    return b"".join(values[name].tobytes() for name in sorted(values))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"portions": 3, "workers": 4}, "3 portions for 4 workers leave some with nothing to do"),
        ({"portions": 1000}, "1000 portions of 240 samples"),
        ({"portions": 0}, "portions must be an integer ≥ 1"),
        ({"workers": True}, "workers must be an integer ≥ 1"),
        ({"backup": 1}, "backup must be True or False"),
        ({"method": "lbfgs"}, "method must be an LBFGS"),
        ({"sync": "sync"}, "a schedule of its own"),
        ({"loss": 3}, "expected a function"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_starts(options, what):
    with pytest.raises(ConfigurationError, match=what):
        found(**options)


def test_a_loss_without_gradients_is_named():
    with pytest.raises(WorkerError, match=r"expected \(loss, dict of gradients\)"):
        found(lambda params, batch: 1.0)
    with pytest.raises(WorkerError, match="has no tensor 'other'"):
        found(lambda params, batch: (1.0, {"other": 1.0}))


# ── processes that die or stand still ───────────────────────────────────────────────────────────


def sabotage(tmp_path, what):
    """The loss, but the first process that computes its fifth portion dies or stands still, once."""
    calls = [0]

    def loss(params, batch):
        calls[0] += 1
        flag = tmp_path / "done"
        if calls[0] == 5:
            try:
                flag.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), what)
        return logistic(params, batch)

    return loss


@pytest.mark.long
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_changes_no_bit(tmp_path, what):
    expected = found()
    began = time.monotonic()
    minimum = found(sabotage(tmp_path, what), engine="local", workers=3, lease=5.0)
    assert (bits(minimum), minimum.report) == (bits(expected), expected.report)
    assert (tmp_path / "done").exists()
    assert time.monotonic() - began < 60


@pytest.mark.long
def test_a_server_that_is_killed_changes_no_bit(tmp_path):
    expected = found()
    killed = []

    def watch(statistics):
        if not killed and statistics.version > 20:
            server = next(one for one in statistics.nodes if one.role == "server" and one.index == 1)
            killed.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)

    def slowly(params, batch):
        time.sleep(0.01)
        return logistic(params, batch)

    minimum = found(slowly, engine="local", workers=2, servers=2, replicas=1, watch=watch)
    assert killed
    assert (bits(minimum), minimum.report) == (bits(expected), expected.report)


@pytest.mark.long
def test_when_the_process_that_decides_dies_all_ends_and_says_so():
    killed = []

    def watch(statistics):
        decides = [one for one in statistics.nodes if one.role == "worker" and one.rank == 2]
        if not killed and statistics.version > 20 and decides:
            killed.append(decides[0].pid)
            os.kill(decides[0].pid, signal.SIGKILL)

    def slowly(params, batch):
        time.sleep(0.01)
        return logistic(params, batch)

    with pytest.raises(WorkerError, match="the process that decides what is evaluated died: begin anew"):
        found(slowly, engine="local", workers=2, servers=1, watch=watch)
    assert killed
