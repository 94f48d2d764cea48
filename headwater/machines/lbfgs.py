"""L-BFGS as decisions without vectors: what to evaluate and combine next, from numbers alone.

Theory of operation. `steps` is a generator. It yields commands and is sent their results; whoever drives it
owns the vectors, which may lie on servers and never move. Every worker runs the same generator on the same
numbers, so all of them yield the same commands and stop at the same one.

    evaluate ──▶ converged? ──▶ direction ──▶ line search ──▶ remember s, y ──▶ direction ──▶ …
                                              │    ▲
                                              ▼    │
                                            evaluate

- *Direction*: the two loops of L-BFGS on the Gram matrix of the remembered changes and the gradient (Chen,
  Wang and Zhou 2014, "Large-scale L-BFGS using MapReduce"): only coefficients are computed here, and one
  combination of vectors is commanded.
- *Line search*: strong Wolfe conditions by bracketing and zoom with cubic steps (Nocedal and Wright 2006,
  algorithms 3.5 and 3.6), with the constants, bounds and stopping rules of `torch.optim.LBFGS`. At most
  `_POINTS` gradients are kept at a time: of the bracket's ends, of the point before and of the new one.
- *Curvature guard*: a change with s·y ≤ 1e-10 is not remembered, so directions stay descents.

Names of vectors: `parameters`, `start` (parameters before the last move), `direction` (of it),
`gradient` (at the parameters), `before` (the gradient before the last move), `trial0` … (gradients of the
line search), `s0` …, `y0` … (the remembered changes, as a ring).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from headwater.errors import ConfigurationError
from headwater.spec.amounts import real, shown, whole

PARAMETERS, START, DIRECTION, GRADIENT, BEFORE = "parameters", "start", "direction", "gradient", "before"
_POINTS = 4
_LEAST_CURVATURE = 1e-10
_MOST_TRIALS = 25
_SUFFICIENT = 1e-4
"""c1 of the Wolfe conditions."""


# ── commands ────────────────────────────────────────────────────────────────────────────────────


class Evaluate(NamedTuple):
    """Compute loss and gradient at `parameters`; the gradient goes to `out`. Sent back: the loss, float."""

    out: str


class Dots(NamedTuple):
    """Inner products, sums over all elements. Sent back: a float for each pair."""

    pairs: tuple[tuple[str, str], ...]


class Sizes(NamedTuple):
    """Sent back: (largest magnitude, sum of magnitudes) of a vector."""

    name: str


class Combine(NamedTuple):
    """out = Σ coefficient · vector. `out` may be among the vectors. Nothing is sent back."""

    out: str
    terms: Mapping[str, float]


Command: TypeAlias = Evaluate | Dots | Sizes | Combine
Steps: TypeAlias = Generator[Command, "float | Sequence[float] | None", "Report"]


# ── what a user says, and hears ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class LBFGS:
    """How L-BFGS runs, as `torch.optim.LBFGS` has it.

    Attributes:
        lr: the first step length tried, and each later one without a line search.
        max_iter: most iterations.
        max_eval: most evaluations of the loss, looked at after each iteration; None: 5/4 of `max_iter`.
        tolerance_grad: it stops where no element of the gradient is larger.
        tolerance_change: it stops where no parameter moves further, or the loss changes less.
        history_size: changes that are remembered, of parameters and of the gradient.
        line_search_fn: "strong_wolfe", or None for steps of length `lr`.
        curvature: c2 of the strong Wolfe conditions, between 1e-4 and 1: a line search ends where the slope
            is at most this share of the first one. torch has 0.9. A smaller one searches more exactly, with
            more evaluations: with 1e-3 a quadratic of n dimensions takes n iterations where `history_size` ≥
            n.

    Raises:
        ConfigurationError: an impossible value.
    """

    lr: float = 1.0
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 10
    line_search_fn: Literal["strong_wolfe"] | None = "strong_wolfe"
    curvature: float = 0.9

    def __post_init__(self) -> None:
        for name in ("max_iter", "history_size", "max_eval"):
            value = getattr(self, name)
            if name == "max_eval" and value is None:
                continue
            object.__setattr__(self, name, whole(f"LBFGS: {name}", value))
        for name in ("lr", "tolerance_grad", "tolerance_change"):
            object.__setattr__(self, name, real(f"LBFGS: {name}", getattr(self, name), zero=True))
        if self.line_search_fn is not None and (
            not isinstance(self.line_search_fn, str) or self.line_search_fn != "strong_wolfe"
        ):
            raise ConfigurationError(
                f"LBFGS: line_search_fn must be 'strong_wolfe' or None, got {shown(self.line_search_fn)}"
            )
        c2 = self.curvature
        if isinstance(c2, bool) or not isinstance(c2, int | float) or not _SUFFICIENT < c2 < 1:
            raise ConfigurationError(
                f"LBFGS: curvature must be a number between {_SUFFICIENT:g} and 1, got {c2!r}"
            )

    @property
    def most_evaluations(self) -> int:
        """`max_eval`, by default 5/4 of `max_iter`."""
        return self.max_eval if self.max_eval is not None else self.max_iter * 5 // 4


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of `step` did.

    Attributes:
        first_loss: at the parameters that it began with.
        loss: at those that it ended with.
        gradient_norm: 2-norm of the gradient there.
        iterations, evaluations: of this call.
        step_length: of the last line search; 0 where there was none.
        reason: why it stopped, in words for a user.
        line_search: which condition the last line search failed, "" for none.
    """

    first_loss: float
    loss: float
    gradient_norm: float
    iterations: int
    evaluations: int
    step_length: float
    reason: str
    line_search: str = ""


@dataclass(slots=True)
class LBFGSState:
    """What outlives a call: numbers beside the vectors of the same names on the servers.

    Attributes:
        iterations: over all calls.
        slots: the ring of remembered changes, oldest first: k means `sk` and `yk`.
        gram: inner products of remembered vectors, by ordered pair of names.
        scale: H₀ of the two loops.
        moved: step length of the last move while its change is not remembered yet; 0 for none.
    """

    iterations: int = 0
    slots: list[int] = field(default_factory=list)
    gram: dict[tuple[str, str], float] = field(default_factory=dict)
    scale: float = 1.0
    moved: float = 0.0

    def product(self, a: str, b: str) -> float:
        """a·b of two remembered vectors, or of one and the gradient."""
        return self.gram[(a, b) if a <= b else (b, a)]

    def note(self, a: str, b: str, value: float) -> None:
        """Remember a·b."""
        self.gram[(a, b) if a <= b else (b, a)] = value

    def forget(self, *names: str) -> None:
        """Drop all products of vectors that are overwritten."""
        self.gram = {pair: value for pair, value in self.gram.items() if not set(pair) & set(names)}


def vectors(history_size: int) -> list[str]:
    """The names of all vectors beside `parameters` that `steps` needs."""
    trials = [f"trial{k}" for k in range(_POINTS)]
    remembered = [f"{kind}{k}" for kind in ("s", "y") for k in range(history_size)]
    return [START, DIRECTION, GRADIENT, BEFORE, *trials, *remembered]


# ── one call of step ────────────────────────────────────────────────────────────────────────────


class _Point(NamedTuple):
    """An evaluated point of a line search; `slope` is along the direction, `vector` has its gradient."""

    t: float
    loss: float
    slope: float
    vector: str


class _Found(NamedTuple):
    """`failed`: which condition the point does not satisfy, "" for none."""

    point: _Point
    failed: str


def steps(settings: LBFGS, state: LBFGSState) -> Steps:
    """Minimise from the present parameters; at most `max_iter` iterations.

    A loss that is not finite ends it at the last point that was.
    """
    first = loss = yield from _loss(Evaluate(GRADIENT))
    evaluations, iterations, length, failed = 1, 0, 0.0, ""
    most, total = yield from _sizes(GRADIENT)
    reason = _converged(most, loss, settings)
    while not reason:
        state.iterations += 1
        iterations += 1
        if state.moved:
            yield from _remember(settings, state)
        slope = yield from _direction(state)
        if slope > -settings.tolerance_change:
            reason = f"the slope along the direction is {slope:.3g}: no descent beyond tolerance_change"
            break
        t = min(1.0, 1.0 / total) * settings.lr if state.iterations == 1 else settings.lr
        yield Combine(START, {PARAMETERS: 1.0})
        yield Combine(BEFORE, {GRADIENT: 1.0})
        reach, _ = yield from _sizes(DIRECTION)
        if settings.line_search_fn is not None:
            search = _LineSearch(_Point(0.0, loss, slope, BEFORE), reach, settings)
            point, failed = yield from search.run(t)
            evaluations += search.evaluations
            yield from _move(point.t)
            if point.vector != BEFORE:
                yield Combine(GRADIENT, {point.vector: 1.0})
        else:
            point = _Point(t, loss, 0.0, GRADIENT)
            yield from _move(t)
            if iterations < settings.max_iter:
                point = point._replace(loss=(yield from _loss(Evaluate(GRADIENT))))
                evaluations += 1
        if not math.isfinite(point.loss):
            yield from _move(0.0)
            yield Combine(GRADIENT, {BEFORE: 1.0})
            reason = f"the loss is {point.loss}: the parameters are those before the last step"
            break
        length = state.moved = point.t
        gained, loss = point.loss - loss, point.loss
        most, total = yield from _sizes(GRADIENT)
        reason = _stop(settings, iterations, evaluations, most, length * reach, gained)
    (squares,) = yield from _dots((GRADIENT, GRADIENT))
    norm = math.sqrt(squares)
    return Report(first, loss, norm, iterations, evaluations, length, reason, failed)


def _converged(most: float, loss: float, settings: LBFGS) -> str:
    if not math.isfinite(loss):
        return f"the loss is {loss} at the first point"
    if most <= settings.tolerance_grad:
        return f"the largest gradient element is {most:.3g}: at most tolerance_grad"
    return ""


def _stop(
    settings: LBFGS, iterations: int, evaluations: int, most: float, moved: float, gained: float
) -> str:
    if iterations >= settings.max_iter:
        return "max_iter is reached"
    if evaluations >= settings.most_evaluations:
        return "max_eval is reached"
    if most <= settings.tolerance_grad:
        return f"the largest gradient element is {most:.3g}: at most tolerance_grad"
    if moved <= settings.tolerance_change:
        return f"no parameter moved by more than {moved:.3g}: at most tolerance_change"
    if abs(gained) < settings.tolerance_change:
        return f"the loss changed by {gained:.3g}: less than tolerance_change"
    return ""


def _loss(command: Evaluate) -> Generator[Command, float | Sequence[float] | None, float]:
    value = yield command
    assert isinstance(value, float)
    return value


def _dots(*pairs: tuple[str, str]) -> Generator[Command, float | Sequence[float] | None, Sequence[float]]:
    values = yield Dots(pairs)
    assert isinstance(values, Sequence)
    return values


def _sizes(name: str) -> Generator[Command, float | Sequence[float] | None, tuple[float, float]]:
    values = yield Sizes(name)
    assert isinstance(values, Sequence)
    return values[0], values[1]


def _move(t: float) -> Generator[Command, float | Sequence[float] | None, None]:
    yield Combine(PARAMETERS, {START: 1.0, DIRECTION: t})


# ── the direction ───────────────────────────────────────────────────────────────────────────────


def _direction(state: LBFGSState) -> Generator[Command, float | Sequence[float] | None, float]:
    """Command the direction; returns its slope, direction · gradient."""
    names = [f"{kind}{k}" for kind in ("s", "y") for k in state.slots]
    products = yield from _dots(*[(GRADIENT, name) for name in (*names, GRADIENT)])
    state.forget(GRADIENT)
    for name, value in zip((*names, GRADIENT), products, strict=True):
        state.note(GRADIENT, name, value)
    terms = two_loops(state)
    yield Combine(DIRECTION, terms)
    return sum(value * state.product(GRADIENT, name) for name, value in terms.items())


def two_loops(state: LBFGSState) -> dict[str, float]:
    """Coefficients of −H · gradient in the remembered changes and the gradient (Chen et al. 2014)."""
    terms = {GRADIENT: -1.0}
    alphas: dict[int, float] = {}

    def along(name: str) -> float:
        return sum(value * state.product(name, other) for other, value in terms.items())

    for k in reversed(state.slots):
        alphas[k] = along(f"s{k}") / state.product(f"s{k}", f"y{k}")
        terms[f"y{k}"] = terms.get(f"y{k}", 0.0) - alphas[k]
    terms = {name: value * state.scale for name, value in terms.items()}
    for k in state.slots:
        beta = along(f"y{k}") / state.product(f"s{k}", f"y{k}")
        terms[f"s{k}"] = terms.get(f"s{k}", 0.0) + alphas[k] - beta
    return terms


def _remember(settings: LBFGS, state: LBFGSState) -> Generator[Command, float | Sequence[float] | None, None]:
    """Keep how parameters and gradient changed with the last move, in place of the oldest change."""
    length, state.moved = state.moved, 0.0
    slope, slope_before = yield from _dots((DIRECTION, GRADIENT), (DIRECTION, BEFORE))
    if length * (slope - slope_before) <= _LEAST_CURVATURE:
        return
    full = len(state.slots) == settings.history_size
    k = state.slots[0] if full else len(state.slots)
    s, y = f"s{k}", f"y{k}"
    yield Combine(s, {DIRECTION: length})
    yield Combine(y, {GRADIENT: 1.0, BEFORE: -1.0})
    state.forget(s, y)
    state.slots = [*(state.slots[1:] if full else state.slots), k]
    names = [f"{kind}{j}" for kind in ("s", "y") for j in state.slots]
    pairs = [(s, name) for name in names] + [(y, name) for name in names if name != s]
    for (a, b), value in zip(pairs, (yield from _dots(*pairs)), strict=True):
        state.note(a, b, value)
    state.scale = state.product(s, y) / state.product(y, y)


# ── the line search ─────────────────────────────────────────────────────────────────────────────


class _LineSearch:
    """Looks for a point that satisfies the strong Wolfe conditions from `origin` along the direction.

    `reach`: the direction's largest magnitude. `evaluations`: made so far.
    """

    def __init__(self, origin: _Point, reach: float, settings: LBFGS) -> None:
        self._origin = origin
        self._reach = reach
        self._settings = settings
        self._rounds = 0
        self.evaluations = 0

    def run(self, t: float) -> Generator[Command, float | Sequence[float] | None, _Found]:
        """Go on from step length `t` until a minimum is bracketed, then close in on it."""
        before, new = self._origin, (yield from self._evaluate(t, (self._origin,)))
        while self._rounds < _MOST_TRIALS:
            if self._insufficient(new) or (self._rounds > 1 and new.loss >= before.loss):
                return (yield from self._zoom(before, new))
            if self._flat(new):
                return self._found(new)
            if new.slope >= 0:
                return (yield from self._zoom(before, new))
            t = _cubic(before, new, new.t + 0.01 * (new.t - before.t), new.t * 10)
            before, new = new, (yield from self._evaluate(t, (self._origin, before, new)))
            self._rounds += 1
        return (yield from self._zoom(self._origin, new))

    def _zoom(self, one: _Point, other: _Point) -> Generator[Command, float | Sequence[float] | None, _Found]:
        """Close in on a minimum between two points; the lower one is the best so far."""
        low, high = (other, one) if other.loss < one.loss else (one, other)
        stuck = False
        while self._rounds < _MOST_TRIALS:
            if abs(high.t - low.t) * self._reach < self._settings.tolerance_change:
                break
            first, last = sorted((low.t, high.t))
            t = _cubic(low, high, first, last)
            margin = 0.1 * (last - first)
            if min(last - t, t - first) < margin:
                if stuck or t >= last or t <= first:
                    t = last - margin if abs(t - last) < abs(t - first) else first + margin
                    stuck = False
                else:
                    stuck = True
            else:
                stuck = False
            new = yield from self._evaluate(t, (self._origin, low, high))
            self._rounds += 1
            if self._insufficient(new) or not new.loss < low.loss:
                low, high = (new, low) if new.loss < low.loss else (low, new)
                continue
            if self._flat(new):
                return self._found(new)
            if new.slope * (high.t - low.t) >= 0:
                high = low
            low = new
        return self._found(low)

    def _evaluate(
        self, t: float, alive: Sequence[_Point]
    ) -> Generator[Command, float | Sequence[float] | None, _Point]:
        """Evaluate at step length `t`; the gradients of the points that are alive stay."""
        kept = {point.vector for point in alive}
        vector = next(name for name in (f"trial{k}" for k in range(_POINTS)) if name not in kept)
        yield from _move(t)
        loss = yield from _loss(Evaluate(vector))
        (slope,) = yield from _dots((vector, DIRECTION))
        self.evaluations += 1
        return _Point(t, loss, slope, vector)

    def _insufficient(self, point: _Point) -> bool:
        """The first Wolfe condition fails; so it does for a loss that is not a number."""
        return not point.loss <= self._origin.loss + _SUFFICIENT * point.t * self._origin.slope

    def _flat(self, point: _Point) -> bool:
        """The second, strong Wolfe condition holds."""
        return abs(point.slope) <= -self._settings.curvature * self._origin.slope

    def _found(self, point: _Point) -> _Found:
        failed = ""
        if self._insufficient(point):
            failed = "the loss does not decrease enough (first Wolfe condition)"
        elif not self._flat(point):
            failed = "the slope does not flatten enough (second Wolfe condition)"
        return _Found(point, failed)


def _cubic(one: _Point, other: _Point, least: float, most: float) -> float:
    """Where a cubic through two points with their slopes is least, within bounds; else halfway between them.

    Nocedal and Wright 2006, equation 3.59.
    """
    a, b = (one, other) if one.t <= other.t else (other, one)
    if not all(map(math.isfinite, (a.loss, b.loss, a.slope, b.slope))):
        return (least + most) / 2
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if square < 0:
        return (least + most) / 2
    d2 = math.sqrt(square)
    divisor = b.slope - a.slope + 2 * d2
    if divisor == 0:
        return (least + most) / 2
    return min(max(b.t - (b.t - a.t) * ((b.slope + d2 - d1) / divisor), least), most)
