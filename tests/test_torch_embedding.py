"""`headwater.torch.Embedding`: what torch.nn.Embedding gives, with rows on the servers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_loops import optimizer, train

import headwater as hw
from headwater.errors import ConfigurationError, RegistrationError, UsageError

INT64 = np.iinfo(np.int64)
START = hw.Normal(std=0.5)
IDS = np.array([7, -3, 0, 10**12, -1, INT64.min, INT64.max, 42, 8, -(10**9)])
DIM, STEPS = 4, 50


def embedding(worker, rule=None, name="rows", dim=DIM, **options):
    rule = rule or hw.SGD(lr=1.0)
    return hw.torch.Embedding(worker, name, dim, rule, **{"initializer": START, **options})


def counted(worker, **options):
    """Rows of one column that start from 0 and lose the sum of their gradients."""
    return embedding(worker, dim=1, **{"initializer": hw.Zeros(), **options})


def row(module, *ids):
    """What the servers have, as a list."""
    return module.table.pull(np.array(ids, dtype=np.int64)).ravel().tolist()


def draws(step, everything=False):
    """Positions in IDS, [6, 5], with repeats; all of them in each step, or only some."""
    generator = torch.Generator().manual_seed(step)
    few = torch.randint(len(IDS), (30,), generator=generator)
    return (torch.cat([torch.arange(len(IDS)), few[:20]]) if everything else few).reshape(6, 5)


RULES = {
    "sgd": (hw.SGD(lr=0.2), lambda p: torch.optim.SGD(p, 0.2), False),
    "momentum": (hw.SGD(lr=0.02, momentum=0.9), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), True),
    "adagrad": (hw.Adagrad(lr=0.2), lambda p: torch.optim.Adagrad(p, 0.2), False),
    # torch corrects bias by the tensor's steps, a table by the row's: equal where a row is in every step
    "adam": (hw.Adam(lr=0.02), lambda p: torch.optim.SparseAdam(p, 0.02), True),
}


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("kind", RULES)
def test_training_agrees_with_a_sparse_embedding_of_torch(kind, padding):
    rule, make, everything = RULES[kind]
    target = torch.linspace(-1, 1, DIM)

    def loss_of(rows, step):
        return ((rows - target * (1 + step % 3)) ** 2).mean(dim=(1, 2)).sum()

    def work(worker):
        padding_idx = None if padding is None else int(IDS[padding])
        module = embedding(worker, rule, seed=3, padding_idx=padding_idx)
        opt = hw.torch.DistributedOptimizer(worker, module)
        losses = []
        for step in range(STEPS):
            opt.zero_grad()
            loss = loss_of(module(torch.from_numpy(IDS)[draws(step, everything)]), step)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses, module.table.pull(IDS)

    plain = nn.Embedding(len(IDS), DIM, sparse=True, padding_idx=padding)
    plain.weight.data = torch.from_numpy(START.rows(3, IDS, DIM))
    if padding is not None:
        plain.weight.data[padding] = 0
    opt = make(plain.parameters())
    expected = []
    for step in range(STEPS):
        opt.zero_grad()
        loss = loss_of(plain(draws(step, everything)), step)
        loss.backward()
        opt.step()
        expected.append(loss.item())
    losses, rows = train(work, servers=2).values[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    trained = [i for i in range(len(IDS)) if i != padding]
    np.testing.assert_allclose(rows[trained], plain.weight.detach().numpy()[trained], rtol=1e-5, atol=1e-5)
    assert expected[-1] < expected[2] / 2


# ── forward ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (0,), (2, 0)])
def test_ids_of_any_shape_and_integer_type_give_their_initial_rows(shape, dtype):
    def work(worker):
        ids = torch.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
        module = embedding(worker)
        rows = module(ids)
        assert (rows.shape, rows.dtype) == ((*shape, DIM), torch.float32)
        expected = START.rows(0, ids.flatten().numpy().astype(np.int64), DIM).reshape(*shape, DIM)
        assert (rows.detach().numpy() == expected).all()
        rows.sum().backward()
        assert len(module.table) == 0

    train(work)


def test_arrays_and_lists_are_ids_too():
    def work(worker):
        module = embedding(worker)
        expected = module(torch.tensor([1, 2, 1]))
        assert module(np.array([1, 2, 1])).equal(expected)
        assert module([1, 2, 1]).equal(expected)

    train(work)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.ones(2), "ids must be integers, got torch.float32"),
        (torch.ones(2, dtype=torch.bfloat16), "ids must be integers, got torch.bfloat16"),
        (torch.ones(2, dtype=torch.complex64), "ids must be integers, got torch.complex64"),
        (torch.ones(2, dtype=torch.bool), "ids must be integers, got bool"),
        (torch.tensor([2**63], dtype=torch.uint64), "ids must fit int64, got 9223372036854775808"),
        (["one"], "ids must be integers"),
    ],
)
def test_what_is_no_id_is_refused_and_changes_nothing(ids, text):
    def work(worker):
        module = counted(worker)
        for call in (module, module.prefetch):
            with pytest.raises(UsageError, match=text):
                call(ids)
        opt = hw.torch.DistributedOptimizer(worker, module)
        module(torch.tensor([1])).sum().backward()
        opt.step()
        assert row(module, 1) == [-1]

    train(work)


def test_impossible_arguments_are_refused():
    def work(worker):
        for wrong in (1.5, "0", True, 2**63):
            with pytest.raises(ConfigurationError, match="padding_idx must be None or an integer that fits"):
                embedding(worker, padding_idx=wrong)
        with pytest.raises(RegistrationError, match="dim must be an integer ≥ 1, got 0"):
            embedding(worker, dim=0)
        with pytest.raises(RegistrationError, match="rule must be a Rule"):
            hw.torch.Embedding(worker, "rows", 4, torch.optim.SGD)
        embedding(worker, dim=4)
        with pytest.raises(RegistrationError, match="dim"):
            embedding(worker, dim=5)

    train(work)


def test_padding_is_zeros_and_gets_neither_gradient_nor_row():
    def work(worker):
        module = embedding(worker, padding_idx=-1)
        opt = hw.torch.DistributedOptimizer(worker, module)
        rows = module(torch.tensor([[5, -1], [-1, -1]]))
        assert rows[0, 0].any()
        assert not rows[0, 1].any()
        assert not rows[1].any()
        rows.sum().backward()
        opt.step()
        assert len(module.table) == 1
        assert module(torch.tensor([-1, -1])).equal(torch.zeros(2, DIM))
        module(torch.tensor([-1, -1])).sum().backward()
        opt.step()
        assert opt.result.contributors == 0
        assert len(module.table) == 1

    train(work)


def test_the_output_may_be_changed_in_place():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        rows = module(torch.tensor([1, 2]))
        rows.mul_(3)
        torch.relu_(rows.add_(1))
        rows.sum().backward()
        opt.step()
        assert row(module, 1, 2) == [-3, -3]

    train(work)


# ── backward ────────────────────────────────────────────────────────────────────────────────────


def test_repeats_forwards_and_backwards_before_a_step_add_up():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        first, second = module(torch.tensor([1, 1, 2])), module(torch.tensor([[2, 3]]))
        (first.sum() + 10 * second.sum()).backward()
        module(torch.tensor([3])).mul(100).sum().backward()
        opt.step()
        assert row(module, 1, 2, 3, 4) == [-2, -11, -110, 0]

    train(work)


def test_a_graph_that_is_kept_may_be_gone_through_again():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        loss = module(torch.tensor([1])).sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        opt.step()
        assert row(module, 1) == [-2]
        loss.backward()
        opt.step()
        assert row(module, 1) == [-3]

    train(work)


def test_a_gradient_is_sent_once_and_zero_grad_forgets_it():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        module(torch.tensor([1])).sum().backward()
        opt.step()
        opt.step()
        assert opt.result.contributors == 0
        assert row(module, 1) == [-1]
        for set_to_none in (True, False):
            module(torch.tensor([1])).sum().backward()
            opt.zero_grad(set_to_none)
            opt.step()
        assert row(module, 1) == [-1]

    train(work)


def test_without_grad_mode_nothing_is_collected():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not module(torch.tensor([1])).requires_grad
        module(torch.tensor([1]))  # with grad mode, but no backward
        module.eval()(torch.tensor([2])).sum().backward()  # eval is not no_grad, as in torch
        opt.step()
        assert row(module, 1, 2) == [0, -1]

    train(work)


def test_two_modules_share_the_table_of_their_name():
    def work(worker):
        net = nn.ModuleList([counted(worker), counted(worker, padding_idx=1), counted(worker, name="other")])
        assert net[0].table is net[1].table
        opt = hw.torch.DistributedOptimizer(worker, net)
        assert [group["table"] for group in opt.param_groups] == ["rows", "other"]
        ids = torch.tensor([1, 2])
        (net[0](ids) + 10 * net[1](ids) + 100 * net[2](ids)).sum().backward()
        opt.step()
        assert row(net[0], 1, 2) == [-1, -11]
        assert row(net[2], 1, 2) == [-100, -100]

    train(work)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_segment_sends_each_gradient_once(reentrant):
    def work(worker):
        net = nn.Sequential(counted(worker), nn.Linear(1, 1, bias=False))
        net[1].weight.data.fill_(2.0)
        opt = optimizer(worker, net, hw.SGD(lr=0.5))
        ids = torch.tensor([1, 1, 2])
        scale = torch.ones(1, requires_grad=True)  # reentrant checkpoints need an input with a gradient
        out = checkpoint(lambda s: net(ids) * s, scale, use_reentrant=reentrant)
        out.sum().backward()
        opt.step()
        assert row(net[0], 1, 2) == [-4, -2]

    train(work)


def test_a_compiled_net_gives_what_the_plain_one_gives():
    def work(worker):
        torch.manual_seed(0)
        net = nn.Sequential(embedding(worker), nn.Linear(DIM, 1))
        compiled = torch.compile(net, backend="aot_eager")
        opt = optimizer(worker, compiled, hw.SGD(lr=0.1))
        for step in range(3):
            opt.zero_grad()
            ids = torch.arange(step, step + 5)
            torch.testing.assert_close(compiled(ids), net(ids))
            compiled(ids).square().sum().backward()
            opt.step()
        assert len(net[0].table) == 7

    train(work)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_ids_of_a_gpu_give_rows_there_and_their_gradients_are_sent():
    def work(worker):
        module = counted(worker)
        opt = hw.torch.DistributedOptimizer(worker, module)
        rows = module(torch.tensor([1, 1, 2], device="cuda"))
        assert rows.is_cuda
        rows.sum().backward()
        opt.step()
        assert row(module, 1, 2) == [-2, -1]

    train(work)


# ── as a module ─────────────────────────────────────────────────────────────────────────────────


def test_a_module_of_rows_has_no_parameters_and_no_state():
    def work(worker):
        module = embedding(worker, padding_idx=0)
        assert list(module.parameters()) == list(module.buffers()) == []
        assert module.state_dict() == {}
        module.load_state_dict({})
        assert module.to(torch.float16)(torch.tensor([1])).dtype is torch.float32
        assert repr(module) == "Embedding('rows', 4, padding_idx=0)"

    train(work)


def test_pickling_is_refused_and_a_deep_copy_shares_the_table():
    def work(worker):
        net = nn.Sequential(counted(worker), nn.Linear(1, 1))
        for save in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
            with pytest.raises(UsageError, match=r"'rows' cannot be pickled.*state_dict\(\)"):
                save(net)
        net[0](torch.tensor([1])).sum().backward()
        other = copy.deepcopy(net)
        assert other[0].table is net[0].table
        assert other[0].collected is not net[0].collected
        opt = hw.torch.DistributedOptimizer(worker, net[0])
        other[0](torch.tensor([1])).mul(10).sum().backward()
        opt.step()
        assert row(net[0], 1) == [-1]

    train(work)
