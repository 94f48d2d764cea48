"""Training JAX programs: what a tree becomes on the servers, what a step sends, whose the results are."""

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import headwater as hw
from headwater.errors import (
    ClosedError,
    ConfigurationError,
    GradientError,
    NonFiniteError,
    RegistrationError,
    UsageError,
)

jax = pytest.importorskip("jax", reason="needs JAX: the extra `jax`")
jnp = jax.numpy

PAGE = Path(__file__).parent.parent / "docs" / "jax.md"
STEPS = 6


def train(function, **options):
    return hw.run(function, **{"engine": "inline", "patience": 5, "deadline": 60, "workers": 1, **options})


def optimizer(worker, params, rule=None, **options):
    return hw.jax.DistributedOptimizer(worker, params, rule or hw.SGD(lr=1.0), **options)


def network(seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(5, 7), (7, 3)]
    return {
        "layers": [
            {"w": jnp.array(rng.standard_normal(size, dtype=np.float32)), "b": jnp.zeros(size[1])}
            for size in sizes
        ]
    }


def test_the_gradient_of_all_leaves_together_is_clipped():
    def work(worker):
        params = {"a": jnp.zeros(3), "b": [jnp.zeros((2, 2))]}
        opt = optimizer(worker, params, clip_norm=0.5 * (5 + 1e-6))
        opt.step({"a": jnp.array([3.0, 0, 0]), "b": [jnp.array([[0, 0], [0, 4.0]])]})
        assert opt.result.norms == {"model": 5.0}
        return opt.params["a"].tolist(), opt.params["b"][0].tolist()

    assert train(work).values == [([-1.5, 0, 0], [[0, 0], [0, -2.0]])]


def loss_of(params, x, y):
    hidden = jnp.tanh(x @ params["layers"][0]["w"] + params["layers"][0]["b"])
    logits = hidden @ params["layers"][1]["w"] + params["layers"][1]["b"]
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=1))


def batch(step, rank):
    rng = np.random.default_rng(100 * step + rank)
    x = rng.standard_normal((8, 5), dtype=np.float32)
    return x, np.eye(3, dtype=np.float32)[rng.integers(3, size=8)]


gradient_of = jax.jit(jax.grad(loss_of))


def sgd_reference(value, grad, state, step):
    """v = 0.9 v + g;  value −= 0.1 v"""
    state["v"] = 0.9 * state.get("v", 0.0) + grad
    return value - 0.1 * state["v"]


def adam_reference(value, grad, state, step):
    """Kingma and Ba 2015 with lr 0.01"""
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * grad
    state["s"] = 0.999 * state.get("s", 0.0) + 0.001 * grad**2
    mean, square = state["m"] / (1 - 0.9**step), state["s"] / (1 - 0.999**step)
    return value - 0.01 * mean / (np.sqrt(square) + 1e-8)


def reference(update, workers):
    """Leaves in float64 after `STEPS` updates with the mean of the workers' gradients."""
    leaves, structure = jax.tree.flatten(network())
    leaves = [np.asarray(leaf, dtype=np.float64) for leaf in leaves]
    states = [{} for _ in leaves]
    for step in range(STEPS):
        params = jax.tree.unflatten(structure, [leaf.astype(np.float32) for leaf in leaves])
        grads = [jax.tree.leaves(gradient_of(params, *batch(step, rank))) for rank in range(workers)]
        means = [np.mean(np.array(one, dtype=np.float64), axis=0) for one in zip(*grads, strict=True)]
        leaves = [
            update(leaf, mean, state, step + 1)
            for leaf, mean, state in zip(leaves, means, states, strict=True)
        ]
    return leaves


# ── training ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rule", "update"),
    [(hw.SGD(lr=0.1, momentum=0.9), sgd_reference), (hw.Adam(lr=0.01), adam_reference)],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_synchronous_training_is_that_of_one_process_on_the_mean_gradient(rule, update, workers):
    def work(worker):
        opt = optimizer(worker, network(seed=worker.rank), rule)  # rank 0's values count
        params = opt.params
        for step in range(STEPS):
            params = opt.step(gradient_of(params, *batch(step, worker.rank)))
            assert opt.result == hw.StepResult(step + 1, True, workers, 0)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    expected = reference(update, workers)
    for values in train(work, workers=workers, servers=2).values:
        for got, wanted in zip(values, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sync", ["async", "ssp:1"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_every_mode_and_transport_counts_every_gradient_of_every_worker(sync, transport):
    def work(worker):
        opt = optimizer(worker, {"sum": jnp.zeros(3)}, hw.Accumulate())
        for k in range(1, 11):
            opt.step({"sum": jnp.full(3, float(k))})
        worker.barrier()
        return opt.pull()["sum"].tolist()

    result = train(work, workers=2, servers=2, sync=sync, transport=transport)
    assert result.values == [[110.0] * 3] * 2


def test_all_start_with_the_values_of_the_lowest_rank():
    def work(worker):
        return optimizer(worker, [jnp.full(2, 3.0 + worker.rank)]).params[0].tolist()

    assert train(work, workers=3).values == [[3.0, 3.0]] * 3


# ── the tree ────────────────────────────────────────────────────────────────────────────────────


class Layer(NamedTuple):
    w: object
    b: object


@jax.tree_util.register_pytree_node_class
class Plain:
    """A node whose children have positions alone."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_steps_are_averaged_by_their_weights_and_a_weight_of_0_drops_them():
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(2)}, hw.SGD(lr=1.0))
        with pytest.raises(hw.errors.ConfigurationError, match=r"weight.* must be"):
            opt.step({"w": jnp.ones(2)}, weight=-1)
        return opt.step(
            {"w": jnp.array([4.0, jnp.nan if worker.rank == 2 else 1.0])}, weight=[3, 1, 0][worker.rank]
        )

    for params in train(work, workers=3, servers=2).values:
        assert params["w"].tolist() == [-4.0, -1.0]


def forest():
    return {
        "layers": (Layer(jnp.ones((2, 3)), None), Layer(jnp.ones((3, 1), jnp.bfloat16), jnp.ones(1))),
        "scale": np.float32(1),
        "half": jnp.ones(5, jnp.float16),
        "nothing": {},
        "plain": Plain(jnp.ones((0, 4))),
        7: np.ones(2, dtype=np.float32),
    }


def test_a_step_returns_the_same_structure_shapes_and_dtypes():
    def work(worker):
        params = {str(key): value for key, value in forest().items()}
        opt = optimizer(worker, params)
        assert list(opt.model.parameters) == [
            *["7", "half", "layers.0.w", "layers.1.w", "layers.1.b", "plain.0", "scale"],
        ]
        after = opt.step(jax.tree.map(jnp.ones_like, params))
        assert jax.tree.structure(after) == jax.tree.structure(params)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
            assert isinstance(new, jax.Array)
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
            assert not new.astype(jnp.float32).any()

    train(work)


def test_a_tree_may_be_one_array():
    def work(worker):
        opt = optimizer(worker, jnp.ones(2), name="line")
        assert opt.step(jnp.ones(2)).tolist() == [0, 0]

    assert list(train(work).parameters["line"]) == ["params"]


def test_groups_and_settings_reach_the_servers_by_name():
    def work(worker):
        params = {"w": jnp.zeros(1), "b": jnp.zeros(1)}
        opt = optimizer(worker, params, groups=[hw.Group(["b"], hw.SGD(lr=10.0))])
        grads = jax.tree.map(jnp.ones_like, params)

        def after_step():
            after = opt.step(grads)
            return after["w"].item(), after["b"].item()

        assert after_step() == (-1, -10)
        opt.set(lr=jnp.float32(2.0), group=0)
        assert after_step() == (-3, -20)
        opt.set(lr=0)
        assert after_step() == (-3, -20)
        with pytest.raises(ConfigurationError, match="speed"):
            opt.set(speed=1)
        with pytest.raises(ConfigurationError, match="lr"):
            opt.set(lr=jnp.ones(2))

    train(work)


# ── which gradients a step sends ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("absent", "touched"),
    [
        ({"a": {"x": 1.0, "y": None}, "b": 1.0}, "x b"),
        ({"a": {"x": 1.0}}, "x"),
        ({"a": None, "b": 1.0}, "b"),
        ({"b": 1.0, "none": None}, "b"),
        ({"a": {}}, ""),
        (None, ""),
    ],
)
def test_what_has_no_gradient_is_not_touched(absent, touched):
    def work(worker):
        params = {"a": {"x": jnp.ones(1), "y": jnp.ones(1)}, "b": jnp.ones(1), "none": None}
        opt = optimizer(worker, params, hw.AdamW(lr=0.5, weight_decay=1.0))  # decays what it touches
        after = opt.step(jax.tree.map(lambda value: jnp.full(1, 0 * value), absent))
        assert opt.result.contributors == bool(touched)
        leaves = {"x": after["a"]["x"], "y": after["a"]["y"], "b": after["b"]}
        assert {name for name, leaf in leaves.items() if leaf.item() != 1} == set(touched.split())

    train(work)


def test_a_tensor_that_some_workers_carry_is_divided_by_all_contributors():
    def work(worker):
        opt = optimizer(worker, {"both": jnp.zeros(1), "first": jnp.zeros(1)})
        grads = {"both": jnp.full(1, 4.0), "first": jnp.full(1, 4.0) if worker.rank == 0 else None}
        after = opt.step(grads)
        return after["both"].item(), after["first"].item()

    assert train(work, workers=2).values == [(-4, -2)] * 2


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, jnp.bfloat16])
def test_gradients_of_other_real_dtypes_are_converted(dtype):
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(3)})
        return opt.step({"w": np.arange(3).astype(dtype)})["w"].tolist()

    assert train(work).values == [[0, -1, -2]]


def test_a_gradient_that_is_not_finite_is_not_sent():
    def work(worker):
        opt = optimizer(worker, {"good": jnp.zeros(2), "bad": jnp.zeros(2)})
        bad = {"good": jnp.ones(2), "bad": jnp.array([1.0, jnp.nan])}
        with pytest.raises(NonFiniteError, match="'bad'"):
            opt.step(bad)
        assert opt.result is None
        assert opt.step({"good": jnp.ones(2)})["good"].tolist() == [-1, -1]
        skipping = optimizer(worker, {"w": jnp.zeros(2)}, name="skips", nonfinite="skip")
        assert skipping.step({"w": jnp.array([1.0, jnp.inf])})["w"].tolist() == [0, 0]
        assert skipping.result == hw.StepResult(2, True, 0, 0)
        assert worker.statistics().skipped == 1

    train(work)


def test_two_models_of_one_worker_are_trained_each_by_its_own_step():
    def work(worker):
        one, two = (optimizer(worker, {"w": jnp.zeros(1)}, name=name) for name in ("one", "two"))
        grads = {"w": jnp.ones(1)}
        one.step(grads)
        assert (one.params["w"].item(), two.pull()["w"].item()) == (-1, 0)
        two.step(grads)
        assert (one.pull()["w"].item(), two.params["w"].item()) == (-1, -1)

    train(work)


# ── whose memory ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("committed", [True, False])
def test_parameters_that_were_kept_stay_what_they_were(compiled, committed):
    def work(worker):
        with jax.disable_jit(not compiled):
            params = {"large": jnp.zeros((300, 1000)), "small": jnp.zeros(3)}
            if committed:
                params = jax.device_put(params, jax.devices()[0])
            opt = optimizer(worker, params, hw.Accumulate())
            kept = [opt.params]
            for _ in range(4):
                grads = jax.tree.map(jnp.ones_like, params)
                kept += [opt.step(grads), opt.pull()]
        for i, tree in enumerate(kept):
            assert all((leaf == (i + 1) // 2).all() for leaf in jax.tree.leaves(tree))
            assert all(leaf.committed == committed for leaf in jax.tree.leaves(tree))

    train(work)


def test_parameters_outlive_the_worker():
    def work(worker):
        return optimizer(worker, {"w": jnp.zeros(5000)}).step({"w": jnp.ones(5000)})

    assert (train(work).values[0]["w"] == -1).all()


def test_a_gradient_is_read_before_step_returns():
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(3)})
        grads = {"w": np.ones(3, dtype=np.float32)}
        opt.step(grads)
        grads["w"][...] = 100
        assert opt.step({"w": np.zeros(3, dtype=np.float32)})["w"].tolist() == [-1, -1, -1]

    train(work)


def test_a_loop_that_donates_parameters_and_gradients_trains_on():
    def work(worker):
        gradient = jax.jit(lambda params: jax.tree.map(lambda p: 0 * p + 1, params), donate_argnums=0)
        opt = optimizer(worker, {"w": jnp.zeros(4000)})
        params = opt.params
        for step in range(3):
            address = params["w"].unsafe_buffer_pointer()
            grads = gradient(params)
            assert params["w"].is_deleted()
            assert grads["w"].unsafe_buffer_pointer() == address  # no more memory than without Headwater
            params = opt.step(grads)
            assert (params["w"] == -1 - step).all()
        gradient(params)
        assert opt.params["w"].is_deleted()
        assert (opt.pull()["w"] == -3).all()

    train(work)


def test_a_loop_compiles_its_function_once():
    def work(worker):
        traces = []

        @jax.jit
        def gradient(params):
            traces.append(1)
            return jax.tree.map(jnp.ones_like, params)

        opt = optimizer(worker, {"weak": jnp.asarray(1.0), "host": np.ones(2, dtype=np.float32)})
        params = opt.params
        for _ in range(3):
            params = opt.step(gradient(params))
        gradient(opt.pull())
        assert len(traces) == 1

    train(work)


def test_a_guard_against_unasked_transfers_does_not_stop_a_step():
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(2)})
        grads = {"w": jnp.ones(2)}
        with jax.transfer_guard("disallow"):
            after = opt.step(grads)
        assert after["w"].tolist() == [-1, -1]

    train(work)


def test_nothing_keeps_an_optimizer_alive():
    def work(worker):
        return weakref.ref(optimizer(worker, {"w": jnp.zeros(3)}))

    found = train(work).values[0]
    gc.collect()
    assert found() is None


def test_sharded_parameters_come_back_with_their_sharding():
    program = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import headwater as hw

def work(worker):
    split = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    params = jax.device_put({"w": np.zeros((64, 32), np.float32), "b": np.zeros(4, np.float32)}, split)
    opt = hw.jax.DistributedOptimizer(worker, params, hw.SGD(lr=1.0))
    kept = [opt.params]
    for _ in range(3):
        kept.append(opt.step(jax.tree.map(lambda leaf: leaf + 1, params)))
    for i, tree in enumerate(kept):
        assert all(leaf.sharding == split and (leaf == -i).all() for leaf in tree.values()), (i, tree)
    return len(jax.devices())

print(hw.run(work, workers=1, engine="inline").values)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("[2]\n", 0), done.stderr


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "model 'model' has no tensors"),
        (None, "model 'model' has no tensors"),
        ({"a": {"b": 1.5}}, r"leaf 'a.b' of params is a float, expected an array: .* jnp.float32\(1.5\)"),
        ([np.zeros(1, np.float32), "relu"], "leaf '1' of params is a str"),
        ({"f": jnp.tanh}, "leaf 'f' of params is a"),
        ({"s": jax.ShapeDtypeStruct((2,), jnp.float32)}, "leaf 's' of params is a ShapeDtypeStruct"),
        ({"w": np.zeros(2)}, "leaf 'w' of params is float64, .* float32: convert it first"),
        ({"n": jnp.arange(3)}, "leaf 'n' of params has dtype int32, expected one of float32"),
        ({"m": jnp.ones(3, bool)}, "leaf 'm' of params has dtype bool"),
        ({"z": jnp.ones(3, jnp.complex64)}, "leaf 'z' of params has dtype complex64"),
        ({"key": jax.random.key(0)}, "leaf 'key' of params has dtype key<fry>"),
        (
            {"a.b": np.zeros(1, np.float32), "a": {"b": np.zeros(1, np.float32)}},
            r"leaves at \['a'\]\['b'\] and \['a.b'\] would have the same name 'a.b': rename one",
        ),
        ({1: np.zeros(1, np.float32), "a": np.zeros(1, np.float32)}, "cannot flatten this tree"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_by_name(params, message):
    def work(worker):
        with pytest.raises(RegistrationError, match=message):
            optimizer(worker, params)
        optimizer(worker, {"w": jnp.zeros(1)})  # nothing was registered, nothing is broken

    train(work)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([np.zeros(2)], r"a ndarray at \[0\], where model 'model' has no parameter"),
        ({"wieght": np.zeros(2)}, r"a ndarray at \['wieght'\], where model"),
        ({"w": {"deeper": np.zeros(2)}}, r"at \['w'\]\['deeper'\]"),
        ({"w": {"deeper": None}}, r"None at \['w'\]\['deeper'\]"),
        ({"wieght": None}, r"None at \['wieght'\]"),
        (np.zeros(2), r"a ndarray at the top, .* the parameters', which are \['b'\], \['w'\]"),
        ({"w": np.zeros(3)}, r"tensor 'w' of model 'model' has shape \(2,\), got \(3,\)"),
        ({"w": "steep"}, "tensor 'w' must be of a real dtype"),
        ({"w": jnp.zeros(2, bool)}, "tensor 'w' must be of a real dtype such as float32, got bool"),
        ({"w": np.zeros(2, jax.dtypes.float0)}, "tensor 'w' must be of a real dtype"),
        ({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, "tensor 'w' must be of a real dtype"),
        ({1: None, "w": None}, "cannot flatten this tree"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_name_and_nothing_is_sent(grads, message):
    def work(worker):
        opt = optimizer(worker, {"b": jnp.zeros(2), "w": jnp.zeros(2)})
        with pytest.raises(GradientError, match=message):
            opt.step(grads)
        assert opt.result is None
        assert opt.step({"w": jnp.ones(2)})["b"].tolist() == [0, 0]
        assert opt.params["w"].tolist() == [-1, -1]

    train(work)


def test_a_gradient_that_was_donated_is_refused_by_name():
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(2)})
        grads = {"w": jnp.ones(2)}
        grads["w"].delete()
        with pytest.raises(GradientError, match=r"tensor 'w': cannot read .* deleted"):
            opt.step(grads)

    train(work)


def test_an_optimizer_in_a_traced_function_is_refused():
    def work(worker):
        opt = optimizer(worker, {"w": jnp.zeros(2)})
        with pytest.raises(UsageError, match=r"leaf at \['w'\] is being traced: call the optimizer"):
            jax.jit(opt.step)({"w": jnp.ones(2)})
        with pytest.raises(UsageError, match="is being traced"):
            jax.jit(lambda params: optimizer(worker, params).params)({"w": jnp.ones(2)})

    train(work)


def test_other_trees_under_one_name_are_refused():
    def work(worker):
        optimizer(worker, {"w": jnp.zeros(2)})
        with pytest.raises(RegistrationError, match="model 'model' "):
            optimizer(worker, {"w": jnp.zeros(3)})

    train(work)


def test_a_step_after_leaving_is_refused():
    with hw.Cluster(workers=1) as cluster:
        with cluster.worker() as worker:
            opt = optimizer(worker, {"w": jnp.zeros(2)})
        with pytest.raises(ClosedError):
            opt.step({"w": jnp.zeros(2)})
        assert opt.params["w"].tolist() == [0, 0]


# ── tables, and the page ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tables_take_ids_and_gradients_as_jax_arrays(dtype):
    def work(worker):
        table = worker.table("items", 2, hw.SGD(lr=1.0))
        ids = jnp.array([[7, 7], [9, 7]])
        kept = jnp.asarray(table.pull(ids))
        table.push(ids, jnp.ones((2, 2, 2), dtype))
        worker.step()
        assert not kept.any()
        return table.pull(ids)[..., 0].tolist()

    assert train(work).values == [[[-3, -3], [-1, -3]]]


def test_the_loops_of_the_page_train(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)  # the page is part of the repository
        for loss in train(names["train"], workers=2).values:
            assert loss < 0.01


def test_lbfgs_minimises_the_sum_of_all_workers_losses_over_a_tree():
    x = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    y = x @ np.array([3.0, -2.0, 0.5], np.float32) + 1

    def program(worker):
        mine = slice(60 * worker.rank // worker.workers, 60 * (worker.rank + 1) // worker.workers)

        @jax.value_and_grad
        def loss_and_grad(params):
            return jnp.sum((x[mine] @ params["layer"]["w"] + params["b"] - y[mine]) ** 2)

        params = {"layer": {"w": jnp.zeros(3)}, "b": jnp.zeros(())}
        opt = hw.jax.LBFGS(worker, params, max_iter=30)
        found = opt.step(loss_and_grad)
        assert opt.params is found
        with pytest.raises(ConfigurationError, match="weight=0"):
            opt.step(loss_and_grad, weight=0)
        with pytest.raises(GradientError, match="no parameter"):
            opt.step(lambda params: (0.0, {"other": params["b"]}))
        return found["layer"]["w"].tolist(), float(found["b"]), opt.report

    values = hw.run(program, workers=2, servers=2, engine="inline", deadline=60).values
    assert values[0] == values[1]
    w, b, report = values[0]
    assert w == pytest.approx([3, -2, 0.5], abs=1e-3)
    assert b == pytest.approx(1, abs=1e-3)
    assert report.loss < 1e-6 * report.first_loss
