"""State dicts: an optimizer's own and torch's of the same rule go on where they were saved."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch_loops import STEPS, loss_of, network, optimizer, reference, train

import headwater as hw
from headwater.errors import ConfigurationError, GradientError, UsageError, WorkerError

RULES = {
    "sgd": (hw.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        hw.SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    ),
    "nesterov": (
        hw.SGD(lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adagrad": (
        hw.Adagrad(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    ),
    "rmsprop": (
        hw.RMSprop(lr=0.01, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    ),
    "adam": (hw.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "amsgrad": (
        hw.Adam(lr=0.01, betas=(0.8, 0.9), amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), amsgrad=True),
    ),
    "adamw": (hw.AdamW(lr=0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
}


def steps(net, opt, first, last, rank):
    for step in range(first, last):
        opt.zero_grad()
        loss_of(net, step, rank).backward()
        opt.step()


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file)


def bits(result):
    return {name: value.tobytes() for name, value in result.parameters["model"].items()}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_loads_what_another_saved_ends_with_the_bits_of_one_that_was_not_interrupted(
    kind, workers
):
    rule = RULES[kind][0]

    def whole(worker):
        net = network()
        steps(net, optimizer(worker, net, rule), 0, STEPS, worker.rank)

    def first(worker):
        net = network()
        opt = optimizer(worker, net, rule)
        steps(net, opt, 0, 3, worker.rank)
        return {"model": copy.deepcopy(net.state_dict()), "optimizer": opt.state_dict()}

    def second(worker):
        net = network(seed=1 + worker.rank)
        opt = optimizer(worker, net, rule)
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        steps(net, opt, 3, STEPS, worker.rank)
        return {name: one["step"] for name, one in opt.state_dict()["state"].items()}

    saved = through_a_file(train(first, workers=workers, servers=2).values[0])
    result = train(second, workers=workers, servers=3)
    assert bits(result) == bits(train(whole, workers=workers))
    assert set(result.values[0].values()) == {STEPS}


@pytest.mark.parametrize("kind", RULES)
def test_what_torchs_optimizer_of_the_rule_saved_goes_on_as_in_torch(kind):
    rule, make = RULES[kind]
    net = network()
    own = make(net.parameters())
    steps(net, own, 0, 3, 0)
    saved = through_a_file({"model": net.state_dict(), "optimizer": own.state_dict()})

    def work(worker):
        net = network(seed=1)
        opt = optimizer(worker, net, rule)
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        steps(net, opt, 3, STEPS, 0)

    got = train(work).parameters["model"]
    for name, value in reference(lambda net: [make(net.parameters())], 1).items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-5, atol=2e-6)


def test_settings_are_those_of_the_saved_groups():
    net = network()
    own = torch.optim.SGD(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.2}], lr=0.4
    )
    saved = own.state_dict()

    def work(worker):
        net = network()
        groups = [{"params": list(net[2].parameters())}]
        opt = optimizer(worker, net, hw.SGD(lr=0.1), groups=groups)
        opt.load_state_dict(saved)
        steps(net, opt, 0, 1, 0)
        return [group["lr"] for group in opt.param_groups], [rule.lr for rule in opt._model.rules]

    assert train(work).values == [([0.4, 0.2], [0.4, 0.2])]


def test_a_schedule_on_the_servers_goes_on_where_it_was():
    rule = hw.SGD(lr=hw.StepDecay(1.0, every=1, factor=0.5))

    def rates(worker, saved=None):
        net = network()
        opt = optimizer(worker, net, rule)
        if saved:
            opt.load_state_dict(saved)
        shown = []
        for step in range(3):
            steps(net, opt, step, step + 1, 0)
            shown.append(opt.param_groups[0]["lr"])
        return shown, opt.state_dict()

    ((first, saved),) = train(rates).values
    ((second, _),) = train(lambda worker: rates(worker, saved)).values
    assert first + second == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_parameters_that_had_no_gradient_yet_begin_as_new_ones():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.1))
        net[0].weight.grad = torch.ones_like(net[0].weight)
        opt.step()
        saved = opt.state_dict()
        del saved["state"]["0.bias"]
        steps(net, opt, 0, 2, 0)
        opt.load_state_dict(saved)
        return {name: one["step"] for name, one in opt.state_dict()["state"].items()}

    assert train(work).values == [{"0.weight": 1, "0.bias": 0, "2.weight": 0, "2.bias": 0}]


def test_frozen_parameters_of_the_saved_optimizer_are_passed_over():
    net = network()
    net[0].requires_grad_(False)
    own = torch.optim.Adam(net.parameters(), lr=0.01)
    steps(net, own, 0, 2, 0)

    def work(worker):
        net = network()
        net[0].requires_grad_(False)
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        opt.load_state_dict(own.state_dict())
        return {name: one["step"] for name, one in opt.state_dict()["state"].items()}

    assert train(work).values == [{"2.weight": 2, "2.bias": 2}]


def test_a_state_that_is_loaded_in_the_middle_takes_training_back():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        steps(net, opt, 0, 2, worker.rank)
        best = copy.deepcopy(net.state_dict()), opt.state_dict()
        ends = []
        for _ in range(2):
            steps(net, opt, 2, 4, worker.rank)
            ends.append(copy.deepcopy(net.state_dict()))
            net.load_state_dict(best[0])
            opt.load_state_dict(best[1])
        return all(ends[0][name].equal(ends[1][name]) for name in ends[0])

    assert train(work, workers=2, servers=2).values == [True, True]


def test_ranks_that_load_different_states_are_refused():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        saved = opt.state_dict()
        for one in saved["state"].values():
            one["step"] = 1 + worker.rank
        opt.load_state_dict(saved)
        steps(net, opt, 0, 1, worker.rank)

    with pytest.raises(WorkerError, match="UsageError: the ranks disagree about the states of model 'model'"):
        train(work, workers=2)


def test_one_rank_may_load_alone():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        if worker.rank == 1:
            saved = opt.state_dict()
            for one in saved["state"].values():
                one["step"] = 7
            opt.load_state_dict(saved)
        worker.barrier()
        return {one["step"] for one in opt.state_dict()["state"].values()}

    assert train(work, workers=2).values == [{7}, {7}]


def test_a_resumed_program_keeps_the_state_that_training_had_reached(tmp_path, caplog):
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        fresh = opt.state_dict()
        for one in fresh["state"].values():
            one["step"] = 0
        opt.load_state_dict(fresh)
        steps(net, opt, 0, 2, 0)
        return {one["step"] for one in opt.state_dict()["state"].values()}

    assert train(work, checkpoint=tmp_path).values == [{2}]
    assert train(work, checkpoint=tmp_path, resume=True).values == [{4}]
    assert any(
        "the state dict that the program loads before its first step is not taken" in one
        for one in caplog.messages
    )


# ── what does not fit ───────────────────────────────────────────────────────────────────────────


def changed(saved, **of_first):
    """The state dict with changes to the state of its first tensor."""
    saved = copy.deepcopy(saved)
    saved["state"]["0.weight"].update(of_first)
    return saved


def without(saved, key):
    saved = copy.deepcopy(saved)
    del saved["state"]["0.weight"][key]
    return saved


def torchs(make):
    net = network()
    own = make(net.parameters())
    steps(net, own, 0, 1, 0)
    return own.state_dict()


MISFITS = {
    "not a state dict": (
        lambda saved: {"epoch": 3},
        ConfigurationError,
        "'state' and 'param_groups', got 'epoch'",
    ),
    "nothing": (lambda saved: None, ConfigurationError, "'state' and 'param_groups', got NoneType"),
    "another shape": (
        lambda saved: changed(saved, exp_avg=torch.zeros(2, 2)),
        GradientError,
        r"'exp_avg' of tensor '0.weight' of model 'model' has shape \(7, 5\), got \(2, 2\)",
    ),
    "an unknown state": (
        lambda saved: changed(saved, max_exp_avg_sq=torch.zeros(7, 5)),
        GradientError,
        "'0.weight' of model 'model' has no state 'max_exp_avg_sq', its rule has 'exp_avg', 'exp_avg_sq'",
    ),
    "a missing state": (
        lambda saved: without(saved, "exp_avg"),
        GradientError,
        "its state 'exp_avg' is missing",
    ),
    "no count": (lambda saved: without(saved, "step"), GradientError, "lacks 'step'"),
    "half an update": (lambda saved: changed(saved, step=0.5), GradientError, "whole number ≥ 0, got 0.5"),
    "fewer than none": (lambda saved: changed(saved, step=-1), GradientError, "whole number ≥ 0, got -1"),
    "an unknown parameter": (
        lambda saved: {**saved, "state": {**saved["state"], "9.weight": {"step": 1}}},
        ConfigurationError,
        "a state of parameter '9.weight', this optimizer trains '0.weight'",
    ),
    "another rule's own": (lambda saved: {**saved, "rule": "SGD"}, ConfigurationError, "is of rule SGD"),
    "torch's SGD": (
        lambda saved: torchs(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ConfigurationError,
        "lack 'betas', 'eps', 'amsgrad': it is of another optimizer than Adam",
    ),
    "torch's AdamW": (
        lambda saved: torchs(lambda p: torch.optim.AdamW(p, lr=0.1)),
        ConfigurationError,
        "is of AdamW, this optimizer has Adam",
    ),
    "torch's Adam with amsgrad": (
        lambda saved: torchs(lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True)),
        ConfigurationError,
        "amsgrad cannot change to True",
    ),
    "torch's Adam that maximises": (
        lambda saved: torchs(lambda p: torch.optim.Adam(p, lr=0.1, maximize=True)),
        ConfigurationError,
        "maximize=True, which Adam cannot",
    ),
    "two groups": (
        lambda saved: {**saved, "param_groups": saved["param_groups"] * 2},
        ConfigurationError,
        "has 2 parameter groups, this optimizer has 1",
    ),
    "other parameters": (
        lambda saved: torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict(),
        ConfigurationError,
        r"groups of \[2\] parameters, this optimizer trains \[4\]",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_dict_that_does_not_fit_is_refused_with_what_and_nothing_changes(kind):
    make, error, text = MISFITS[kind]

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        steps(net, opt, 0, 2, 0)
        before = opt.state_dict()
        with pytest.raises(error, match=text):
            opt.load_state_dict(make(before))
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for name, one in before["state"].items():
            assert all(np.array_equal(value, after["state"][name][key]) for key, value in one.items())
        steps(net, opt, 2, 3, 0)

    train(work)


def test_gradients_that_are_held_back_are_not_mixed_with_a_loaded_state():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, push_every=2, rule=hw.SGD(lr=0.1))
        saved = opt.state_dict()
        steps(net, opt, 0, 1, 0)
        with pytest.raises(UsageError, match=r"held back.*flush\(\)"):
            opt.load_state_dict(saved)
        opt.flush()
        opt.load_state_dict(saved)

    train(work, sync="async")


# ── plain models ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("servers", [1, 3])
def test_the_state_of_a_model_is_set_to_what_it_was(transport, servers):
    def work(worker):
        values = {"a": np.zeros(3, np.float32), "b": np.zeros((40, 50), np.float32)}
        groups = [hw.Group(["a"], hw.Adam(lr=0.1, betas=(0.5, 0.5)))]
        model = worker.model("m", values, hw.Adam(lr=0.1), groups=groups)

        def step():
            model.push({"a": np.arange(1.0, 4.0), "b": np.full((40, 50), 2.0)})
            worker.step()
            return {name: value.copy() for name, value in model.pull().items()}

        at = step()
        kept, expected = model.state(), step()
        step()
        version = worker.version
        model.load_state(kept)
        assert worker.version == version + 1
        model.assign(at)
        again = step()
        assert all((again[name] == expected[name]).all() for name in expected)
        model.load_state({"a": {"step": 0}})
        state = model.state()
        assert (state["a"]["step"], state["b"]["step"]) == (0, 2)
        assert not state["a"]["exp_avg"].any()
        assert state["b"]["exp_avg"].any()
        with pytest.raises(GradientError, match="no tensor 'c', it has 'b', 'a'"):
            model.load_state({"c": {"step": 0}})

    train(work, servers=servers, transport=transport)
