"""Lamb: its definition, per-tensor norms over any number of servers, and where it cannot be."""

import numpy as np
import pytest

import headwater as hw
from headwater.errors import RegistrationError
from headwater.log.measures import trust
from headwater.testing import explore

SHAPES = {"a": (83, 71), "b": (513,), "c": (2, 3), "s": ()}


def run(work, **options):
    return hw.run(work, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


def plain(values, gradients, lr, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
    """Algorithm 2 of You et al. 2020, in float64, a tensor after the other; `gradients`: by step."""
    values = {name: value.astype(np.float64) for name, value in values.items()}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    counts = dict.fromkeys(values, 0)
    for step in gradients:
        for name, gradient in step.items():
            counts[name] += 1
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            m = first[name] / (1 - betas[0] ** counts[name])
            v = second[name] / (1 - betas[1] ** counts[name])
            direction = m / (np.sqrt(v) + eps) + decay * values[name]
            lengths = np.linalg.norm(values[name]), np.linalg.norm(direction)
            ratio = lengths[0] / lengths[1] if min(lengths) > 0 else 1.0
            values[name] = values[name] - lr * ratio * direction
    return values


def start():
    numbers = np.random.default_rng(9)
    values = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    values["b"][:] = 0  # whose ratio is 1
    return values


def gradient(rank, step):
    numbers = np.random.default_rng([rank, step])
    found = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    if step == 2:
        del found["a"]  # that nobody carries is not touched
    return found


def trained(servers=2, replicas=0, workers=2, decay=0.1, **options):
    def work(worker):
        model = worker.model("net", start(), hw.Lamb(0.02, weight_decay=decay), **options)
        for step in range(4):
            model.push(gradient(worker.rank, step))
            worker.step(weight=1 + worker.rank)
        worker.barrier()
        return {name: value.copy() for name, value in model.pull().items()}

    first, *others = run(work, workers=workers, servers=servers, replicas=replicas).values
    for other in others:
        assert all((first[name] == other[name]).all() for name in SHAPES)
    return first


def merged(step):
    both = gradient(0, step), gradient(1, step)
    return {name: (both[0][name].astype(np.float64) + 2 * both[1][name]) / 3 for name in both[0]}


def test_lamb_is_its_definition_over_whole_tensors():
    expected = plain(start(), [merged(step) for step in range(4)], 0.02, decay=0.1)
    for name, value in trained().items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"codec": "q4"}, {"merge": "median"}, {"outer": True}])
def test_lamb_has_the_same_bits_on_any_number_of_servers_with_standbys_too(options):
    one = trained(servers=1, **options)
    for other in (trained(servers=3, **options), trained(servers=2, replicas=1, **options)):
        for name in SHAPES:
            assert one[name].tobytes() == other[name].tobytes()


def test_each_step_is_as_long_as_the_rate_times_the_tensor():
    def work(worker):
        model = worker.model("net", {"a": np.full(64, 3.0, np.float32)}, hw.Lamb(0.25))
        model.push({"a": np.linspace(-1, 1, 64) * 1e-3})
        worker.step()
        return np.linalg.norm(model.pull()["a"].astype(np.float64) - 3.0)

    assert run(work, workers=1).values[0] == pytest.approx(0.25 * 3.0 * 8.0, rel=1e-5)
    assert trust(0.0, 4.0) == trust(4.0, 0.0) == 1.0
    assert trust(4.0, 16.0) == 0.5
    assert trust(float("nan"), 4.0) == 1.0


def test_no_random_schedule_with_lamb_breaks_an_invariant(long, seed_base):
    for mode in ("sync", "async"):
        rule = hw.Lamb(0.1, weight_decay=0.1)
        explore(mode, 300 if long else 6, seed=seed_base, rule=rule, clip_norm=None, merge=None)


def test_what_needs_other_norms_before_and_tables_are_refused():
    def work(worker):
        for options in ({"clip_norm": 1.0}, {"merge": "rda"}):
            with pytest.raises(RegistrationError, match="leave out one of the two"):
                worker.model("net", start(), hw.Lamb(), **options)
        with pytest.raises(RegistrationError, match="rule for models"):
            worker.table("rows", 2, hw.Lamb())

    run(work, workers=1)
