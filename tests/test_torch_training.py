"""Training torch modules: a loop gives what torch.optim gives on the averaged gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch_loops import STEPS, assert_agrees, batch, loss_of, network, optimizer, reference, train

import headwater as hw
from headwater.errors import ConfigurationError

RULES = {
    "sgd": (hw.SGD(lr=0.1, weight_decay=0.01), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (
        hw.SGD(lr=0.05, momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ),
    "adagrad": (hw.Adagrad(lr=0.1, lr_decay=0.1), torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "rmsprop": (
        hw.RMSprop(lr=0.01, momentum=0.5, centered=True),
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.5, "centered": True},
    ),
    "adam": (hw.Adam(lr=0.01, amsgrad=True), torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (hw.AdamW(lr=0.01), torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", RULES)
def test_training_agrees_with_torch_on_averaged_gradients(kind, workers):
    rule, torch_class, settings = RULES[kind]

    def work(worker):
        net = network(seed=worker.rank)  # rank 0's values count
        opt = optimizer(worker, net, rule)
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, worker.rank).backward()
            opt.step()
            assert opt.result == hw.StepResult(step + 1, True, workers, 0)
        return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}

    result = train(work, workers=workers, servers=min(workers, 2))
    for values in result.values:
        assert all((values[name] == result.parameters["model"][name]).all() for name in values)
    assert_agrees(
        result.parameters["model"],
        reference(lambda net: [torch_class(net.parameters(), **settings)], workers),
    )


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_asynchronous_training_of_one_worker_agrees_with_torch_on_both_transports(transport):
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, 0).backward()
            opt.step()

    result = train(work, servers=2, sync="async", transport=transport)
    assert_agrees(
        result.parameters["model"], reference(lambda net: [torch.optim.Adam(net.parameters(), 0.01)], 1)
    )


SCHEDULERS = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=2 * STEPS),
    "lambda by group": lambda opt: torch.optim.lr_scheduler.LambdaLR(
        opt, [lambda epoch: 1 / (1 + epoch), lambda epoch: 1.0]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_torch_schedulers_reach_the_servers(kind):
    def groups(net):
        return [{"params": [net[2].weight, net[2].bias], "lr": 0.05, "betas": (0.8, 0.99)}]

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.02), groups=groups(net))
        scheduler = SCHEDULERS[kind](opt)
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, worker.rank).backward()
            opt.step()
            scheduler.step()
        return [group["lr"] for group in opt.param_groups]

    def make(net):
        opt = torch.optim.Adam([{"params": net[0].parameters()}, *groups(net)], lr=0.02)
        schedulers.append(opt)
        return opt, SCHEDULERS[kind](opt)

    schedulers = []
    result = train(work, workers=2)
    expected = reference(make, 2)
    assert_agrees(result.parameters["model"], expected)
    assert result.values == [[group["lr"] for group in schedulers[0].param_groups]] * 2


def test_headwater_schedules_run_on_the_servers_and_param_groups_show_the_rate_of_the_last_update():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=hw.Linear(0.5, over=4)))
        assert opt.param_groups[0]["lr"] == 0.5
        rates = []
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, 0).backward()
            opt.step()
            rates.append(opt.param_groups[0]["lr"])
        assert rates == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]

    def make(net):
        opt = torch.optim.SGD(net.parameters(), lr=0.5)
        return opt, torch.optim.lr_scheduler.LinearLR(opt, 1.0, 1e-12, total_iters=4)

    assert_agrees(train(work).parameters["model"], reference(make, 1))


def test_settings_travel_only_when_somebody_changed_them():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=hw.Constant(0.01)))
        sent = []
        opt._model.set = lambda **values: sent.append(values)
        opt.step()
        assert sent == []
        opt.param_groups[0]["lr"] = torch.tensor(0.5)
        opt.param_groups[0]["betas"] = [0.9, 0.5]
        opt.step()
        assert sent == [{"group": 0, "lr": 0.5, "beta2": 0.5}]
        opt.step()
        assert len(sent) == 1
        opt.param_groups[0]["amsgrad"] = True
        with pytest.raises(ConfigurationError, match="amsgrad cannot change to True"):
            opt.step()

    train(work)


def test_state_dict_restores_settings_and_names_parameters():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=0.1, momentum=0.5))
        saved = opt.state_dict()
        assert saved["param_groups"][0]["param_names"] == [name for name, _ in net.named_parameters()]
        assert (saved["param_groups"][0]["lr"], saved["param_groups"][0]["momentum"]) == (0.1, 0.5)
        saved["param_groups"][0]["lr"] = 0.0
        opt.load_state_dict(saved)
        before = net[0].weight.detach().clone()
        loss_of(net, 0, 0).backward()
        opt.step()
        assert net[0].weight.equal(before)

    train(work)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_parameters_of_a_gpu_stay_there_and_train_as_in_torch():
    def work(worker):
        net = network().cuda()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        for step in range(STEPS):
            opt.zero_grad()
            x, y = batch(step, 0)
            functional.cross_entropy(net(x.cuda()), y.cuda()).backward()
            opt.step()
        assert all(parameter.is_cuda for parameter in net.parameters())

    assert_agrees(
        train(work).parameters["model"], reference(lambda net: [torch.optim.Adam(net.parameters(), 0.01)], 1)
    )


def test_a_compiled_module_trains_as_the_plain_one_under_the_same_names():
    def work(worker):
        net = network()
        compiled = torch.compile(net, backend="aot_eager")
        opt = optimizer(worker, compiled, hw.SGD(lr=0.1))
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(compiled, step, 0).backward()
            opt.step()

    assert_agrees(
        train(work).parameters["model"], reference(lambda net: [torch.optim.SGD(net.parameters(), 0.1)], 1)
    )


def test_step_evaluates_a_closure_and_returns_its_loss():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=0.1))

        def closure():
            opt.zero_grad()
            loss = loss_of(net, 0, 0)
            loss.backward()
            return loss

        first, second = opt.step(closure).item(), opt.step(closure).item()
        assert second < first
        assert opt.step() is None

    train(work)


def test_two_models_of_one_worker_are_trained_each_by_its_own_step():
    def work(worker):
        one, two = (nn.Linear(1, 1, bias=False) for _ in range(2))
        for net in (one, two):
            net.weight.data.fill_(1.0)
        first = optimizer(worker, one, hw.SGD(lr=1.0), name="one")
        second = optimizer(worker, two, hw.SGD(lr=1.0), name="two")
        for expected in (0.0, -1.0):
            first.zero_grad()
            two(one(torch.ones(1, 1)).detach() * 0 + 1).sum().backward()
            one(torch.ones(1, 1)).sum().backward()
            first.step()
            assert one.weight.item() == expected
            assert two.weight.item() == expected + 1  # its gradient waits for its own step
            second.step()
            assert two.weight.item() == expected
            second.zero_grad()

    train(work)


def test_a_step_of_one_model_leaves_the_others_as_they_were_computed_with():
    def work(worker):
        nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        for net in nets:
            net.weight.data.fill_(1.0)
        mine, other = (optimizer(worker, net, hw.SGD(lr=1.0), name=f"net {i}") for i, net in enumerate(nets))
        worker.barrier()
        if worker.rank == 1:
            loss = nets[1](torch.ones(1, 1)).square().sum()  # forward with 1, whose derivative is 2
        worker.barrier()
        if worker.rank == 0:
            nets[1].weight.grad = torch.full((1, 1), 5.0)
            other.step()
        worker.barrier()
        if worker.rank == 1:
            mine.step()
            loss.backward()
            assert nets[1].weight.grad.item() == 2
            other.step()
            assert nets[1].weight.item() == 1 - 5 - 2

    train(work, workers=2, sync="async")


def test_a_backward_through_values_that_a_step_replaced_is_an_error():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=0.1))
        loss = loss_of(net, 0, 0)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = loss_of(net, 0, 0)
        opt.pull_parameters()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    train(work)


def test_state_dict_has_the_rules_state_by_name_as_torch_has_it_by_position():
    plain = network()
    own = torch.optim.Adam(plain.parameters(), lr=0.01)

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        for step in range(3):
            opt.zero_grad()
            loss_of(net, step, 0).backward()
            opt.step()
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        return saved

    got = train(work, workers=1).values[0]
    for step in range(3):
        own.zero_grad()
        loss_of(plain, step, 0).backward()
        own.step()
    expected = own.state_dict()
    assert got["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"]
    for index, (name, _) in enumerate(plain.named_parameters()):
        assert got["state"][name]["step"] == int(expected["state"][index]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(got["state"][name][key], expected["state"][index][key])


def test_uneven_batches_weighted_by_samples_train_as_one_large_batch_does():
    """Per round 8, 5 and 3 samples; a rank without any takes its turn with weight 0, whatever its loss is."""
    parts = [slice(0, 8), slice(8, 13), slice(13, 16), slice(0, 0)]

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        for step in range(STEPS):
            x, y = (
                torch.cat(two)[parts[worker.rank]] for two in zip(batch(step, 0), batch(step, 1), strict=True)
            )
            opt.zero_grad()
            functional.cross_entropy(net(x), y).backward()  # NaN where there is no sample
            opt.step(weight=len(x))
        assert worker.statistics().skipped == 0
        return [parameter.detach().clone() for parameter in net.parameters()]

    net = network()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(STEPS):
        x, y = (torch.cat(two) for two in zip(batch(step, 0), batch(step, 1), strict=True))
        opt.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        opt.step()
    for got in train(work, workers=4, servers=2).values:
        for ours, theirs in zip(got, net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_gradients_of_all_workers_are_merged_as_the_optimizer_says():
    def work(worker):
        net = nn.Linear(1, 1, bias=False)
        net.weight.data.zero_()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), merge="median")
        net(torch.tensor([[[1.0, 2.0, 1000.0][worker.rank]]])).backward()
        opt.step()
        return net.weight.item()

    assert train(work, workers=3, servers=2).values == [-2.0] * 3


def test_an_impossible_weight_is_refused_before_the_closure_is_called():
    def work(worker):
        opt = optimizer(worker, network(), hw.SGD(lr=0.1))
        with pytest.raises(hw.errors.ConfigurationError, match=r"weight.* must be"):
            opt.step(lambda: pytest.fail("it was called"), weight=-1)

    train(work)
