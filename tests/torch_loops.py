"""What the tests of `headwater.torch` share: a network, its batches, and what torch.optim makes of them."""

import torch
from torch import nn
from torch.nn import functional

import headwater as hw

STEPS = 6


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
