"""Vectors beside a model's parameters: NumPy's numbers, and the same bits for any number of servers."""

import numpy as np
import pytest

import headwater as hw
from headwater import messages as m
from headwater.errors import StalledError, UsageError

SHAPES = {"a": (70,), "b": (40, 100), "c": ()}


def initial():
    random = np.random.default_rng(5)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def flat(values):
    return np.concatenate([values[name].reshape(-1) for name in SHAPES])


def ran(train, **settings):
    return hw.run(train, **{"engine": "inline", "deadline": 30, **settings})


def program(worker):
    """Some of everything; what came of it, as numbers."""
    model = worker.model("m", initial(), hw.SGD(lr=1.0))
    vectors = model.vectors
    vectors.create("x", "y", value=0.5)
    vectors.combine("x", {"parameters": 2.0, "y": -1.0})
    vectors.copy("x", "y")
    vectors.fill("x", 3.0)
    dots = vectors.dots([("x", "x"), ("x", "y"), ("y", "parameters")])
    sizes = vectors.sizes("y")
    vectors.combine_all([("y", {"y": 0.1, "x": 1.0}), ("parameters", {"y": -2.0, "parameters": 0.3})])
    vectors.free("x")
    return dots, sizes, {name: value.copy() for name, value in model.pull().items()}


def test_they_do_what_numpy_does():
    p = flat(initial()).astype(np.float64)
    y = (2 * p - 0.5).astype(np.float32).astype(np.float64)
    x = np.full_like(p, 3.0)
    dots, sizes, values = ran(program, workers=2, servers=2).values[0]
    assert dots == pytest.approx([x @ x, x @ y, y @ p], rel=1e-12)
    assert dots[0] == 9 * p.size  # what lies between the tensors does not count
    assert sizes == pytest.approx((np.abs(y).max(), np.abs(y).sum()), rel=1e-12)
    after = (0.1 * y + 3).astype(np.float32).astype(np.float64)
    assert np.array_equal(flat(values), (-2 * after + 0.3 * p).astype(np.float32))


def test_the_bits_do_not_depend_on_servers_workers_or_the_mode():
    first, *others = [
        ran(program, workers=workers, servers=servers, sync=sync).values
        for workers, servers, sync in [(1, 1, "sync"), (3, 2, "async"), (2, 3, "ssp:1"), (1, 5, "sync")]
    ]
    dots, sizes, values = first[0]
    for found in others:
        for other_dots, other_sizes, other_values in found:
            assert (other_dots, other_sizes) == (dots, sizes)
            assert flat(other_values).tobytes() == flat(values).tobytes()


def test_every_call_is_done_once_however_many_workers_make_it():
    def train(worker):
        model = worker.model("m", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        before = worker.version
        model.vectors.combine("parameters", {"parameters": 2.0})
        return worker.version - before, model.pull()["w"].tolist()

    assert ran(train, workers=3).values == [(1, [2.0] * 3)] * 3


def test_measuring_makes_no_version():
    def train(worker):
        model = worker.model("m", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        before = worker.version
        return model.vectors.dots([("parameters", "parameters")]), worker.version - before

    assert ran(train, workers=2, servers=2).values == [([3.0], 0)] * 2


def test_what_is_not_a_number_stays_visible():
    def train(worker):
        model = worker.model("m", {"w": np.array([1.0, np.nan, 2.0], np.float32)}, hw.SGD(lr=1.0))
        return *model.vectors.sizes("parameters"), *model.vectors.dots([("parameters", "parameters")])

    assert np.isnan(ran(train, servers=2).values[0]).all()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda v: v.create("there"), "vector 'there' exists: free it, or fill it"),
        (lambda v: v.create("parameters"), "vector 'parameters' exists"),
        (lambda v: v.free("parameters"), "are the model's values and stay"),
        (lambda v: v.free("nowhere"), "vector 'nowhere' is unknown; the vectors here are parameters, there"),
        (lambda v: v.fill("nowhere", 1), "'nowhere' is unknown"),
        (lambda v: v.combine("there", {"there": 1, "theirs": 2}), "'theirs' is a vector of model 'other'"),
        (lambda v: v.combine("nowhere", {"there": 1}), "'nowhere' is unknown"),
        (lambda v: v.dots([("there", "nowhere")]), "'nowhere' is unknown"),
        (lambda v: v.combine_all([("there", {}), ("there", {"gone": 1})]), "'gone' is unknown"),
        (lambda v: v.fill("there", np.inf), "expected a finite number"),
        (lambda v: v.combine("there", {"there": "much"}), "coefficient of 'there' is 'much'"),
        (lambda v: v.combine("there", [1]), r"expected \{name: coefficient\}"),
        (lambda v: v.create(3), "the name of a vector must be a text"),
    ],
)
def test_what_cannot_be_done_is_refused_whole(call, what):
    def train(worker):
        model = worker.model("m", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        other = worker.model("other", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        other.vectors.create("theirs")
        model.vectors.create("there", value=2.0)
        with pytest.raises(UsageError, match=what):
            call(model.vectors)
        return model.vectors.dots([("there", "there")])  # and the program goes on

    assert ran(train, workers=2, servers=2).values == [[12.0]] * 2


def test_workers_that_do_different_things_are_named():
    def train(worker):
        model = worker.model("m", {"w": np.ones(3, np.float32)}, hw.SGD(lr=1.0))
        model.vectors.create("x")
        with pytest.raises(StalledError) as error:
            model.vectors.combine("x", {"parameters": 1.0 + worker.rank})
        return str(error.value)

    for told in ran(train, workers=2).values:
        assert "worker 0 waits in operate of model 'm', combine x" in told
        assert "worker 1 waits in operate of model 'm', combine x" in told


def gathers(worker):
    """The gradients of all workers into a vector: summed, then averaged by weights."""
    model = worker.model("m", initial(), hw.SGD(lr=1.0))
    model.vectors.create("g")
    for name, view in model.gradients.items():
        view[...] = np.random.default_rng([worker.rank, len(name)]).standard_normal(view.shape)
    run, scale = model.vectors.run, 1.0 + worker.rank
    found = []
    for mean in (False, True):
        answer = run(
            [m.GatherGradients("g", mean)], [m.Reduction("dot", "g", "g")], values={"n": 2.0}, weight=scale
        )
        again = model.vectors.dots([("g", "g")])
        assert list(answer.totals) == again  # measured before it is there, and after
        found += [dict(answer.sums), again]
        if not mean:
            model.vectors.copy("g", "parameters")
            found.append({name: value.copy() for name, value in model.pull().items()})
            for name, view in model.gradients.items():
                view[...] = np.random.default_rng([worker.rank, len(name)]).standard_normal(view.shape)
    return found


def test_gradients_are_gathered_from_windows_as_over_connections():
    shared = ran(gathers, workers=3, servers=2).values
    travelled = ran(gathers, workers=3, servers=2, transport="tcp").values
    (sums, dots, values, _, means) = shared[0]
    grads = [
        {
            n: np.random.default_rng([rank, len(n)]).standard_normal(s).astype(np.float32)
            for n, s in SHAPES.items()
        }
        for rank in range(3)
    ]
    total = sum(flat(one).astype(np.float64) for one in grads)
    assert np.array_equal(flat(values), total.astype(np.float32))
    mean = sum((1.0 + rank) / 6.0 * flat(one).astype(np.float64) for rank, one in enumerate(grads))
    mean = mean.astype(np.float32).astype(np.float64)
    assert (sums, means) == ({"n": 6.0}, pytest.approx([mean @ mean], rel=1e-12))
    for one in (*shared, *travelled):
        assert one[1] == dots
        assert one[4] == means
        assert flat(one[2]).tobytes() == flat(values).tobytes()


def test_they_are_in_checkpoints(tmp_path):
    def train(worker):
        model = worker.model("m", initial(), hw.SGD(lr=1.0))
        for _ in worker.epochs(worker.settings["epochs"]):
            if not worker.restarted:
                model.vectors.create("x")
                model.vectors.combine("x", {"parameters": 3.0})
                model.vectors.run([m.KeepNote(b"how far")])
            model.push({"b": np.ones(SHAPES["b"])})
            worker.step()
            answer = model.vectors.run((), [m.Reduction("dot", "x", "x")], recall=True)
        return answer.totals, answer.data

    options = {"workers": 2, "checkpoint": tmp_path}
    before = ran(train, servers=2, settings={"epochs": 1}, **options)
    after = ran(train, servers=3, settings={"epochs": 2}, resume=True, **options)
    x = (3 * flat(initial()).astype(np.float64)).astype(np.float32).astype(np.float64)
    assert before.values == after.values == [((pytest.approx(x @ x, rel=1e-12),), (b"how far",))] * 2
