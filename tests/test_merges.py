"""Merges: the closed forms of each, the plain references, and the same bits however a model is cut."""

from collections import defaultdict

import numpy as np
import plain_merges as plain
import pytest
from clusters import model_spec
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import addresses, numbers

import headwater as hw
from examples import examples
from headwater import messages as m
from headwater.errors import ConfigurationError, RegistrationError
from headwater.kernels import middle, multiply_up
from headwater.log.measures import Measures
from headwater.log.norms import total
from headwater.log.rda import coefficients
from headwater.shard.gradient_sums import pair_products
from headwater.shard.merges import CommitMerges, Merge
from headwater.shard.staging import Staging, Update
from headwater.shard.vector import Vector
from headwater.spec.layout import LINE, PAGE, Layout, ranges
from headwater.spec.merges import MergeKind, parse_merge
from headwater.spec.rules import SGD, Accumulate
from headwater.testing import Violation, explore

MERGES = ["mean", "sum", "rda", "median", "trimmed:1"]


# ── what a user writes ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [*MERGES, "trimmed:12"])
def test_a_merge_and_its_text_are_inverses(text):
    assert str(parse_merge(text)) == text


@pytest.mark.parametrize(
    "text", ["", "Mean", "trimmed", "trimmed:", "trimmed:0", "trimmed:-1", "trimmed:1.5", "rda:1", 3]
)
def test_what_is_no_merge_is_refused_with_the_valid_forms(text):
    with pytest.raises(ConfigurationError, match="'trimmed:F' with F ≥ 1"):
        parse_merge(text)


def test_a_trimmed_mean_leaves_out_no_more_than_leaves_one():
    trimmed, median = MergeKind("trimmed", 2), MergeKind("median")
    assert [trimmed.left_out(n) for n in (1, 2, 3, 4, 5, 6)] == [0, 0, 1, 1, 2, 2]
    assert [median.left_out(n) for n in (1, 2, 3, 4, 5, 6)] == [0, 0, 1, 1, 2, 2]
    assert trimmed.needs == 5


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────


@examples(80)
@given(
    st.integers(0, 700), st.integers(1, 6), st.integers(0, 3), st.sampled_from([0.0, 0.02]), st.data(),
    st.integers(0, 2**32),
)  # fmt: skip
def test_middle_values_are_the_plain_ones(n, workers, zeros, special, data, seed):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, special) for _ in range(workers)]
    left_out = data.draw(st.integers(0, (workers + zeros - 1) // 2))
    merged = np.full(n, 7, np.float32)
    middle(addresses(gradients), zeros, left_out, merged)
    expected = plain.middle(gradients, zeros, left_out)
    assert np.array_equal(merged, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("workers", "zeros", "left_out"), [(0, 0, 0), (2, 0, 1), (1, 1, 1), (1, 0, -1), (1, -1, 0)]
)
def test_a_mean_of_no_middle_value_is_refused(workers, zeros, left_out):
    gradients = [np.ones(4, np.float32)] * workers
    with pytest.raises(ValueError, match="a value that is left"):
        middle(addresses(gradients), zeros, left_out, np.zeros(4, np.float32))


@examples(40)
@given(st.integers(0, 150), st.integers(0, 70), st.integers(0, 2**32))
def test_products_are_exact_and_added_up_in_lanes(lines, skipped, seed):
    generator = np.random.default_rng(seed)
    n, first = LINE * lines, LINE * skipped
    one, other = (generator.standard_normal(n, dtype=np.float32) for _ in range(2))
    lanes = np.zeros((-(-(first + n) // PAGE) + 1, LINE))
    expected = np.zeros_like(lanes)
    multiply_up(one.ctypes.data, other.ctypes.data, first, n, lanes)
    for i in range(n):
        expected[(first + i) // PAGE, i % LINE] += np.float64(one[i]) * np.float64(other[i])
    assert np.array_equal(lanes, expected)


# ── rda ─────────────────────────────────────────────────────────────────────────────────────────

AXES = [np.array([1, 0], np.float32), np.array([0, 1], np.float32)]
CLOSED = {
    "orthogonal vectors keep their length": (AXES, None, [0.70710677, 0.70710677]),
    "weights turn the direction": ([2 * AXES[0], 2 * AXES[1]], [3, 1], [1.8973666, 0.6324555]),
    "equal vectors are themselves": ([np.array([3, -4], np.float32)] * 2, None, [3, -4]),
    "equal vectors of any weight too": ([np.array([3, -4], np.float32)] * 2, [1, 3], [3, -4]),
    "a zero vector counts in the length only": ([4 * AXES[0], 0 * AXES[0]], None, [2, 0]),
    "opposite vectors cancel": ([5 * AXES[0], -5 * AXES[0]], None, [0, 0]),
    "opposite directions cancel whatever their pair_products": (
        [np.array([1, 2, 3], np.float32), np.array([-1.5, -3, -4.5], np.float32)],
        None,
        [0, 0, 0],
    ),
    "one vector is itself": ([np.array([0.1, 0.7], np.float32)], [9], [0.1, 0.7]),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_forms_of_rda(case):
    gradients, weights, expected = CLOSED[case]
    assert plain.rda(gradients, weights) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    weights = weights or [1] * len(gradients)

    def train(worker):
        model = worker.model("net", {"w": np.zeros(len(expected), np.float32)}, hw.SGD(lr=1.0), merge="rda")
        model.push({"w": gradients[worker.rank]})
        result = worker.step(weight=weights[worker.rank])
        return -model.pull(copy=True)["w"], result.norms["net"]

    for values, norm in run(train, workers=len(gradients), servers=2).values:
        assert values.tolist() == np.array(expected, np.float32).tolist()
        assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)


three = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


@given(st.lists(three, min_size=1, max_size=5), st.data())
def test_the_scales_make_what_the_definition_says(vectors, data):
    gradients = [np.array(one, np.float32) for one in vectors]
    weights = [data.draw(st.floats(0.1, 10)) for _ in gradients]
    products = {
        (i, j): float(np.dot(gradients[i].astype(np.float64), gradients[j].astype(np.float64)))
        for i in range(len(gradients)) for j in range(i, len(gradients))
    }  # fmt: skip
    scales, length = coefficients(products, dict(enumerate(weights)))
    merged = sum((np.float64(scale) * gradients[i] for i, scale in scales.items()), np.zeros(3))
    units = [
        weight * one / np.linalg.norm(one)
        for one, weight in zip(gradients, weights, strict=True)
        if np.linalg.norm(one)
    ]
    size = np.linalg.norm(sum(units, np.zeros(3)))
    if size > 1e-3 * sum(weights):  # where directions all but cancel, rounding decides
        assert merged == pytest.approx(plain.rda(gradients, weights), rel=1e-6, abs=1e-6)
        assert length == pytest.approx(np.linalg.norm(merged), rel=1e-6)


@examples(40)
@given(
    st.lists(st.integers(0, 2500), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 6),
    st.integers(0, 2**32),
)  # fmt: skip
def test_products_of_a_tensor_have_the_same_bits_however_the_model_is_cut(sizes, workers, servers, seed):
    generator = np.random.default_rng(seed)
    tensors = tuple(m.TensorSpec(f"t{i}", (size,), "float32") for i, size in enumerate(sizes))
    spec = m.ModelSpec("net", tensors, (SGD(lr=1.0).to_spec(),), None, "rda")
    layout = Layout(tensors)
    gradients = np.zeros((workers, layout.elements), np.float32)
    for row in gradients:
        for view in layout.views(row).values():
            view[...] = generator.standard_normal(view.shape, dtype=np.float32)
    carried = generator.random((workers, len(sizes))) < 0.7

    def products(cuts):
        nodes, rows = defaultdict(list), 0
        for start, stop in cuts:
            vector = Vector(spec, start, stop, np.zeros(stop - start, np.float32), 0)
            parts = [np.ascontiguousarray(row[start:stop]) for row in gradients]
            updates = [
                Update(Staging(p, p), c, i) for i, (p, c) in enumerate(zip(parts, carried, strict=True))
            ]
            for tensor, one, other, node in pair_products(vector, updates, range(workers)):
                nodes[tensor, one, other].append(node)
                rows += 1
        return {what: total(one) for what, one in nodes.items()}, rows

    alone, _ = products([(0, layout.elements)])
    cut, rows = products(ranges(layout.elements, servers))
    assert cut == alone
    for (tensor, one, other), value in alone.items():
        views = [layout.views(gradients[i])[f"t{tensor}"].astype(np.float64) for i in (one, other)]
        both = carried[one, tensor] and carried[other, tensor]
        assert value == pytest.approx(np.dot(*views) if both else 0.0, rel=1e-12, abs=1e-9)
    assert servers > 1 or rows == len(alone), "a tensor that lies on one server takes one number a pair"


# ── in a cluster ────────────────────────────────────────────────────────────────────────────────


def run(train, **options):
    return hw.run(train, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


SHAPES = {"a": (70,), "b": (3, 700), "c": (2000,)}


def gradient(rank, step):
    random = np.random.default_rng([rank, step])
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def training(merge, weighted, rule=None, clip_norm=None):
    def train(worker):
        zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        model = worker.model("net", zeros, rule or hw.SGD(lr=1.0), merge=merge, clip_norm=clip_norm)
        for step in range(3):
            model.push(gradient(worker.rank, step))
            result = worker.step(weight=1 + (worker.rank + step) % 3 if weighted else 1.0)
        return model.pull(copy=True), result.norms

    return train


def merged(merge, step, weighted, workers):
    weights = [1 + (rank + step) % 3 if weighted else 1 for rank in range(workers)]
    gradients = [gradient(rank, step) for rank in range(workers)]
    one = {
        "mean": plain.weighted_mean if weighted else lambda g, w: sum(g[1:], g[0]) / np.float32(len(g)),
        "sum": plain.weighted_sum,
        "rda": plain.rda,
        "median": lambda g, w: plain.median(g),
        "trimmed:1": lambda g, w: plain.trimmed(g, 1),
    }[merge]
    return {name: one([each[name] for each in gradients], weights) for name in SHAPES}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_is_its_definition_and_has_the_same_bits_on_any_number_of_servers(merge, weighted):
    results = [
        run(training(merge, weighted), workers=3, servers=servers, sync=sync)
        for servers, sync in ((1, "sync"), (2, "sync"), (5, "sync:reduce=sum"))
    ]
    values = {one.values[0][0][name].tobytes() for one in results for name in ("b",)}
    assert len(values) == 1
    expected = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for step in range(3):
        for name, one in merged(merge, step, weighted, 3).items():
            expected[name] = expected[name] - one.astype(np.float32)
    for name, one in results[0].values[0][0].items():
        exact = merge in ("median", "trimmed:1") or (merge != "rda" and not weighted)
        assert (
            np.array_equal(one, expected[name])
            if exact
            else one == pytest.approx(expected[name], rel=1e-5, abs=1e-5)
        )


@pytest.mark.parametrize("merge", ["rda", "median", "mean"])
def test_what_is_merged_is_clipped_by_its_own_norm(merge):
    clipped = [run(training(merge, True, clip_norm=1.0), workers=3, servers=s).values[0] for s in (1, 3)]
    assert clipped[0][1] == clipped[1][1]
    last = np.concatenate([one.ravel() for one in merged(merge, 2, True, 3).values()])
    assert clipped[0][1]["net"] == pytest.approx(np.linalg.norm(last.astype(np.float64)), rel=1e-6)
    assert all(np.array_equal(one, clipped[1][0][name]) for name, one in clipped[0][0].items())
    expected = sum(
        one["a"] / np.linalg.norm(np.concatenate([part.ravel() for part in one.values()]).astype(np.float64))
        for one in (merged(merge, step, True, 3) for step in range(3))
    )
    assert clipped[0][0]["a"] == pytest.approx(-expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("merge", "expected"), [("median", 1.0), ("trimmed:1", 1.0), ("rda", 2.25), ("mean", 2.25)]
)
def test_who_contributes_without_a_tensor_counts_as_zero_there(merge, expected):
    """Of four contributors two carry `x`, with 2 and 7; a fifth worker's turn is empty."""

    def work(worker):
        model = worker.model(
            "net", {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)}, hw.SGD(lr=1.0), merge=merge
        )
        if worker.rank < 4:
            model.push({"y": [1.0]} | ({"x": [[2.0], [7.0]][worker.rank]} if worker.rank < 2 else {}))
        assert worker.step().contributors == 4
        return model.pull(copy=True)["x"].tolist()

    result = run(work, workers=5, servers=2).values[0]
    assert result == [-expected]


@pytest.mark.parametrize("sync", ["async", "ssp:1"])
@pytest.mark.parametrize("merge", MERGES)
def test_of_one_contributor_every_merge_is_its_gradient(merge, sync):
    def work(worker):
        model = worker.model("net", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=1.0), merge=merge)
        model.push({"w": [1.0, 2.0, 4.0]})
        worker.step()
        worker.barrier()
        return model.pull(copy=True)["w"].tolist()

    assert run(work, workers=3, sync=sync).values == [[-3.0, -6.0, -12.0]] * 3


def test_impossible_merges_are_refused_and_nothing_is_declared():
    def work(worker):
        params = {"w": np.zeros(3, np.float32)}
        for merge, error, text in (
            ("trimmed:2", ConfigurationError, "takes 5 contributors, but the cluster has 2 workers"),
            ("max", ConfigurationError, "expected 'mean'"),
        ):
            with pytest.raises(error, match=text):
                worker.model("net", params, hw.SGD(lr=1.0), merge=merge)
        with pytest.raises(RegistrationError, match="Accumulate adds up"):
            worker.model("net", params, Accumulate(), merge="median")
        model = worker.model("net", params, hw.SGD(lr=1.0), merge="rda")
        with pytest.raises(RegistrationError, match="merge='rda', got merge=None"):
            worker.model("net", params, hw.SGD(lr=1.0))
        return model.local.spec.merge

    assert run(work, workers=2).values == ["rda"] * 2


def test_after_a_resume_a_model_may_be_merged_otherwise_and_says_so():
    spec = model_spec(rule=SGD(lr=1.0))
    vector = Vector(spec, 0, PAGE, np.zeros(PAGE, np.float32), 0)
    vector.governed.resumed = True
    other = m.ModelSpec(spec.name, spec.tensors, spec.rules, 2.0, "rda")
    assert "merge was None in the checkpoint and is rda from now on" in vector.declared(other)
    assert (vector.by_lengths, vector.clip_norm) == (True, 2.0)


def test_a_rule_that_always_adds_up_is_not_merged_otherwise():
    merge = CommitMerges([m.Step(1, 1, 0, (m.Carried(0, b"\1"),), (), True)] * 2, (3.0, 5.0), "mean").rows
    assert merge != Merge(2.0)
    gradients = [np.full(PAGE, one, np.float32) for one in (2, 4)]
    vector = Vector(model_spec(shapes={"x": (PAGE,)}), 0, PAGE, np.zeros(PAGE, np.float32), 0)
    vector.apply([Update(Staging(g, g), np.array([True]), i) for i, g in enumerate(gradients)], merge, [], 1)
    assert set(vector.values) == {6.0}


# ── planted faults ──────────────────────────────────────────────────────────────────────────────


def test_products_of_all_but_one_server_are_found(monkeypatch):
    def short(self, exchanges):
        measure = self._of[exchanges[0].member]
        if len(measure.parts) == self._servers > 1:
            measure.parts[self._servers - 1] = ()
        return result(self, exchanges)

    result = Measures.result
    monkeypatch.setattr(Measures, "result", short)
    with pytest.raises(Violation) as caught:
        explore("sync", 200)
    assert caught.value.invariant in {"ValuesOfTheirVersion", "KeyError"}
