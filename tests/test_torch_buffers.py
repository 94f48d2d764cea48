"""Buffers of a torch module under each mode."""

import pytest
import torch
from torch import nn
from torch_loops import loss_of, optimizer, train

import headwater as hw


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


@pytest.mark.parametrize("sync", ["sync:reduce=sum", "sync:quorum=4,reduce=sum"])
def test_averaged_buffers_are_averages_also_where_gradients_are_added_up(sync):
    def work(worker):
        net = Counted()
        opt = optimizer(worker, net, hw.SGD(lr=1.0), buffers="mean")
        for _ in range(3):
            net(worker.rank + 1).backward()
            opt.step()
        assert net.mean.tolist() == net.coarse.tolist() == [7.5] * 2
        assert net.w.tolist() == [-24.0] * 3  # 4 workers, gradients of 1, 2 and 3

    train(work, workers=4, servers=2, sync=sync)


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
