"""`headwater.torch.EmbeddingBag`: what torch.nn.EmbeddingBag gives, with rows on the servers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch_loops import train

import headwater as hw
from headwater.errors import ConfigurationError, UsageError

START = hw.Normal(std=0.5)
IDS = np.array([7, -3, 0, 10**12, -1, 5])
DIM = 3
PADDING = 4  # the position in IDS


def bag(worker, mode="sum", rule=None, **options):
    return hw.torch.EmbeddingBag(worker, "rows", DIM, rule or hw.SGD(lr=1.0), mode=mode, **options)


def plain_bag(mode, padding, include_last):
    plain = nn.EmbeddingBag(len(IDS), DIM, mode=mode, padding_idx=padding, include_last_offset=include_last)
    plain.weight.data = torch.from_numpy(START.rows(0, IDS, DIM))
    return plain


def forms():
    """Name → (positions in IDS, offsets, include_last_offset)."""
    flat = torch.tensor([0, 1, 1, 4, 2, 4, 4, 3, 0, 5, 0])
    return {
        "2-D": (flat[:9].reshape(3, 3), None, False),
        "offsets": (flat, torch.tensor([0, 3, 7]), False),
        "empty bags": (flat, torch.tensor([0, 0, 4, 4, 11, 11]), False),
        "last offset": (flat, torch.tensor([0, 0, 5, 7, 11]), True),
        "int32 offsets": (flat.int(), torch.tensor([0, 2], dtype=torch.int32), False),
        "one bag": (flat, torch.tensor([0]), False),
    }


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
@pytest.mark.parametrize("form", forms())
def test_outputs_and_gradients_are_those_of_torch(form, mode, weighted, padding):
    positions, offsets, include_last = forms()[form]
    weights = torch.linspace(-1, 2, positions.numel()).reshape(positions.shape) if weighted else None
    factors = torch.linspace(1, 2, 9 * DIM).reshape(9, DIM)

    def gone_through(module, ids, its_weights):
        out = module(ids, offsets, its_weights)
        (out.square() * factors[: len(out)]).sum().backward()
        return out.detach()

    def work(worker):
        padding_idx = None if padding is None else int(IDS[padding])
        module = bag(
            worker, mode, initializer=START, padding_idx=padding_idx, include_last_offset=include_last
        )
        own = None if weights is None else weights.clone().requires_grad_()
        opt = hw.torch.DistributedOptimizer(worker, module)
        out = gone_through(module, torch.from_numpy(IDS)[positions.long()], own)
        opt.step()
        return out, module.table.pull(IDS), None if own is None else own.grad

    plain = plain_bag(mode, padding, include_last)
    own = None if weights is None else weights.clone().requires_grad_()
    expected = gone_through(plain, positions, own)
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    out, rows, of_weights = train(work).values[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.from_numpy(rows), plain.weight.detach())
    if own is not None:
        torch.testing.assert_close(of_weights, own.grad)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_training_agrees_with_torch_over_many_steps(mode):
    def batch(step):
        generator = torch.Generator().manual_seed(step)
        ids = torch.cat([torch.arange(len(IDS)), torch.randint(len(IDS), (12,), generator=generator)])
        return ids[torch.randperm(len(ids), generator=generator)], torch.tensor([0, 5, 5, 11])

    def loss_of(out):
        return (out - 0.3).square().sum()

    def work(worker):
        module = bag(worker, mode, hw.Adagrad(lr=0.1), initializer=START, padding_idx=int(IDS[PADDING]))
        opt = hw.torch.DistributedOptimizer(worker, module)
        for step in range(50):
            opt.zero_grad()
            positions, offsets = batch(step)
            loss_of(module(torch.from_numpy(IDS)[positions], offsets)).backward()
            opt.step()
        return module.table.pull(IDS)

    plain = plain_bag(mode, PADDING, False)
    opt = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    for step in range(50):
        opt.zero_grad()
        loss_of(plain(*batch(step))).backward()
        opt.step()
    rows = train(work, servers=2).values[0]
    np.testing.assert_allclose(rows, plain.weight.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_nothing_are_zeros_and_send_nothing(mode):
    none = torch.zeros(0, dtype=torch.int64)

    def work(worker):
        module = bag(worker, mode, initializer=hw.initializers.Constant(1.0), padding_idx=-1)
        opt = hw.torch.DistributedOptimizer(worker, module)
        for ids, offsets, bags in (
            (none, torch.tensor([0, 0]), 2),
            (none, none, 0),
            (none.reshape(3, 0), None, 3),
            (none.reshape(0, 3), None, 0),
            (torch.full((2, 2), -1), None, 2),
        ):
            out = module(ids, offsets)
            assert out.equal(torch.zeros(bags, DIM))
            out.sum().backward()
        opt.step()
        assert opt.result.contributors == 0
        assert len(module.table) == 0

    train(work)


def test_weights_alone_and_in_half_precision_get_gradients():
    def work(worker):
        module = bag(worker, initializer=hw.initializers.Constant(2.0))
        ids = torch.tensor([[1, 2], [1, 3]])
        weights = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
        out = module(ids, per_sample_weights=weights)
        out.sum().backward()
        assert weights.grad.equal(torch.full((2, 2), 2.0 * DIM, dtype=torch.bfloat16))
        assert not module(ids, per_sample_weights=weights.detach()).isnan().any()

    train(work)


FLAT, ROWS = torch.tensor([1, 2, 3]), torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("mode", "arguments", "text"),
    [
        ("sum", (FLAT,), "1-D ids need offsets"),
        ("sum", (ROWS, torch.tensor([0])), "leave offsets out"),
        ("sum", (ROWS.reshape(1, 2, 2),), r"1-D with offsets, or 2-D .* got shape \(1, 2, 2\)"),
        ("sum", (FLAT, torch.tensor([[0]])), r"offsets must be 1-D, got shape \(1, 1\)"),
        ("sum", (FLAT, torch.tensor([0.0])), "must be integers, got torch.float32"),
        ("sum", (FLAT, torch.tensor([1])), "offsets must begin with 0"),
        ("sum", (FLAT, torch.tensor([0, 2, 1])), r"never fall .* got \[0, 2, 1\]"),
        ("sum", (FLAT, torch.tensor([0, 4])), "at most at 3, the number of ids"),
        ("sum", (FLAT, torch.tensor([0, -1])), "never fall"),
        ("sum", (FLAT, torch.tensor([], dtype=torch.int64)), "offsets is empty, but there are 3 ids"),
        ("sum", (torch.ones(3), torch.tensor([0])), "ids must be integers, got torch.float32"),
        ("mean", (ROWS, None, torch.ones(2, 2)), "go with mode='sum', this module has mode='mean'"),
        ("sum", (ROWS, None, torch.ones(4)), r"the ids' shape, \(2, 2\), got \(4,\)"),
        ("sum", (ROWS, None, torch.ones(2, 2, dtype=torch.int64)), "tensor of floats, got torch.int64"),
        ("sum", (ROWS, None, [1.0]), "tensor of floats, got list"),
    ],
)
def test_wrong_ids_offsets_and_weights_are_refused(mode, arguments, text):
    def work(worker):
        module = bag(worker, mode)
        with pytest.raises(UsageError, match=text):
            module(*arguments)
        assert module.collected.parts() == []

    train(work)


def test_a_wrong_last_offset_and_an_unknown_mode_are_refused():
    def work(worker):
        with pytest.raises(UsageError, match="offsets is empty"):
            bag(worker, include_last_offset=True)(FLAT[:0], FLAT[:0])
        with pytest.raises(UsageError, match="the last of offsets must be 3, the number of ids, got 2"):
            bag(worker, include_last_offset=True)(FLAT, torch.tensor([0, 2]))
        with pytest.raises(ConfigurationError, match="'sum', 'mean' or 'max', got 'median'"):
            bag(worker, "median")
        assert repr(bag(worker)) == "EmbeddingBag('rows', 3, mode='sum')"
        assert hw.torch.EmbeddingBag(worker, "rows", DIM, hw.SGD(lr=1.0)).mode == "mean"

    train(work)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_a_gpu_are_those_of_the_cpu(mode):
    def work(worker):
        module = bag(worker, mode, initializer=START)
        opt = hw.torch.DistributedOptimizer(worker, module)
        ids = torch.from_numpy(IDS)[torch.tensor([[0, 1], [1, 2]])]
        weights = torch.ones(2, 2) if mode == "sum" else None
        expected = module(ids, None, weights)
        own = None if weights is None else weights.cuda().requires_grad_()
        out = module(ids.cuda(), None, own)
        torch.testing.assert_close(out.cpu(), expected)
        out.sum().backward()
        opt.step()
        assert own is None or own.grad.is_cuda

    train(work)
