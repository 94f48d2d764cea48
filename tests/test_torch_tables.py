"""The optimizer of models with tables: one step for parameters and rows, or for rows alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch_loops import optimizer, train

import headwater as hw
from headwater.errors import ConfigurationError, NonFiniteError, UsageError

ONES = hw.initializers.Constant(1.0)


def embedding(worker, rule=None, name="rows", dim=1, **options):
    rule = rule or hw.SGD(lr=1.0)
    return hw.torch.Embedding(worker, name, dim, rule, **{"initializer": hw.Zeros(), **options})


def row(module, *ids):
    return module.table.pull(np.array(ids, dtype=np.int64)).ravel().tolist()


def tables_optimizer(worker, module, **options):
    return hw.torch.DistributedOptimizer(worker, module, **options)


class Recommender(nn.Module):
    """Two tables, one looked up in by two modules, between parameters."""

    def __init__(self, users, items, history):
        super().__init__()
        self.users, self.items, self.history = users, items, history
        self.top = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(0)  # workers that are threads share torch's own
        for parameter in self.top.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, users, items, histories):
        parts = [self.users(users), self.items(items), self.history(histories)]
        return self.top(torch.cat(parts, dim=1)).squeeze(1)


def interactions(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    users, items = (torch.randint(count, (8,), generator=generator) for count in (5, 7))
    return users, items, torch.randint(7, (8, 3), generator=generator), torch.randn(8, generator=generator)


# ── with parameters ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_model_with_parameters_and_tables_trains_as_in_torch_on_averaged_gradients(workers):
    start = hw.Normal(std=0.5)

    def loss_of(net, step, rank):
        users, items, histories, target = interactions(step, rank)
        return (net(users, items, histories) - target).square().mean()

    def work(worker):
        items = {"dim": 2, "rule": hw.Adagrad(lr=0.1), "initializer": start}
        net = Recommender(
            embedding(worker, hw.SGD(lr=0.2), "users", 2, initializer=start, seed=1),
            hw.torch.Embedding(worker, "items", **items),
            hw.torch.EmbeddingBag(worker, "items", padding_idx=0, **items),
        )
        opt = optimizer(worker, net, hw.Adam(lr=0.01))
        for step in range(20):
            opt.zero_grad()
            loss_of(net, step, worker.rank).backward()
            opt.step()
            assert opt.result == hw.StepResult(step + 1, True, workers, 0)
        worker.barrier()
        return [table.pull(np.arange(n)) for table, n in ((net.users.table, 5), (net.items.table, 7))]

    items, users = nn.Embedding(7, 2), nn.Embedding(5, 2)
    history = nn.EmbeddingBag(7, 2, padding_idx=0)
    history.weight = items.weight
    plain = Recommender(users, items, history)
    users.weight.data = torch.from_numpy(start.rows(1, np.arange(5), 2))
    items.weight.data = torch.from_numpy(start.rows(0, np.arange(7), 2))
    own = [
        torch.optim.SGD(users.parameters(), lr=0.2),
        torch.optim.Adagrad(items.parameters(), lr=0.1),
        torch.optim.Adam(plain.top.parameters(), lr=0.01),
    ]
    for step in range(20):
        plain.zero_grad()
        sum(loss_of(plain, step, rank) / workers for rank in range(workers)).backward()
        for one in own:
            one.step()

    result = train(work, workers=workers, servers=2)
    for got in result.values:
        for rows, module in zip(got, (users, items), strict=True):
            np.testing.assert_allclose(rows, module.weight.detach().numpy(), rtol=1e-5, atol=1e-5)
    for name, value in plain.top.named_parameters():
        np.testing.assert_allclose(
            result.parameters["model"][f"top.{name}"], value.detach().numpy(), rtol=1e-5, atol=1e-5
        )


def test_rows_and_parameters_change_in_the_same_version():
    def work(worker):
        net = nn.Sequential(embedding(worker, initializer=ONES), nn.Linear(1, 1, bias=False))
        net[1].weight.data.fill_(1.0)
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        before = worker.version
        net(torch.tensor([5])).sum().backward()
        opt.step()
        assert worker.version == before + 1
        assert (row(net[0], 5), net[1].weight.item()) == ([0], 0)

    train(work)


# ── without parameters ──────────────────────────────────────────────────────────────────────────


def test_a_model_of_tables_alone_needs_no_rule():
    def work(worker):
        net = nn.ModuleList([embedding(worker), embedding(worker, name="other")])
        opt = tables_optimizer(worker, net)
        for _ in range(3):
            (net[0](torch.tensor([worker.rank, 9])) + net[1](torch.tensor([1, 2]))).sum().backward()
            opt.step()
            opt.pull_parameters()
        worker.barrier()
        assert row(net[0], 0, 1, 9) == [-1.5, -1.5, -3]
        assert row(net[1], 1, 2) == [-3, -3]
        assert opt.state_dict()["state"] == {}
        opt.push_parameters()

    result = train(work, workers=2, servers=2)
    assert result.parameters == {}


def test_parameters_beside_tables_need_a_rule():
    def work(worker):
        net = nn.Sequential(embedding(worker), nn.Linear(1, 1))
        with pytest.raises(ConfigurationError, match=r"rule must be a Rule such as .* got None"):
            tables_optimizer(worker, net)
        with pytest.raises(ConfigurationError, match="'raise', 'skip' or 'off', got 'ignore'"):
            tables_optimizer(worker, net[0], nonfinite="ignore")

    train(work)


def test_buffers_beside_tables_travel():
    def work(worker):
        norm = nn.BatchNorm1d(1, affine=False)
        net = nn.Sequential(embedding(worker), norm)
        opt = tables_optimizer(worker, net)
        norm.running_mean.fill_(2.0 if worker.rank == 0 else 7.0)
        net[0](torch.tensor([1])).sum().backward()
        opt.step()
        assert norm.running_mean.item() == 2.0

    train(work, workers=2)


# ── gradients that must not be sent ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_a_gradient_that_is_not_finite_raises_and_leaves_everything_as_it_was(dense, bad):
    def work(worker):
        net = nn.ModuleList([embedding(worker), embedding(worker, name="other")])
        if dense:
            net.append(nn.Linear(1, 1, bias=False))
            net[2].weight.data.fill_(3.0)
        opt = optimizer(worker, net, hw.SGD(lr=1.0) if dense else None)
        loss = net[0](torch.tensor([1])).sum() + bad * net[1](torch.tensor([2, 2])).sum()
        if dense:
            loss = loss + net[2](torch.ones(1, 1)).sum()
        loss.backward()
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="gradients of table 'other' hold NaN or infinity"):
                opt.step()
        assert opt.result is None
        opt.zero_grad()
        net[0](torch.tensor([3])).sum().backward()
        opt.step()
        assert row(net[0], 1, 3) == [0, -1]
        assert row(net[1], 2) == [0]
        assert not dense or net[2].weight.item() == 3

    train(work)


def test_with_skip_the_turn_is_empty_and_with_off_it_is_sent():
    def work(worker):
        net = nn.Sequential(embedding(worker, initializer=ONES), nn.Linear(1, 1, bias=False))
        net[1].weight.data.fill_(1.0)
        opt = optimizer(worker, net, hw.SGD(lr=1.0), nonfinite="skip")
        for factor, contributors in ((math.nan, 0), (1.0, 1)):
            opt.zero_grad()
            hook = net[0].register_forward_hook(lambda _, __, rows, f=factor: rows * f)
            (net(torch.tensor([1])).sum() if factor == 1.0 else net[0](torch.tensor([1])).sum()).backward()
            hook.remove()
            opt.step()
            assert opt.result.contributors == contributors
        assert (row(net[0], 1), net[1].weight.item()) == ([0], 0)
        assert worker.statistics().skipped == 1

        other = embedding(worker, name="other")
        opt = tables_optimizer(worker, other, nonfinite="off")
        (other(torch.tensor([1, 2])) * torch.tensor([[math.nan], [1.0]])).sum().backward()
        opt.step()
        assert math.isnan(row(other, 1)[0])
        assert row(other, 2) == [-1]

    train(work)


def test_a_grad_scaler_unscales_rows_too_and_finds_infinity_in_them():
    def work(worker):
        rule = hw.SGD(lr=0.25)
        net = nn.Sequential(embedding(worker, rule, initializer=ONES), nn.Linear(1, 1, bias=False))
        net[1].weight.data.fill_(1.0)
        opt = optimizer(worker, net, rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for explicit in (False, True):
            opt.zero_grad()
            scaler.scale(net(torch.tensor([explicit + 10])).sum()).backward()
            if explicit:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        assert row(net[0], 10) == [0.75]
        assert row(net[0], 11) == [1 - 0.25 * 0.75]  # the weight was 0.75
        assert net[1].weight.item() == 0.5
        opt.zero_grad()
        scaler.scale(math.inf * net[0](torch.tensor([10])).sum()).backward()
        scaler.step(opt)
        scaler.update()
        assert opt.result.contributors == 0
        assert scaler.get_scale() == 512
        opt.step()
        assert row(net[0], 10) == [0.75]

    train(work)


def test_clipping_over_the_groups_counts_rows_in_the_norm():
    def work(worker):
        net = nn.ModuleList([embedding(worker), nn.Linear(1, 1, bias=False)])
        net[1].weight.data.fill_(0.0)
        opt = optimizer(worker, net, hw.SGD(lr=1.0))
        (3 * net[0](torch.tensor([1])).sum() + 4 * net[1](torch.ones(1, 1)).sum()).backward()
        everything = [one for group in opt.param_groups for one in group["params"]]
        assert nn.utils.clip_grad_norm_(everything, 1.0).item() == 5
        opt.step()
        assert row(net[0], 1)[0] == pytest.approx(-0.6)
        assert net[1].weight.item() == pytest.approx(-0.8)

    train(work)


def test_a_module_belongs_to_the_optimizer_that_was_made_last():
    def work(worker):
        one, other = embedding(worker), embedding(worker)
        first, separate = tables_optimizer(worker, one), tables_optimizer(worker, other)
        one(torch.tensor([1])).sum().backward()
        second = tables_optimizer(worker, one)
        with pytest.raises(UsageError, match="table 'rows' belongs to another DistributedOptimizer now"):
            first.step()
        separate.step()  # shares the table, not the module
        assert row(one, 1) == [0]
        second.step()
        assert row(one, 1) == [-1]

    train(work)


# ── settings ────────────────────────────────────────────────────────────────────────────────────


def test_each_table_is_a_group_with_its_own_rate():
    def work(worker):
        net = nn.ModuleList([embedding(worker, hw.Adagrad(lr=0.5)), nn.Linear(1, 1)])
        opt = optimizer(worker, net, hw.Adam(lr=0.1), groups=[{"params": ["1.bias"], "lr": 0.2}])
        assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2, 0.5]
        assert [group.get("table") for group in opt.param_groups] == [None, None, "rows"]
        assert opt.param_groups[2]["params"] == []

    train(work)


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_schedulers_change_the_rates_of_rows_on_the_servers(sync):
    def work(worker):
        net = embedding(worker, hw.SGD(lr=1.0))
        opt = tables_optimizer(worker, net)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        for expected in (-1, -1.5, -1.75):
            net(torch.tensor([1])).sum().backward()
            opt.step()
            scheduler.step()
            assert row(net, 1) == [expected]
        opt.param_groups[0]["lr"] = 8.0
        net(torch.tensor([1])).sum().backward()
        opt.step()
        assert row(net, 1) == [-9.75]

    train(work, sync=sync)


def test_schedulers_that_cycle_momentum_find_it_in_every_group():
    def work(worker):
        net = nn.ModuleList([embedding(worker, hw.SGD(lr=1.0)), nn.Linear(1, 1)])
        opt = optimizer(worker, net, hw.Adam(lr=0.1))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=4)
        for _ in range(3):
            net[0](torch.tensor([1])).sum().backward()
            opt.step()
            scheduler.step()

    train(work)


def test_an_impossible_rate_of_a_table_is_refused():
    def work(worker):
        net = embedding(worker)
        opt = tables_optimizer(worker, net)
        opt.param_groups[0]["lr"] = -1.0
        with pytest.raises(ConfigurationError, match=r"lr=-1\.0 is impossible"):
            opt.step()

    train(work)


def test_saved_settings_are_restored_even_while_gradients_wait():
    def work(worker):
        net = nn.ModuleList([embedding(worker), nn.Linear(1, 1, bias=False)])
        opt = optimizer(worker, net, hw.SGD(lr=0.5))
        saved = opt.state_dict()
        net[0](torch.tensor([1])).sum().backward()
        assert opt.state_dict()["param_groups"] == saved["param_groups"]
        assert [group["params"] for group in saved["param_groups"]] == [[0], []]
        saved["param_groups"][1]["lr"] = 4.0
        opt.load_state_dict(saved)
        opt.step()
        assert row(net[0], 1) == [-4]
        net[0](torch.tensor([1])).sum().backward()
        assert len(opt.param_groups[1]["params"]) == 1
        opt.step()
        assert row(net[0], 1) == [-8]

    train(work)


# ── steps on the local copy ─────────────────────────────────────────────────────────────────────


def test_gradients_of_rows_wait_for_the_push_and_zero_grad_does_not_reach_them():
    def work(worker):
        net = nn.ModuleList([embedding(worker), nn.Linear(1, 1, bias=False)])
        net[1].weight.data.fill_(0.0)
        opt = optimizer(worker, net, hw.SGD(lr=1.0), push_every=3)
        for expected in (0, 0, -3, -3):
            opt.zero_grad()
            (net[0](torch.tensor([1, 2])).sum() + net[1](torch.ones(1, 1)).sum()).backward()
            opt.step()
            assert row(net[0], 1, 2) == [expected, expected]
        opt.flush()
        assert row(net[0], 1) == [-4]
        assert net[1].weight.item() == -4

    train(work, sync="async")


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_local_steps_hold_no_gradient_that_is_not_finite(nonfinite):
    def work(worker):
        net = embedding(worker)
        opt = tables_optimizer(worker, net, rule=hw.SGD(lr=1.0), push_every=2, nonfinite=nonfinite)
        (math.nan * net(torch.tensor([1]))).sum().backward()
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="table 'rows'"):
                opt.step()
            opt.zero_grad()
        opt.step()
        net(torch.tensor([1])).sum().backward()
        opt.step()
        assert row(net, 1) == [-1]

    train(work, sync="async")
