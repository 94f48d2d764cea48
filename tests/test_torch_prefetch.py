"""What `prefetch` of modules of rows may read, in each mode."""

import numpy as np
import pytest
import torch
from torch_loops import train

import headwater as hw


def embedding(worker, rule=None, **options):
    rule = rule or hw.SGD(lr=1.0)
    return hw.torch.Embedding(worker, "rows", 1, rule, initializer=hw.Zeros(), **options)


def exchanges(worker):
    return worker._session.machine.number


def values(rows):
    return rows.detach().ravel().tolist()


@pytest.mark.parametrize(("sync", "workers"), [("sync", 1), ("sync", 3), ("ssp:2", 1), ("async", 1)])
def test_a_prefetch_comes_with_the_step_and_is_what_a_pull_after_it_would_give(sync, workers):
    def work(worker):
        net = embedding(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        ids = torch.tensor([[1, 2], [1, 5]])
        for step in range(1, 4):
            net(ids).sum().backward()
            net.prefetch(ids)
            opt.step()
            before = exchanges(worker)
            rows = net(ids)
            assert exchanges(worker) == before  # it came with the step
            assert values(rows) == [-2 * step, -step, -2 * step, -step]
            assert values(rows) == net.table.pull(ids).ravel().tolist()

    train(work, workers=workers, servers=2, sync=sync)


def test_with_bounded_staleness_a_prefetch_has_the_steps_that_the_bound_demands():
    def work(worker):
        net = embedding(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        ids = torch.tensor([1])
        for step in range(1, 8):
            net(ids).sum().backward()
            net.prefetch(ids)
            opt.step()
            before = exchanges(worker)
            seen = -values(net(ids))[0]
            assert exchanges(worker) == before
            assert seen >= step + 2 * max(0, step - 1)  # all of its own, of others all but the last

    train(work, workers=3, servers=2, sync="ssp:1")


@pytest.mark.parametrize("sync", ["sync", "ssp:1", "async"])
def test_other_ids_than_prefetched_are_pulled(sync):
    def work(worker):
        net = embedding(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        net(torch.tensor([1, 2])).sum().backward()
        net.prefetch(torch.tensor([1, 2]))
        opt.step()
        assert values(net(torch.tensor([2, 1]))) == [-1, -1]
        assert values(net(torch.tensor([2]))) == [-1]

    train(work, sync=sync)


@pytest.mark.parametrize("sync", ["sync", "ssp:1", "async"])
def test_padding_is_left_out_of_a_prefetch_as_of_a_forward(sync):
    def work(worker):
        net = embedding(worker, padding_idx=0)
        bag = hw.torch.EmbeddingBag(
            worker, "rows", 1, hw.SGD(lr=1.0), initializer=hw.Zeros(), mode="sum", padding_idx=0
        )
        opt = hw.torch.DistributedOptimizer(worker, torch.nn.ModuleList([net, bag]))
        ids = torch.tensor([[0, 1], [2, 0]])
        net(ids).sum().backward()
        opt.step()
        for module, expected in ((net, [0, -1, -1, 0]), (bag, [-1, -1])):
            module.prefetch(ids)
            opt.step()
            before = exchanges(worker)
            assert values(module(ids)) == expected
            assert exchanges(worker) == before

    train(work, sync=sync)


def test_a_prefetched_batch_gets_its_gradients():
    def work(worker):
        net = embedding(worker, hw.SGD(lr=0.5))
        opt = hw.torch.DistributedOptimizer(worker, net)
        batches = [torch.tensor([step, step, 7]) for step in range(4)]
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            rows = net(batch)
            if following is not None:
                net.prefetch(following)
            rows.sum().backward()
            opt.step()
        return net.table.pull(np.arange(8)).ravel().tolist()

    for sync in ("sync", "ssp:2", "async"):
        assert train(work, sync=sync).values == [[-1, -1, -1, -1, 0, 0, 0, -2]]
