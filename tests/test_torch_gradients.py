"""Which gradients of a torch module a step sends, and how it judges them."""

import itertools

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch_loops import STEPS, assert_agrees, loss_of, network, optimizer, reference, train

import headwater as hw
from headwater.errors import NonFiniteError


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
    expected = plain.first.weight.detach()
    assert_agrees(train(work).parameters["model"], {"first.weight": expected, "second.weight": expected})


def test_tied_weights_are_in_results_and_checkpoints_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4)
            self.head.weight = self.embedding.weight

    def work(worker):
        net = Tied()
        opt = optimizer(worker, net, hw.SGD(lr=0.1))
        net.head(net.embedding(torch.tensor([1]))).sum().backward()
        opt.step()

    result = train(work, servers=2, checkpoint=tmp_path)
    hw.checkpoint.export(tmp_path, tmp_path / "net.safetensors")
    exported = safetensors.numpy.load_file(tmp_path / "net.safetensors")
    for values in (result.parameters["model"], hw.load_checkpoint(tmp_path)["model"], exported):
        net = Tied()
        net.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
        assert net.head.weight is net.embedding.weight
        assert (values["head.weight"] == values["embedding.weight"]).all()


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
