"""`EmbeddingBagCollection` and `pull_rows`: many tables in one exchange, with torch's numbers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch_loops import train

import headwater as hw
from headwater.errors import ConfigurationError, UsageError

START = hw.Normal(std=0.5)
VOCABULARY = 9
FEATURES = {"user": ("people", 3), "friend": ("people", 3), "item": ("items", 2), "shop": ("shops", 4)}
BATCH = 5


class Jagged:
    """What a TorchRec KeyedJaggedTensor offers, as methods."""

    def __init__(self, keys, values, offsets, weights=None):
        self._parts = keys, values, offsets, weights

    def keys(self):
        return self._parts[0]

    def values(self):
        return self._parts[1]

    def offsets(self):
        return self._parts[2]

    def weights_or_none(self):
        return self._parts[3]


def jagged(step, names, weighted=False):
    """Bags of 0 to 3 ids a feature, in the order of `names`, and the same for each feature alone."""
    generator = np.random.default_rng(step)
    ids, offsets, each = [], [0], {}
    for name in names:
        lengths = generator.integers(0, 4, BATCH)
        mine = generator.integers(0, VOCABULARY, lengths.sum())
        each[name] = torch.from_numpy(mine), torch.from_numpy(np.cumsum([0, *lengths]))
        ids.append(mine)
        offsets += (offsets[-1] + np.cumsum(lengths)).tolist()
    values = torch.from_numpy(np.concatenate(ids))
    weights = torch.linspace(-1, 2, len(values)) if weighted else None
    return Jagged(list(names), values, torch.tensor(offsets), weights), each


def configs(mode="sum", rule=None, **options):
    tables = {}
    for feature, (table, dim) in FEATURES.items():
        tables.setdefault((table, dim), []).append(feature)
    return [
        hw.torch.EmbeddingBagConfig(
            table, dim, rule or hw.Adagrad(lr=0.1), features, mode, initializer=START, **options
        )
        for (table, dim), features in tables.items()
    ]


def exchanges(worker):
    return worker._session.machine.number


def loss_of(out):
    return sum((rows - 0.3).square().sum() for rows in out.values())


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
def test_training_agrees_with_torch_and_takes_two_exchanges_a_step_or_one(mode, weighted):
    names = ["shop", "other", "user", "item", "friend"]  # another order than the tables', and one too many

    def work(worker):
        module = hw.torch.EmbeddingBagCollection(worker, configs(mode))
        opt = hw.torch.DistributedOptimizer(worker, module)
        outs = []
        for step in range(12):
            batch, _ = jagged(step, names, weighted)
            before = exchanges(worker)
            out = module(batch)
            assert exchanges(worker) == before + (step < 6 or step == 0)
            outs.append({name: rows.detach() for name, rows in out.items()})
            opt.zero_grad()
            loss_of(out).backward()
            if step >= 5:
                module.prefetch(jagged(step + 1, names)[0])
            before = exchanges(worker)
            opt.step()
            assert exchanges(worker) == before + 1
        tables = {bags.table: np.arange(VOCABULARY) for bags in module.bags}
        return outs, list(worker.pull(tables).values())

    plain = {
        one.name: nn.EmbeddingBag(VOCABULARY, one.dim, mode=mode, include_last_offset=True)
        for one in configs()
    }
    for module in plain.values():
        rows = START.rows(0, np.arange(VOCABULARY), module.embedding_dim)
        module.weight.data = torch.from_numpy(rows)
    opt = torch.optim.Adagrad([p for module in plain.values() for p in module.parameters()], lr=0.1)
    outs, rows = train(work, servers=2).values[0]
    for step, out in enumerate(outs):
        batch, each = jagged(step, names, weighted)
        ends = np.cumsum([0, *(len(ids) for ids, _ in each.values())])
        here = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(each)}
        expected = {
            name: plain[table](*each[name], batch.weights_or_none()[here[name]] if weighted else None)
            for name, (table, _) in FEATURES.items()
        }
        assert list(out) == [name for one in configs() for name in one.features]
        for name, value in expected.items():
            assert out[name].shape == (BATCH, FEATURES[name][1])
            torch.testing.assert_close(out[name], value.detach())
        opt.zero_grad()
        loss_of(expected).backward()
        opt.step()
    for module, mine in zip(plain.values(), rows, strict=True):
        np.testing.assert_allclose(mine, module.weight.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_mapping_of_ids_says_the_same_as_keys_values_and_offsets():
    def work(worker):
        module = hw.torch.EmbeddingBagCollection(worker, configs(padding_idx=2))
        batch, each = jagged(3, FEATURES)
        out, of_pairs = module(batch), module(each)
        square = {name: torch.full((BATCH, 2), 7) for name in FEATURES}
        square["user"][0, 1] = 2
        of_squares = module(square)
        for name in FEATURES:
            assert torch.equal(out[name], of_pairs[name])
            bags = next(one for one in module.bags if one.table.name == FEATURES[name][0])
            assert torch.equal(of_squares[name], bags(square[name].flatten(), torch.arange(BATCH + 1) * 2))
        nothing = {name: torch.zeros((0, 2), dtype=torch.int64) for name in FEATURES}
        assert [tuple(rows.shape) for rows in module(nothing).values()] == [(0, 3), (0, 3), (0, 2), (0, 4)]

    train(work)


class TwoTowers(nn.Module):
    def __init__(self, worker):
        super().__init__()
        rule = hw.SGD(lr=0.5)
        self.users = hw.torch.Embedding(worker, "people", 3, rule, initializer=START, padding_idx=0)
        self.items = hw.torch.EmbeddingBag(worker, "items", 3, rule, mode="sum", initializer=START)

    def forward(self, users, friends, items, together):
        if together:
            hw.torch.pull_rows([(self.users, users), (self.users, friends), (self.items, items)])
        return (self.users(users) * self.items(items)).sum(dim=1) + self.users(friends).sum(dim=1)


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_modules_of_one_forward_read_in_one_exchange_and_train_as_they_do_alone(sync):
    def work(worker, together):
        net = TwoTowers(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        for step in range(5):
            batch = torch.tensor([step, 1, 0]), torch.tensor([4, 1, step + 1]), torch.arange(6).reshape(3, 2)
            before = exchanges(worker)
            loss = net(*batch, together).square().sum()
            assert exchanges(worker) == before + (1 if together else 3)
            opt.zero_grad()
            loss.backward()
            opt.step()
        return [rows.tolist() for rows in worker.pull({one: range(9) for one in worker_tables(net)}).values()]

    def worker_tables(net):
        return [net.users.table, net.items.table]

    together, alone = (
        train(lambda worker, how=how: work(worker, how), servers=2, sync=sync).values for how in (True, False)
    )
    assert together == alone


def test_an_id_that_another_look_up_had_is_not_touched_by_this_ones_gradient():
    def work(worker):
        net = hw.torch.Embedding(worker, "rows", 1, hw.Adam(lr=1.0), initializer=hw.Zeros())
        opt = hw.torch.DistributedOptimizer(worker, net)
        hw.torch.pull_rows([(net, torch.tensor([1])), (net, torch.tensor([2]))])
        net(torch.tensor([1])).sum().backward()
        net(torch.tensor([2]))
        opt.step()
        return len(net.table), net.table.pull([1, 2]).ravel().tolist()

    (count, rows) = train(work).values[0]
    assert count == 1
    assert rows == [pytest.approx(-1.0), 0.0]


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"user": torch.zeros((2, 1), dtype=torch.int64)}, "no feature 'friend', which table 'people'"),
        (Jagged(["user", "friend"], torch.arange(3), torch.tensor([0, 1, 3])), "no feature 'item'"),
        (Jagged(list(FEATURES), torch.arange(3), torch.tensor([0, 1, 3])), "a multiple of 4 entries"),
        (Jagged(list(FEATURES), torch.arange(3), torch.tensor([0, 1, 0, 2, 3])), "never fall"),
        (Jagged(list(FEATURES), torch.arange(3), torch.tensor([0, 1, 1, 2, 2])), "must be 3, the number"),
        (dict.fromkeys(FEATURES, (torch.arange(4), torch.tensor([0, 9]))), "end at most at 4"),
        (dict.fromkeys(FEATURES, torch.arange(4)), r"expected ids \[batch, length\]"),
        (dict.fromkeys(FEATURES, torch.ones((2, 2))), "ids must be integers"),
        (torch.arange(4), "without 'keys'"),
    ],
)
def test_a_batch_that_says_something_else_is_refused_before_anything_is_sent(batch, text):
    def work(worker):
        module = hw.torch.EmbeddingBagCollection(worker, configs())
        before = exchanges(worker)
        for call in (module, module.prefetch):
            with pytest.raises(UsageError, match=text):
                call(batch)
        assert exchanges(worker) == before

    train(work)


def test_features_of_one_table_have_as_many_bags():
    def work(worker):
        module = hw.torch.EmbeddingBagCollection(worker, configs())
        batch = {name: torch.zeros((2 + (name == "friend"), 1), dtype=torch.int64) for name in FEATURES}
        with pytest.raises(UsageError, match="different numbers of bags: 'user' 2, 'friend' 3"):
            module(batch)
        with pytest.raises(UsageError, match="got Linear, expected an Embedding or EmbeddingBag"):
            hw.torch.pull_rows({nn.Linear(2, 2): torch.arange(2)})
        hw.torch.pull_rows({})

    train(work)


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ([], "got no tables"),
        (configs()[:1] * 2, "table 'people' is there twice"),
        ([hw.torch.EmbeddingBagConfig("a", 1, hw.SGD(lr=1.0), ["x", "x"])], "feature 'x' is there twice"),
        ([hw.torch.EmbeddingBagConfig("a", 1, hw.SGD(lr=1.0), "xy")], "expected a list of names"),
        ([hw.torch.EmbeddingBagConfig("a", 1, hw.SGD(lr=1.0), ["x"], "most")], "mode must be 'sum'"),
    ],
)
def test_impossible_collections_are_refused(tables, text):
    def work(worker):
        with pytest.raises(ConfigurationError, match=text):
            hw.torch.EmbeddingBagCollection(worker, tables)

    train(work)
