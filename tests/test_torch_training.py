"""Training torch modules: what a loop gives must be what torch.optim gives on the averaged gradients."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import headwater as hw
from headwater.errors import ConfigurationError, NonFiniteError

STEPS = 6

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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(function, **options):
    return hw.run(function, **{"engine": "inline", "patience": 5, "deadline": 60, "workers": 1, **options})


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for parameter in net.parameters():
        parameter.data.normal_(generator=generator)
    return net


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(net, step, rank):
    x, y = batch(step, rank)
    return functional.cross_entropy(net(x), y)


def optimizer(worker, net, rule, **options):
    return hw.torch.DistributedOptimizer(worker, net, rule, **options)


def reference(make, workers, steps=STEPS, adjust=lambda net: None, net=None):
    """Parameters by name after `steps` of torch on the mean of the workers' losses.

    `make(net)` gives the optimizer and, if there is one, a scheduler.
    """
    net = net or network()
    opt, *schedulers = make(net)
    for step in range(steps):
        opt.zero_grad()
        sum(loss_of(net, step, rank) / workers for rank in range(workers)).backward()
        adjust(net)
        opt.step()
        for scheduler in schedulers:
            scheduler.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def assert_agrees(got, expected, atol=2e-6):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-5, atol=atol, msg=name)


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


def test_headwater_schedules_run_on_the_servers_and_param_groups_show_their_first_rate():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=hw.Linear(0.5, over=4)))
        assert opt.param_groups[0]["lr"] == 0.5
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, 0).backward()
            opt.step()
        assert opt.param_groups[0]["lr"] == 0.5

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


def test_several_backwards_add_up_and_none_of_them_is_lost():
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=0.1))
        for step in range(STEPS):
            opt.zero_grad()
            for _ in range(3):
                (loss_of(net, step, 0) / 3).backward()
            opt.step()

    assert_agrees(
        train(work).parameters["model"], reference(lambda net: [torch.optim.SGD(net.parameters(), 0.1)], 1)
    )


def test_gradients_that_are_not_zeroed_go_on_adding_up():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        net.weight.data.zero_()
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        for expected in (-1, -3, -6):
            net(torch.ones(1, 2)).sum().backward()
            opt.step()
            assert net.weight.tolist() == [[expected, expected]]

    train(work)


def test_zero_grad_forgets_gradients_or_makes_zeros_that_are_sent():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        net.weight.data.fill_(1.0)
        opt = optimizer(worker, net, hw.AdamW(lr=0.5, weight_decay=1.0))
        net(torch.ones(1, 2)).sum().backward()
        opt.zero_grad()
        assert net.weight.grad is None
        opt.step()
        assert net.weight.tolist() == [[1, 1]]
        net(torch.ones(1, 2)).sum().backward()
        opt.zero_grad(set_to_none=False)
        opt.step()
        assert net.weight.tolist() == [[0.5, 0.5]]

    train(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_assigned_by_hand_are_sent_as_they_are_at_the_step(dtype):
    def work(worker):
        net = nn.Linear(2, 3, bias=False, dtype=dtype)
        net.weight.data.zero_()
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        net.weight.grad = torch.arange(6.0, dtype=dtype).reshape(2, 3).t()  # not contiguous
        opt.step()
        assert net.weight.tolist() == [[0, -3], [-1, -4], [-2, -5]]
        net.weight.grad = None
        opt.step()
        assert net.weight.tolist() == [[0, -3], [-1, -4], [-2, -5]]
        assert opt.result.contributors == 0

    train(work)


def test_a_gradient_kept_from_an_earlier_backward_stays_what_it_was():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        opt = optimizer(worker, net, hw.SGD(lr=0.0))
        kept = []
        for k in range(4):
            opt.zero_grad()
            net(torch.full((1, 2), float(k))).sum().backward()
            kept.append(net.weight.grad)
            opt.step()
        assert [grad.tolist() for grad in kept] == [[[k, k]] for k in range(4)]

    train(work)


def test_unused_frozen_and_later_frozen_parameters_are_not_touched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
            self.frozen, self.later = nn.Linear(2, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.later(self.frozen(self.used(x)))

    def work(worker):
        torch.manual_seed(worker.rank)
        net = Net()
        opt = optimizer(worker, net, hw.AdamW(lr=0.1, weight_decay=0.5))
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        for step in range(4):
            net.later.requires_grad_(step < 2)
            if step == 2:
                at_freezing = net.later.weight.detach().clone()
            opt.zero_grad()
            net(torch.ones(1, 2)).sum().backward()
            opt.step()
        assert net.unused.weight.equal(start["unused.weight"])
        assert net.frozen.weight.equal(start["frozen.weight"])
        assert net.later.weight.equal(at_freezing)
        assert not net.used.weight.equal(start["used.weight"])

    result = train(work, workers=2)
    assert not any(name.startswith("frozen") for name in result.parameters["model"])


def test_tied_parameters_are_one_tensor_with_one_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.first.weight.data.copy_(torch.arange(9.0).reshape(3, 3) / 10)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    def work(worker):
        net = Tied()
        opt = optimizer(worker, net, hw.SGD(lr=0.1), groups=[{"params": ["second.weight"], "lr": 0.2}])
        net(torch.ones(2, 3)).sum().backward()
        opt.step()
        assert net.first.weight is net.second.weight

    plain = Tied()
    plain(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.2).step()
    assert_agrees(train(work).parameters["model"], {"first.weight": plain.first.weight.detach()})


def test_clipping_in_place_is_seen_by_the_servers():
    def clip(net):
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)

    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(net, step, 0).backward()
            clip(net)
            opt.step()

    expected = reference(lambda net: [torch.optim.SGD(net.parameters(), 1.0)], 1, adjust=clip)
    assert_agrees(train(work).parameters["model"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_judged_as_it_is_at_the_step(dtype):
    def work(worker):
        net = nn.Linear(2, 1, bias=False, dtype=dtype)
        net.weight.data.zero_()
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        net(torch.full((1, 2), torch.inf, dtype=dtype)).sum().backward()
        with pytest.raises(NonFiniteError, match=r"'weight' of model 'model'.*turn was not taken"):
            opt.step()
        assert worker.version == 0
        net.weight.grad.nan_to_num_(posinf=1.0)
        opt.step()
        assert net.weight.tolist() == [[-1, -1]]
        net.weight.grad.fill_(torch.nan)  # finite when backward gave it
        with pytest.raises(NonFiniteError):
            opt.step()

    train(work)


def test_skip_makes_a_step_with_nan_an_empty_turn_and_off_lets_it_pass():
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        net.weight.data.zero_()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), nonfinite="skip")
        value = torch.nan if worker.rank == 0 else 1.0
        net(torch.full((1, 2), value)).sum().backward()
        opt.step()
        assert opt.result.contributors == 1
        assert net.weight.tolist() == [[-1, -1]]
        return worker.statistics().skipped

    def careless(worker):
        net = nn.Linear(2, 1, bias=False)
        opt = optimizer(worker, net, hw.SGD(lr=1.0), nonfinite="off")
        net(torch.full((1, 2), torch.nan)).sum().backward()
        opt.step()

    assert train(work, workers=2).values == [1, 0]
    assert np.isnan(train(careless).parameters["model"]["weight"]).all()


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_scales_back_and_makes_an_overflow_an_empty_turn(unscale_first):
    def work(worker):
        net = network()
        opt = optimizer(worker, net, hw.SGD(lr=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        results = []
        for step in range(STEPS):
            opt.zero_grad()
            loss = loss_of(net, step, worker.rank)
            if step == 2 and worker.rank == 0:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if unscale_first:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            results.append(opt.result.contributors)
        assert not hasattr(opt, "found_inf")
        return results, scaler.get_scale()

    def make(net):
        def only_rank_1_in_round_2():
            if next(rounds) == 2:
                opt.zero_grad()
                loss_of(net, 2, 1).backward()

        rounds, opt = itertools.count(), torch.optim.SGD(net.parameters(), 0.1)
        opt.register_step_pre_hook(lambda *_: only_rank_1_in_round_2())
        return [opt]

    result = train(work, workers=2)
    counts = [2, 2, 1, 2, 2, 2]
    assert result.values == [(counts, 512.0), (counts, 1024.0)]
    assert_agrees(result.parameters["model"], reference(make, 2))


def test_low_precision_parameters_are_trained_in_float32_on_the_servers():
    def work(worker):
        net = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
        net.weight.data.fill_(1.0)
        opt = optimizer(worker, net, hw.SGD(lr=2.0**-12))
        for step in range(1, 41):
            opt.zero_grad()
            net(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            assert net.weight.grad.dtype == torch.bfloat16
            opt.step()
            expected = torch.tensor(1.0 - step * 2.0**-12).bfloat16()
            assert (net.weight == expected).all()  # alone in bfloat16 it would stay 1

    assert (train(work, workers=2).parameters["model"]["weight"] == 1 - 40 * 2.0**-12).all()


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


# ── DistBelief ──────────────────────────────────────────────────────────────────────────────────


class Weight(nn.Module):
    """One number whose gradient is always 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self):
        return self.w.sum()


@pytest.mark.parametrize(
    ("push_every", "pull_every", "local"),
    [
        (2, 3, [-1, -2, -2, -3, -4, -6]),
        (3, 1, [0, 0, -3, -3, -3, -6]),
        (1, 4, [-1, -2, -3, -4, -5, -6]),
    ],
)
def test_local_steps_between_pushes_and_reads_follow_distbelief(push_every, pull_every, local):
    def work(worker):
        net = Weight()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), push_every=push_every, pull_every=pull_every)
        seen = []
        for _ in local:
            opt.zero_grad()
            net().backward()
            opt.step()
            seen.append(net.w.item())
        return seen

    result = train(work, sync="ssp:1")
    assert result.values == [local]
    assert result.version == len(local) // push_every
    assert result.parameters["model"]["w"].item() == -6


def test_flush_sends_what_is_held_back_so_that_no_gradient_is_lost():
    def work(worker):
        net = Weight()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), push_every=4, pull_every=4)
        for _ in range(6):
            opt.zero_grad()
            net().backward()
            opt.step()
        assert worker.version <= 2
        opt.flush()
        opt.flush()
        worker.barrier()
        opt.pull_parameters()
        return net.w.item()

    result = train(work, workers=2, sync="async")
    assert result.values == [-12, -12]
    assert result.version == 4


def test_a_nan_in_a_local_step_stays_out_of_what_is_pushed():
    def work(worker):
        net = Weight()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), push_every=3, pull_every=3, nonfinite="skip")
        for scale in (1.0, torch.nan, 1.0):
            opt.zero_grad()
            (net() * scale).backward()
            opt.step()
        assert net.w.item() == -2
        strict = optimizer(worker, Weight(), hw.SGD(lr=1.0), name="strict", push_every=2)
        strict.param_groups[0]["params"][0].grad = torch.tensor([torch.nan])
        with pytest.raises(NonFiniteError):
            strict.step()

    train(work, sync="async")


# ── buffers ─────────────────────────────────────────────────────────────────────────────────────


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("coarse", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, change):
        for buffer in (self.mean, self.coarse, self.count, self.scratch):
            buffer.add_(change)
        return self.w.sum()


@pytest.mark.parametrize(("mode", "expected"), [("rank0", 3.0), ("mean", 7.5), ("local", None)])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_buffers_in_synchronous_training(mode, expected, transport):
    def work(worker):
        net = Counted()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), buffers=mode)
        for _ in range(3):
            net(worker.rank + 1).backward()
            opt.step()
        mine = 3 * (worker.rank + 1)
        assert net.count == net.scratch == mine
        assert net.mean.tolist() == net.coarse.tolist() == [mine if expected is None else expected] * 2

    result = train(work, workers=4, servers=2, transport=transport)
    assert ("model.buffers" in result.parameters) == (mode != "local")


@pytest.mark.parametrize(("mode", "expected"), [("rank0", 3.0), ("mean", 18.0)])
def test_buffers_in_asynchronous_training(mode, expected):
    def work(worker):
        net = Counted()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), buffers=mode)
        for _ in range(3):
            net(worker.rank + 1).backward()
            opt.step()
        worker.barrier()
        opt.pull_parameters()
        return net.mean.tolist()

    assert train(work, workers=3, sync="async").values == [[expected] * 2] * 3


def test_averages_of_batch_norm_are_equal_on_all_workers_after_each_step():
    def work(worker):
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        opt = optimizer(worker, net, hw.Adam())
        for step in range(3):
            loss_of(net, step, worker.rank).backward()
            opt.step()
        assert net[1].num_batches_tracked == 3
        return net[1].running_var.tolist()

    first, second = train(work, workers=2).values
    assert first == second
    assert first != [1.0] * 4


def test_a_nan_in_a_buffer_stays_at_its_worker_and_is_repaired():
    def work(worker):
        net = Counted()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), buffers="mean")
        net(0).backward()
        if worker.rank == 0:
            net.mean.fill_(torch.nan)
        opt.step()
        assert net.mean.tolist() == [0, 0]

    train(work, workers=2)
