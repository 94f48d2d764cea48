"""Local steps: a worker trains on its own, and what that changed goes out now and then as a gradient.

Theory of operation. A worker has parameters of its own, the *local* ones. Those that the servers last gave it
are their *base*, and lie in the window of a model. After `every` local steps the change, base − local, is the
gradient of an outer step; the rule on the servers applies what the round makes of all changes, and what comes
back is the next base, and takes the local parameters' place.

Tensors are spread over *fragments*, each a model of its own. In each `every` local steps each fragment is due
once, at equal distances. With `overlap` a fragment is sent so many steps before it is due, and received when
it is due; what was learned meanwhile is not in it, and is given up, but for `blend`.

Where a quorum closes rounds each fragment has rounds of its own (`headwater.spec.sync.Synchronous`). A change
that missed its round counts in the fragment's next one (`late=carry`), or is lost (`late=drop`); either way
its worker goes on from the values that it is answered with.

Invariants:
- A change is relative to the base that its local steps began from, and is sent once.
- No fragment is sent before its worker has made `every` local steps since it was sent last; at first, and
  from `flush`, it may be.
- One outer step is under way at a time. Until it is received nothing else touches the models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.spec.rules import Rule
from headwater.worker.model import Model
from headwater.worker.model_spec import NonFinite
from headwater.worker.pending_step import PendingStep
from headwater.worker.plan import count_of
from headwater.worker.step_exchange import OuterStep
from headwater.worker.worker import Worker

Array: TypeAlias = NDArray[np.float32]
Weighing: TypeAlias = Literal["one", "samples", "tokens"]


class Local(Protocol):
    """The local parameters, wherever they are."""

    def read(self, names: Sequence[str]) -> Mapping[str, Any]:
        """The present values of these, arrays that nobody changes."""

    def write(self, values: Mapping[str, Array]) -> None:
        """Take these values over; the arrays are the window's, to be copied."""

    def sending(self) -> None:
        """A step is about to be sent: what else is to go with it is carried now."""


@dataclass(slots=True)
class Work:
    """Local steps, and the samples or tokens that they were computed from."""

    steps: int = 0
    count: float = 0.0

    def add(self, other: Work) -> None:
        """Count other work too."""
        self.steps += other.steps
        self.count += other.count


def weight_of(work: Work, weighing: Weighing) -> float:
    """What a change counts: 1, its samples, or tokens²/steps, which is quantity times quality (Decoupled
    DiLoCo, arXiv 2604.21428: tokens a step stand for how good each step was)."""
    if weighing == "one":
        return 1.0
    if weighing == "samples":
        return float(work.count)
    return float(work.count) ** 2 / max(work.steps, 1)


@dataclass(slots=True, eq=False)
class Fragment:
    """Tensors that are sent together.

    Attributes:
        due: the local step of each `every` at which it is received. sent_at: that at which it is sent.
        work: since it was sent last.
    """

    model: Model
    names: tuple[str, ...]
    due: int
    sent_at: int
    work: Work = field(default_factory=Work)


@dataclass(frozen=True, slots=True)
class OuterPlan:
    """When what is sent, checked.

    Raises:
        ConfigurationError: an impossible setting; says what to do.
    """

    every: int
    fragments: int
    overlap: int
    blend: float
    weighing: Weighing
    tensors: int

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("fragments", 1), ("overlap", 0)):
            count_of("OuterOptimizer", name, getattr(self, name), least)
        if self.fragments > self.tensors:
            raise ConfigurationError(
                f"fragments={self.fragments}, but there are {self.tensors} tensors, and a fragment has whole "
                f"ones: pass fragments={self.tensors} or fewer"
            )
        if self.fragments > self.every:
            raise ConfigurationError(
                f"fragments={self.fragments} in every={self.every} local steps: one is sent at a time, so "
                f"pass fewer fragments or a larger every"
            )
        if self.overlap >= self.every // self.fragments:
            raise ConfigurationError(
                f"overlap={self.overlap}: one fragment is under way at a time, and with every={self.every} "
                f"and fragments={self.fragments} the next is due after {self.every // self.fragments} local "
                f"steps: pass a smaller overlap"
            )
        number = isinstance(self.blend, int | float) and not isinstance(self.blend, bool)
        if not number or not 0 <= self.blend <= 1:
            raise ConfigurationError(
                f"blend must be from 0, the servers' values, to 1, the local ones, got {self.blend!r}"
            )
        if self.weighing not in ("one", "samples", "tokens"):
            raise ConfigurationError(f"weight must be 'one', 'samples' or 'tokens', got {self.weighing!r}")

    def due(self, fragment: int) -> int:
        """At which local step of each `every` a fragment is received."""
        return (fragment + 1) * self.every // self.fragments


def spread(sizes: Mapping[str, int], fragments: int) -> list[tuple[str, ...]]:
    """Names by fragment, of about equal size together: the largest first, each to the smallest so far.

    The same for every worker, whatever the order of `sizes`.
    """
    parts: list[list[str]] = [[] for _ in range(fragments)]
    filled = [0] * fragments
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        # Of equally small ones that with fewer tensors, so that none stays empty.
        least = min(range(fragments), key=lambda i: (filled[i], len(parts[i]), i))
        parts[least].append(name)
        filled[least] += sizes[name]
    return [tuple(part) for part in parts]


class StepTimer:
    """How long a local step takes, without what it sends: a moving average in which the last counts half.

    Attributes:
        step_s: seconds; None before the second step. began: when the present one did; None before the first.
    """

    def __init__(self) -> None:
        self.step_s: float | None = None
        self.began: float | None = None

    def stepped(self, now: float) -> None:
        """A step has ended."""
        if self.began is not None:
            took = now - self.began
            self.step_s = took if self.step_s is None else 0.5 * self.step_s + 0.5 * took


class LocalSteps:
    """Of one worker and the parameters `values`; the adapters for frameworks are made of it.

    Args:
        local: the parameters that the worker trains; they take over the servers' values at once.
        also: other models whose values come with each step.
        rule, merge, codec, values_codec, aliases: of the models, as in `Worker.model`.

    Attributes:
        taken: local steps so far, counted from where the fragments' turns are.
        result: of the last step that was answered; None before.
        fragments: in the order in which they are due.
    """

    def __init__(
        self,
        worker: Worker,
        local: Local,
        values: Mapping[str, Any],
        rule: Rule,
        plan: OuterPlan,
        *,
        name: str,
        merge: str | None,
        codec: str | None,
        values_codec: str | None,
        aliases: Mapping[str, str],
        nonfinite: NonFinite,
        claim: Any,
    ) -> None:
        self._worker = worker
        self._local = local
        self._plan = plan
        self._pending: tuple[PendingStep, Fragment] | None = None
        self._timer = StepTimer()
        self.result: m.StepResult | None = None
        self.also: Sequence[Model] = ()
        self.fragments: list[Fragment] = []
        sizes = {one: int(np.prod(value.shape)) for one, value in values.items()}
        for i, names in enumerate(spread(sizes, plan.fragments)):
            model = worker.model(
                name if plan.fragments == 1 else f"{name}.{i}",
                {one: values[one] for one in names},
                rule,
                merge=merge,
                codec=codec,
                values_codec=values_codec,
                aliases={alias: of for alias, of in aliases.items() if of in names},
                nonfinite=nonfinite,
                outer=True,
            )
            model.local.adapter = claim
            due = plan.due(i)
            self.fragments.append(Fragment(model, names, due, due - plan.overlap))
        self.taken = self._place() if worker.mode.rounds else 0
        self._sync_s = self._measure() if plan.overlap else 0.0
        self.take_over()

    def _place(self) -> int:
        """Where in `every` local steps the others are, who have sent some fragments once more than others."""
        updates = [fragment.model.local.settings.updates for fragment in self.fragments]
        behind = next((i for i, count in enumerate(updates) if count < updates[0]), 0)
        return self._plan.due(behind - 1) if behind else 0

    def _measure(self) -> float:
        """Seconds that a fragment takes up and down, nobody being waited for: twice those of a read."""
        largest = max(self.fragments, key=lambda fragment: fragment.model.layout.elements).model
        began = time.monotonic()
        largest.local.changed_here()
        largest.pull()
        return 2 * (time.monotonic() - began)

    def take_over(self) -> None:
        """Have the local parameters take the bases' values."""
        for fragment in self.fragments:
            self._local.write({name: fragment.model.parameters[name] for name in fragment.names})

    # ── a local step ────────────────────────────────────────────────────────────────────────────

    def step(self, count: float = 0.0) -> None:
        """A local step was made, of so many samples or tokens: receive and send what is due.

        Blocks as the mode says where something is received.

        Raises: as `Worker.step`; NonFiniteError: local parameters are not finite.
        """
        self.taken += 1
        self._timer.stepped(time.monotonic())
        try:
            self._step(count)
        finally:
            self._timer.began = time.monotonic()

    def _step(self, count: float) -> None:
        for fragment in self.fragments:
            fragment.work.add(Work(1, count))
        now = (self.taken - 1) % self._plan.every + 1
        for fragment in self.fragments:
            if fragment.sent_at == now:
                self.finish()
                self._send(fragment)
            if fragment.due == now:
                self.finish()

    def finish(self) -> None:
        """Block for what is under way and take it over."""
        if self._pending is None:
            return
        pending, fragment = self._pending
        self.result = pending.result()
        self._pending = None
        self._receive(fragment)

    def flush(self) -> None:
        """Send all that was not sent yet and take over what comes back, a step for each fragment; blocks as
        the mode says. All workers make the same number of them, whatever they have to send.

        Where a quorum closes rounds they meet first: one round each, not one for whoever comes first.
        """
        self.finish()
        if self._worker.mode.leaves_out:
            self._worker.barrier()
        for fragment in self.fragments:
            self.finish()
            self._send(fragment)
            self.finish()

    def _send(self, fragment: Fragment) -> None:
        """Send what has changed in a fragment since it was received."""
        if fragment.work.steps:
            fragment.model.push(self._change(fragment))
        self._local.sending()
        step_s = self._timer.step_s
        pace = None if step_s is None else m.Pace(step_s, self._plan.overlap, self._sync_s)
        self._worker.outer = OuterStep(fragment.model.local.id, pace)
        weight = weight_of(fragment.work, self._plan.weighing)
        pending = self._worker.begin_step(read=(fragment.model, *self.also), weight=weight)
        self._pending, fragment.work = (pending, fragment), Work()

    def _change(self, fragment: Fragment) -> dict[str, Array]:
        base = fragment.model.parameters
        return {
            name: base[name] - np.asarray(value, dtype=np.float32).reshape(base[name].shape)
            for name, value in self._local.read(fragment.names).items()
        }

    def _receive(self, fragment: Fragment) -> None:
        """Local ← blend · local + (1 − blend) · base."""
        base = {name: fragment.model.parameters[name] for name in fragment.names}
        blend = np.float32(self._plan.blend)
        if blend:
            local = self._local.read(fragment.names)
            base = {
                name: blend * np.asarray(local[name], dtype=np.float32).reshape(value.shape)
                + (np.float32(1) - blend) * value
                for name, value in base.items()
            }
        self._local.write(base)

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    def pull(self) -> None:
        """Have the local parameters be the servers' present ones; what was not sent is given up."""
        self.finish()
        for fragment in self.fragments:
            fragment.model.local.changed_here()
            fragment.model.pull()
            fragment.work = Work()
        self.take_over()

    def push(self) -> None:
        """Have the servers' parameters be the local ones, a version each fragment."""
        self.finish()
        for fragment in self.fragments:
            fragment.model.assign(dict(self._local.read(fragment.names)))
            fragment.work = Work()
            fragment.model.pull()
        self.take_over()

    @property
    def under_way(self) -> bool:
        """Whether a step is."""
        return self._pending is not None


class FragmentClaim:
    """Who uses the models of these fragments: whoever came last."""

    def __init__(self) -> None:
        self.models: Sequence[Model] = ()

    def before_read(self) -> None:
        """Nothing: local parameters are not the window's."""

    def after_read(self) -> None:
        """Nothing: values are taken over when the step is received."""

    @property
    def lost(self) -> str:
        """The model that another has taken over; "" while there is none."""
        return next((model.name for model in self.models if model.local.adapter is not self), "")
