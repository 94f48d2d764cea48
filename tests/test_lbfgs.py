"""L-BFGS as decisions: driven here by NumPy vectors; compared with torch's and with a plain two-loop form."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from headwater.errors import ConfigurationError
from headwater.machines import lbfgs
from headwater.machines.lbfgs import LBFGS, Combine, Dots, Evaluate, LBFGSState, Sizes, steps, vectors


class Driven:
    """Vectors in memory, and a function with its gradient."""

    def __init__(self, function, start, settings):
        self.function, self.settings, self.state = function, settings, LBFGSState()
        self.vectors = dict.fromkeys(vectors(settings.history_size))
        self.vectors["parameters"] = np.array(start, dtype=np.float64)
        self.evaluations = []

    def step(self):
        running, result = steps(self.settings, self.state), None
        while True:
            try:
                command = running.send(result)
            except StopIteration as end:
                return end.value
            result = self.do(command)

    def do(self, command):
        if isinstance(command, Evaluate):
            at = self.vectors["parameters"]
            self.evaluations.append(at.copy())
            loss, self.vectors[command.out] = self.function(at)
            return float(loss)
        if isinstance(command, Dots):
            return [float(self.vectors[a] @ self.vectors[b]) for a, b in command.pairs]
        if isinstance(command, Sizes):
            sizes = np.abs(self.vectors[command.name])
            return float(sizes.max()), float(sizes.sum())
        assert isinstance(command, Combine)
        assert command.out in self.vectors
        self.vectors[command.out] = sum(c * self.vectors[name] for name, c in command.terms.items())
        return None


def rosenbrock(x):
    a, b = x[:-1], x[1:]
    loss = np.sum(100 * (b - a * a) ** 2 + (1 - a) ** 2)
    gradient = np.zeros_like(x)
    gradient[:-1] += -400 * a * (b - a * a) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a * a)
    return loss, gradient


def quadratic(n, seed=0):
    chance = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(chance.standard_normal((n, n)))
    matrix = basis @ np.diag(np.linspace(1, 50, n)) @ basis.T
    wanted = chance.standard_normal(n)
    return lambda x: (0.5 * (x - wanted) @ matrix @ (x - wanted), matrix @ (x - wanted))


def of_torch(function, start, settings, calls):
    """The points at which torch's LBFGS evaluates, in float64."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    names = (
        "lr",
        "max_iter",
        "max_eval",
        "tolerance_grad",
        "tolerance_change",
        "history_size",
        "line_search_fn",
    )
    optimizer = torch.optim.LBFGS([x], **{name: getattr(settings, name) for name in names})
    seen = []

    def closure():
        seen.append(x.detach().numpy().copy())
        loss, gradient = function(seen[-1])
        x.grad = torch.from_numpy(np.array(gradient))
        return torch.tensor(loss)

    for _ in range(calls):
        optimizer.step(closure)
    return seen, x.detach().numpy()


@pytest.mark.parametrize("search", ["strong_wolfe", None])
@pytest.mark.parametrize(
    ("function", "start"),
    [
        (rosenbrock, [-1.2, 1.0]),
        (rosenbrock, [-1.2, 1.0, 0.5, 2.0, -0.3]),
        (quadratic(20), [0.0] * 20),
        (lambda x: (np.sum(np.log(np.cosh(x))), np.tanh(x)), [3.0, -5.0, 0.1]),
    ],
)
def test_the_points_evaluated_are_those_of_torch(function, start, search):
    lr = 1.0 if search else 0.02
    settings = LBFGS(lr=lr, max_iter=7, history_size=4, line_search_fn=search)
    ours = Driven(function, start, settings)
    for _ in range(3):
        ours.step()
    theirs, end = of_torch(function, start, settings, 3)
    assert len(ours.evaluations) == len(theirs)
    for mine, other in zip(ours.evaluations, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-6, abs=1e-8)
    assert ours.vectors["parameters"] == pytest.approx(end, rel=1e-6, abs=1e-8)


def test_rosenbrock_is_solved():
    driven = Driven(rosenbrock, [-1.2, 1.0], LBFGS(max_iter=100))
    report = driven.step()
    assert report.loss < 1e-10
    assert report.first_loss == pytest.approx(24.2)
    assert driven.vectors["parameters"] == pytest.approx([1, 1], abs=1e-5)
    assert report.evaluations == len(driven.evaluations)
    assert "tolerance_" in report.reason


class Rounded(Driven):
    """As on the servers: every vector is stored as float32."""

    def do(self, command):
        result = super().do(command)
        if isinstance(command, Combine | Evaluate):
            self.vectors[command.out] = self.vectors[command.out].astype(np.float32).astype(np.float64)
        return result


@pytest.mark.parametrize(
    ("kind", "curvature", "iterations", "left"),
    [
        (Driven, 1e-3, 20, 1e-14),  # n: the line search is exact
        (Rounded, 1e-3, 22, 1e-6),  # as far as float32 parameters go
        (Driven, 0.9, 40, 1e-10),  # torch's line search is not, so there is no such number
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_with_exact_line_searches_a_quadratic_takes_as_many_iterations_as_it_has_dimensions(
    kind, curvature, iterations, left, seed
):
    n = 20
    settings = LBFGS(
        max_iter=iterations,
        max_eval=1000,
        tolerance_grad=0.0,
        tolerance_change=1e-30,
        history_size=n,
        curvature=curvature,
    )
    driven = kind(quadratic(n, seed), [0.0] * n, settings)
    first = np.linalg.norm(driven.function(np.zeros(n))[1])
    report = driven.step()
    assert report.iterations <= iterations
    assert report.gradient_norm <= left * first
    loose = curvature == 0.9 and Driven(quadratic(n, seed), [0.0] * n, replace(settings, max_iter=n + 2))
    assert not loose or loose.step().gradient_norm > 1e-8 * first


def test_the_two_loops_are_those_of_the_textbook():
    chance = np.random.default_rng(3)
    n, k = 30, 6
    s = chance.standard_normal((k, n))
    y = s + 0.2 * chance.standard_normal((k, n))
    g = chance.standard_normal(n)
    everything = {"gradient": g} | {f"s{i}": s[i] for i in range(k)} | {f"y{i}": y[i] for i in range(k)}
    state = LBFGSState(slots=[2, 3, 4, 5, 0, 1])
    for a in everything:
        for b in everything:
            state.note(a, b, float(everything[a] @ everything[b]))
    state.scale = state.product("s1", "y1") / state.product("y1", "y1")
    ours = sum(value * everything[name] for name, value in lbfgs.two_loops(state).items())
    q, alphas = -g, {}
    for i in reversed(state.slots):
        alphas[i] = (s[i] @ q) / (s[i] @ y[i])
        q -= alphas[i] * y[i]
    q *= state.scale
    for i in state.slots:
        q += (alphas[i] - (y[i] @ q) / (s[i] @ y[i])) * s[i]
    assert ours == pytest.approx(q, rel=1e-9, abs=1e-12)


def test_a_loss_that_is_not_a_number_is_stepped_back_from():
    def hole(x):
        return (math.nan, np.full_like(x, math.nan)) if x[0] > 2 else ((x[0] - 1.9) ** 2, 2 * (x - 1.9))

    driven = Driven(hole, [-50.0], LBFGS(lr=100.0, max_iter=30, max_eval=500))
    report = driven.step()
    assert math.isfinite(report.loss)
    assert driven.vectors["parameters"] == pytest.approx([1.9], abs=1e-3)
    report = Driven(hole, [5.0], LBFGS()).step()
    assert (report.iterations, report.reason) == (0, "the loss is nan at the first point")


def test_a_step_without_a_search_into_a_hole_leaves_the_parameters_before_it():
    def hole(x):
        return (math.inf, x * math.nan) if abs(x[0]) > 1 else (x[0] ** 2, 2 * x)

    driven = Driven(hole, [0.5], LBFGS(lr=9.0, line_search_fn=None))
    report = driven.step()
    assert "the loss is inf: the parameters are those before the last step" in report.reason
    assert driven.vectors["parameters"].tolist() == [0.5]


def test_where_nothing_is_to_gain_it_says_so():
    report = Driven(lambda x: (1.0, np.zeros(2)), [1.0, 2.0], LBFGS()).step()
    assert (report.iterations, report.evaluations) == (0, 1)
    assert "at most tolerance_grad" in report.reason
    report = Driven(lambda x: (np.abs(x).sum(), np.sign(x)), [1.0], LBFGS(max_iter=3)).step()
    assert report.evaluations >= 1


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_iter": 0}, "max_iter must be an integer ≥ 1"),
        ({"history_size": True}, "history_size must be an integer ≥ 1"),
        ({"max_eval": 0}, "max_eval must be an integer ≥ 1"),
        ({"lr": -1}, "lr must be a finite number ≥ 0"),
        ({"tolerance_grad": math.nan}, "tolerance_grad must be a finite number ≥ 0"),
        ({"line_search_fn": "armijo"}, "'strong_wolfe' or None"),
        ({"curvature": 1.0}, "between 0.0001 and 1"),
    ],
)
def test_impossible_settings_are_refused(settings, what):
    with pytest.raises(ConfigurationError, match=what):
        LBFGS(**settings)
