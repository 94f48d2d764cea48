"""Local steps between pushes and reads (DistBelief), in closed forms."""

import pytest
import torch
from torch import nn
from torch_loops import optimizer, train

import headwater as hw
from headwater.errors import NonFiniteError


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
        assert worker.statistics().steps == 1
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
