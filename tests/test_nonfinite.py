"""What is not finite is found at the worker before anything is sent, however it came to be there."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import headwater as hw
from examples import examples
from headwater.errors import NonFiniteError
from headwater.worker.row_sums import RowSums

BIG = np.float32(2e38)
"""Finite; twice that is not."""


def alone(function, **options):
    """Run `function(worker)` as the only worker of a cluster, in this thread."""
    with hw.Cluster(workers=1, patience=5, deadline=60, **options) as cluster, cluster.worker() as worker:
        return function(worker)


def full(value, dtype=np.float32):
    return {"w": np.full(3, value, dtype)}


PUSHES = {
    "a sum of two": [full(BIG), full(BIG)],
    "a float64 that float32 cannot hold": [full(1e300, np.float64)],
    "such a float64 in the second": [full(0.0), full(1e300, np.float64)],
    "NaN in the second": [full(1.0), full(np.nan)],
    "one infinity after many": [full(1.0), full(2.0), {"w": np.array([0, np.inf, 0], np.float32)}],
    "a float16 that is infinite": [full(np.inf, np.float16)],
}


@pytest.mark.parametrize("kind", PUSHES)
def test_pushes_to_a_model_that_come_to_what_is_not_finite(kind):
    *fine, bad = PUSHES[kind]

    def work(worker):
        model = worker.model("m", full(0.0), hw.SGD(lr=1.0))
        for push in fine:
            model.push(push)
        with pytest.raises(NonFiniteError, match=r"'w' of model 'm'.*turn was not taken"):
            model.push(bad)
        assert worker.version == 0
        worker.step()
        assert model.pull()["w"].tolist() == [-sum(float(push["w"][0]) for push in fine)] * 3

    alone(work)


@pytest.mark.parametrize("kind", PUSHES)
def test_with_skip_such_pushes_make_an_empty_turn_that_is_counted_and_with_off_they_are_sent(kind):
    def skip(worker):
        model = worker.model("m", full(0.0), hw.SGD(lr=1.0), nonfinite="skip")
        for push in PUSHES[kind]:
            model.push(push)
        assert worker.step().contributors == 0
        model.push(full(1.0))
        assert worker.step().contributors == 1
        assert model.pull()["w"].tolist() == [-1.0] * 3
        assert worker.statistics().skipped == 1

    def off(worker):
        model = worker.model("m", full(0.0), hw.SGD(lr=1.0), nonfinite="off")
        for push in PUSHES[kind]:
            model.push(push)
        assert worker.step().contributors == 1
        assert not np.isfinite(model.pull()["w"]).all()

    alone(skip)
    alone(off)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_gradients_written_in_place_are_staged_as_they_are_and_tested(transport):
    def work(worker):
        model = worker.model("m", {"v": np.zeros((2, 2), np.float32)} | full(0.0), hw.SGD(lr=1.0))
        for name, gradient in model.gradients.items():
            gradient[...] = 1 + (name == "w")
        model.push(model.gradients)
        worker.step()
        model.gradients["w"][...] = np.nan
        with pytest.raises(NonFiniteError, match="'w' of model 'm'"):
            model.push(model.gradients)
        model.gradients["w"][...] = 5
        model.push({"w": model.gradients["w"]})
        model.push(full(1.0))  # another array adds
        model.gradients["w"][...] = BIG
        model.push({"w": model.gradients["w"]})  # finite as it is, though not together with what it replaces
        model.gradients["w"][...] = 6
        model.gradients["w"] += 10
        model.push({"w": model.gradients["w"]})  # what is there now, once
        worker.step()
        return {name: value.ravel().tolist() for name, value in model.pull().items()}

    values = alone(work, servers=2, transport=transport)
    assert values == {"v": [-1] * 4, "w": [-2 - 16] * 3}


def test_arrays_of_any_kind_are_pushed_beside_each_other():
    pushed = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(3, 2).T,
        "strided": np.arange(12, dtype=np.float32)[::2].reshape(2, 3),
        "big endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "float64": np.arange(6.0).reshape(2, 3),
        "whole": np.arange(6).reshape(2, 3),
        "torch": torch.arange(6.0).reshape(2, 3),
        "a list": [[0, 1, 2], [3, 4, 5]],
    }

    def work(worker):
        zeros = {name: np.zeros((2, 3), np.float32) for name in pushed} | {"scalar": np.float32(0)}
        model = worker.model("m", zeros, hw.SGD(lr=1.0))
        for _ in range(2):
            model.push(pushed | {"scalar": np.array(4, np.float32)})
        worker.step()
        for name, value in model.pull().items():
            expected = [4] if name == "scalar" else np.asarray(pushed[name]).ravel()
            assert (value.ravel() == -2 * np.asarray(expected)).all(), name

    alone(work)


def test_a_refused_push_of_many_tensors_adds_to_none_of_them():
    def work(worker):
        values = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
        model = worker.model("m", values, hw.SGD(lr=1.0))
        model.push({"a": np.ones(2), "b": np.full(2, BIG)})
        with pytest.raises(NonFiniteError):
            model.push({"a": np.ones(2), "b": np.full(2, BIG)})
        worker.step()
        assert model.pull()["a"].tolist() == [-1.0, -1.0]

    alone(work)


# ── tables ──────────────────────────────────────────────────────────────────────────────────────

ROW_PUSHES = {
    "two of one id": [([7], BIG), ([7], BIG)],
    "one with an id twice": [([7, 7], BIG)],
    "the third of an id": [([7, 8], BIG), ([9], BIG), ([8, 10], BIG)],
    "a float64 that float32 cannot hold": [([7], 1e300)],
    "NaN in the second": [([7], 1.0), ([8], np.nan)],
}


@pytest.mark.parametrize("kind", ROW_PUSHES)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "off"])
def test_pushes_of_rows_that_come_to_what_is_not_finite(kind, nonfinite):
    *fine, bad = ROW_PUSHES[kind]

    def push(table, ids, value):
        table.push(ids, np.full((len(ids), 2), value, np.float64))

    def work(worker):
        table = worker.table("t", 2, hw.SGD(lr=1.0), nonfinite=nonfinite)
        for ids, value in fine:
            push(table, ids, value)
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="table 't' hold NaN or infinity"):
                push(table, *bad)
        else:
            push(table, *bad)
        result = worker.step()
        rows = table.pull([7, 8, 9, 10])
        if nonfinite == "off":
            assert not np.isfinite(rows).all()
        elif nonfinite == "skip":
            assert (result.contributors, worker.statistics().skipped) == (0, 1)
            assert not rows.any()
        else:
            expected = {id: -value for ids, value in fine for id in ids}
            assert rows.tolist() == [[expected.get(id, 0.0)] * 2 for id in (7, 8, 9, 10)]

    alone(work, servers=2)


def test_many_pushes_before_a_step_take_memory_by_their_different_ids_and_add_up_exactly():
    def work(worker):
        table = worker.table("t", 4, hw.Accumulate())
        expected = {}
        for k in range(100):
            ids = np.arange(k, k + 50)
            table.push(ids, np.full((50, 4), k + 1, np.float32))
            for id in ids.tolist():
                expected[id] = expected.get(id, 0) + k + 1
            assert worker._rows.used < 4096
        worker.step()
        assert table.pull(list(expected))[:, 0].tolist() == list(expected.values())

    alone(work, servers=3)


@examples(25)
@given(
    st.lists(st.lists(st.integers(-3, 12), unique=True, max_size=8), max_size=12),
    st.integers(0, 2**32),
)
def test_sums_of_rows_are_those_of_a_plain_table_whatever_was_refused(parts, seed):
    generator = np.random.default_rng(seed)
    sums, plain = RowSums(2), {}
    for ids in parts:
        gradients = generator.standard_normal((len(ids), 2)).astype(np.float32)
        if ids and generator.random() < 0.3:
            gradients[generator.integers(len(ids))] = np.inf
        would = sums.would_be_finite(np.array(ids, np.int64), gradients)
        assert would is bool(np.isfinite(gradients).all())
        assert sums.add(np.array(ids, np.int64), gradients) is would
        if would:
            for id, gradient in zip(ids, gradients, strict=True):
                plain[id] = plain[id] + gradient if id in plain else gradient
    assert sums.ids.tolist() == list(plain)
    assert sums.rows.tolist() == [row.tolist() for row in plain.values()]


# ── torch ───────────────────────────────────────────────────────────────────────────────────────


def _by_data(parameter):
    parameter.grad.data[0, 1] = torch.nan


def _by_numpy(parameter):
    parameter.grad.numpy()[0, 1] = np.inf


def _by_detach(parameter):
    parameter.grad.detach()[0, 1] = torch.inf


def _by_adding(parameter):
    parameter.grad.fill_(float(BIG)).add_(float(BIG))


def _by_another_tensor(parameter):
    parameter.grad = torch.full_like(parameter, torch.nan)


WRITES = [_by_data, _by_numpy, _by_detach, _by_adding, _by_another_tensor]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "off"])
def test_a_gradient_of_a_module_is_found_not_finite_however_that_was_written(write, nonfinite):
    def work(worker):
        net = nn.Linear(2, 1, bias=False)
        start = net.weight.detach().clone()
        opt = hw.torch.DistributedOptimizer(worker, net, hw.SGD(lr=1.0), nonfinite=nonfinite)
        net(torch.ones(1, 2)).sum().backward()
        write(net.weight)
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="'weight' of model 'model'"):
                opt.step()
            assert worker.version == 0
        else:
            opt.step()
        assert net.weight.equal(start) is (nonfinite != "off")
        assert worker.statistics().skipped == (nonfinite == "skip")

    alone(work)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_gradients_that_local_steps_hold_back_do_not_add_up_to_infinity(nonfinite):
    class Net(nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.rows = hw.torch.Embedding(worker, "rows", 2, hw.SGD(lr=1.0), initializer=hw.Zeros())
            self.last = nn.Linear(2, 1, bias=False)

    def backward(net, dense, rows):
        net.last.weight.grad = torch.full((1, 2), float(dense))
        (net.rows([7]) * float(rows)).sum().backward()

    def work(worker):
        for k, (dense, rows) in enumerate([(BIG, 1.0), (1.0, BIG)]):
            net = Net(worker)
            opt = hw.torch.DistributedOptimizer(
                worker, net, hw.SGD(lr=0.0), name=f"m{k}", push_every=3, pull_every=3, nonfinite=nonfinite
            )
            backward(net, dense, rows)
            opt.step()
            backward(net, dense, rows)
            if nonfinite == "raise":
                with pytest.raises(NonFiniteError):
                    opt.step()
            else:
                opt.step()
            opt.flush()
            assert opt.result.contributors == 1
            assert np.isfinite(net.rows.table.pull([7])).all()
            net.rows.table.delete([7])

    alone(work, sync="async")


def test_rows_pushed_beside_a_modules_add_up_to_infinity_and_are_found():
    class Net(nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.rows = hw.torch.Embedding(worker, "rows", 2, hw.SGD(lr=1.0), initializer=hw.Zeros())

    def work(worker):
        net = Net(worker)
        opt = hw.torch.DistributedOptimizer(worker, net)
        net.rows.table.push([7], np.full((1, 2), BIG))
        (net.rows([7]) * float(BIG)).sum().backward()
        with pytest.raises(NonFiniteError, match="table 'rows'"):
            opt.step()
        opt.zero_grad()
        opt.step()
        assert net.rows.table.pull([7]).tolist() == [[-float(BIG)] * 2]

    alone(work)


def test_a_jax_gradient_that_adds_up_to_infinity_is_found():
    jax = pytest.importorskip("jax")

    def work(worker):
        opt = hw.jax.DistributedOptimizer(worker, {"w": jax.numpy.zeros(2)}, hw.SGD(lr=1.0))
        opt.model.push({"w": np.full(2, BIG)})
        with pytest.raises(NonFiniteError, match="'w' of model 'model'"):
            opt.step({"w": np.full(2, BIG)})
        with pytest.raises(NonFiniteError):
            opt.step({"w": np.full(2, 1e300)})
        assert worker.version == 0

    alone(work)
