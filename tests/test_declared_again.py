"""One name is one memory: what is declared again takes it over, what is another thing is refused."""

import gc
import logging

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import NonFiniteError, RegistrationError, UsageError


def alone(function, **options):
    """Run `function(worker)` as the only worker of a cluster, in this thread."""
    with hw.Cluster(workers=1, patience=5, deadline=60, **options) as cluster, cluster.worker() as worker:
        return function(worker)


def optimizer(worker, module, rule=None, **options):
    return hw.torch.DistributedOptimizer(worker, module, rule or hw.SGD(lr=1.0), **options)


def turn(opt, module, size=2):
    opt.zero_grad()
    module(torch.ones(1, size)).sum().backward()
    opt.step()


def zeros():
    return {"w": np.zeros(3, np.float32)}


# ── models and tables ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_model_declared_again_goes_on_in_its_memory_with_the_new_settings(transport, servers):
    with hw.Cluster(workers=1, servers=servers, transport=transport) as cluster, cluster.worker() as worker:
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        model.push({"w": np.ones(3)})
        worker.step()
        assert worker.model("m", zeros(), hw.SGD(lr=0.25)) is model
        model.push({"w": np.ones(3)})
        worker.step()
        assert model.pull()["w"].tolist() == [-1.25] * 3
        assert cluster.parameters()[1]["m"]["w"].tolist() == [-1.25] * 3
        assert model.rules == [hw.SGD(lr=0.25)]


def test_what_was_asked_for_before_a_declaration_is_replaced_by_it():
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        model.set(lr=8.0)
        worker.model("m", zeros(), hw.SGD(lr=1.0))
        model.push({"w": np.ones(3)})
        worker.step()
        assert model.pull()["w"].tolist() == [-1.0] * 3

    alone(work)


def test_a_schedule_that_is_declared_again_runs_on_the_servers():
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        worker.model("m", zeros(), hw.SGD(lr=hw.StepDecay(1.0, every=1, factor=0.5)))
        for _ in range(3):
            model.push({"w": -np.ones(3)})
            worker.step()
        assert model.pull()["w"].tolist() == [1.75] * 3
        model.set(lr=hw.Constant(4.0))
        model.push({"w": -np.ones(3)})
        worker.step()
        assert model.pull()["w"].tolist() == [5.75] * 3

    alone(work)


def test_groups_that_are_declared_again_have_their_own_new_settings():
    def work(worker):
        values = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
        model = worker.model("m", values, hw.SGD(lr=1.0), groups=[hw.Group(["b"], hw.SGD(lr=2.0))])
        worker.model("m", values, hw.SGD(lr=1.0), groups=[hw.Group(["b"], hw.SGD(lr=4.0))])
        model.push({"a": -np.ones(2), "b": -np.ones(2)})
        worker.step()
        assert {name: value.tolist() for name, value in model.pull().items()} == {"a": [1, 1], "b": [4, 4]}

    alone(work)


@pytest.mark.parametrize(
    ("params", "rule", "text"),
    [
        ({"v": np.zeros(3, np.float32)}, hw.SGD(lr=1.0), r"exists with other tensors.*name=…"),
        ({"w": np.zeros(4, np.float32)}, hw.SGD(lr=1.0), r"exists with other tensors.*name=…"),
        ({"w": np.zeros(3, np.float32)}, hw.Adam(lr=1.0), r"exists with rule \['SGD'\].*name=…"),
        ({"w": np.zeros(3, np.float32)}, hw.SGD(lr=1.0, momentum=0.5), r"momentum=0.5.*change which states"),
    ],
)
def test_another_model_under_a_taken_name_is_refused_and_the_first_trains_on(params, rule, text):
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        with pytest.raises(RegistrationError, match=text):
            worker.model("m", params, rule)
        model.push({"w": np.ones(3)})
        worker.step()
        assert model.pull()["w"].tolist() == [-1.0] * 3

    alone(work)


def test_the_last_declaration_says_what_becomes_of_gradients_that_are_not_finite():
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0), nonfinite="off")
        worker.model("m", zeros(), hw.SGD(lr=1.0))
        table = worker.table("t", 1, hw.SGD(lr=1.0), nonfinite="off")
        worker.table("t", 1, hw.SGD(lr=1.0))
        with pytest.raises(NonFiniteError):
            model.push({"w": np.full(3, np.nan)})
        with pytest.raises(NonFiniteError):
            table.push([1], np.full((1, 1), np.nan))

    alone(work)


def test_values_that_a_model_declared_again_does_not_take_are_told(caplog):
    def work(worker):
        model = worker.model("m", zeros(), hw.SGD(lr=1.0))
        with caplog.at_level(logging.WARNING, logger="headwater"):
            worker.model("m", zeros(), hw.SGD(lr=1.0))
            assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
            worker.model("m", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        assert "'m' is declared again and goes on with the values that it has" in caplog.text
        assert model.pull()["w"].tolist() == [0.0] * 3

    alone(work)


def test_a_table_declared_again_has_the_new_settings_and_another_one_is_refused():
    def work(worker):
        other = worker.table("other", 2, hw.SGD(lr=8.0))
        table = worker.table("t", 2, hw.SGD(lr=1.0))
        assert worker.table("t", 2, hw.SGD(lr=0.5)) is table
        with pytest.raises(RegistrationError, match=r"exists with dim 2, got dim 3.*another name"):
            worker.table("t", 3, hw.SGD(lr=1.0))
        with pytest.raises(RegistrationError, match="exists with seed 0, got seed 1"):
            worker.table("t", 2, hw.SGD(lr=1.0), seed=1)
        for one in (table, other):
            one.push([7], -np.ones((1, 2)))
        worker.step()
        assert (table.pull([7]).tolist(), other.pull([7]).tolist()) == ([[0.5, 0.5]], [[8.0, 8.0]])

    alone(work)


def test_settings_of_the_second_table_reach_the_second_table():
    def work(worker):
        tables = [worker.table(name, 1, hw.SGD(lr=1.0)) for name in "abc"]
        tables[1].set(lr=0.5)
        for table in tables:
            table.push([7], -np.ones((1, 1)))
        worker.step()
        assert [table.pull([7]).item() for table in tables] == [1.0, 0.5, 1.0]

    alone(work, servers=2)


# ── torch ───────────────────────────────────────────────────────────────────────────────────────


def test_an_optimizer_made_again_for_its_module_takes_the_model_over_and_the_earlier_one_refuses_use():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            net.weight.fill_(3.0)
        first = optimizer(worker, net)
        turn(first, net)
        address = net.weight.data_ptr()
        second = optimizer(worker, net, hw.SGD(lr=0.25))
        assert net.weight.data_ptr() == address
        assert net.weight.tolist() == [[2.0, 2.0]]
        turn(second, net)
        assert net.weight.tolist() == [[1.75, 1.75]]
        for call in (first.step, first.pull_parameters, first.push_parameters):
            with pytest.raises(UsageError, match="after this one and has taken the model over"):
                call()
        turn(second, net)
        assert net.weight.tolist() == [[1.5, 1.5]]
        return worker.version

    assert alone(work) == 3


def test_a_second_stage_whose_first_optimizer_is_gone_goes_on_in_the_same_memory():
    def work(worker):
        net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
        for lr in (1.0, 0.5, 0.25):
            opt = optimizer(worker, net, hw.SGD(lr=lr))
            assert opt.param_groups[0]["lr"] == lr
            opt.zero_grad()
            net(torch.randn(4, 2)).sum().backward()
            opt.step()
            del opt
            gc.collect()
        return {name: value.clone() for name, value in net.state_dict().items()}

    result = hw.run(work, workers=1, engine="inline")
    parameters = {**result.parameters["model"], **result.parameters["model.buffers"]}
    for name, value in result.values[0].items():
        assert name == "1.num_batches_tracked" or np.array_equal(parameters[name], value), name


@pytest.mark.parametrize("same_start", [False, True])
def test_two_modules_with_the_default_name_never_share_memory(same_start):
    def work(worker):
        first, second = nn.Linear(2, 1), nn.Linear(2, 1)
        if same_start:
            second.load_state_dict(first.state_dict())
        start = second.weight.detach().clone()
        opt = optimizer(worker, first)
        with pytest.raises(RegistrationError, match=r"'model' of this worker has other parameters.*name=…"):
            optimizer(worker, second)
        turn(opt, first)
        assert second.weight.equal(start)
        other = optimizer(worker, second, name="second")
        turn(other, second)
        assert second.weight.equal(start - 1.0)

    alone(work)


def test_a_module_made_again_under_the_same_name_is_refused():
    def work(worker):
        def cell():
            net = nn.Linear(2, 1)
            turn(optimizer(worker, net), net)

        cell()
        gc.collect()
        with pytest.raises(RegistrationError, match="name=…"):
            cell()

    alone(work)


def test_a_plain_model_is_not_taken_over_by_a_module():
    def work(worker):
        worker.model("model", {"weight": np.zeros((1, 2), np.float32)}, hw.SGD(lr=1.0))
        with pytest.raises(RegistrationError, match="name=…"):
            optimizer(worker, nn.Linear(2, 1, bias=False))

    alone(work)


def test_buffers_of_two_modules_that_have_tables_alone_are_not_one_memory():
    class Rows(nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.rows = hw.torch.Embedding(worker, "rows", 2, hw.SGD(lr=1.0))
            self.register_buffer("seen", torch.zeros(1))

    def work(worker):
        first, second = Rows(worker), Rows(worker)
        second.seen.fill_(5.0)
        hw.torch.DistributedOptimizer(worker, first)
        with pytest.raises(RegistrationError, match=r"'model.buffers'.*of another module.*name=…"):
            hw.torch.DistributedOptimizer(worker, second)
        assert second.seen.item() == 5.0
        with pytest.raises(RegistrationError, match="buffers='rank0', got buffers='mean'"):
            hw.torch.DistributedOptimizer(worker, first, buffers="mean")

    alone(work)


def test_gradients_that_an_earlier_optimizer_holds_back_are_not_lost():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        first = optimizer(worker, net, push_every=3, pull_every=3)
        turn(first, net)
        with pytest.raises(UsageError, match=r"holds gradients back.*flush\(\)"):
            optimizer(worker, net)
        first.flush()
        start = net.weight.detach().clone()
        second = optimizer(worker, net)
        turn(second, net)
        assert net.weight.equal(start - 1.0)
        third = optimizer(worker, net, push_every=2, pull_every=2)
        for _ in range(2):
            turn(third, net)
        assert net.weight.equal(start - 3.0)

    alone(work, sync="async")


# ── JAX ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_jax_optimizer_made_again_with_its_tree_takes_the_model_over_and_another_tree_is_refused():
    jax = pytest.importorskip("jax")
    numpy = jax.numpy

    def work(worker):
        make = hw.jax.DistributedOptimizer
        start = {"w": numpy.zeros(2), "h": numpy.ones(2, numpy.bfloat16)}
        gradient = {"w": numpy.ones(2), "h": numpy.ones(2, numpy.bfloat16)}
        first = make(worker, start, hw.SGD(lr=1.0))
        first.step(gradient)
        with pytest.raises(
            RegistrationError, match="'model' of this worker has other parameters: pass name=…"
        ):
            make(worker, start, hw.SGD(lr=1.0))
        second = make(worker, first.params, hw.SGD(lr=0.25))
        assert second.step(gradient)["w"].tolist() == [-1.25, -1.25]
        for call in (lambda: first.step(gradient), first.pull, lambda: first.set(lr=1.0)):
            with pytest.raises(UsageError, match="has taken the model over: use that one"):
                call()
        twin = make(worker, start, hw.SGD(lr=1.0), name="twin")
        twin.step(gradient)
        assert second.pull()["w"].tolist() == [-1.25, -1.25]
        assert twin.params["w"].tolist() == [-1.0, -1.0]

    alone(work)
