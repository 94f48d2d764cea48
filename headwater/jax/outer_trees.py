"""Training far apart in JAX: local steps on a pytree, whose change is a step on the servers now and then.

What is sent when is the business of `headwater.worker.local_steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax import tree_util

from headwater.errors import ConfigurationError, GradientError, RegistrationError, UsageError
from headwater.jax.trained_trees import check_parameter, flatten, names_of, place_of, shown
from headwater.messages import StepResult
from headwater.spec.rules import Rule
from headwater.worker import Worker
from headwater.worker.local_steps import Array, FragmentClaim, LocalSteps, OuterPlan, Weighing
from headwater.worker.model_spec import NonFinite, check_nonfinite, check_weight

Tree = TypeVar("Tree")


class OuterOptimizer(Generic[Tree]):
    """The outer of two optimizers: `headwater.torch.OuterOptimizer` for a pytree of parameters.

        outer = hw.jax.OuterOptimizer(worker, params, hw.SGD(0.7, momentum=0.9, nesterov=True), every=24)
        params = outer.params
        ...
        params, state = inner_step(params, state, batch)      # any optimizer, jitted as you like
        params = outer.step(params)

    Leaves are named as in `DistributedOptimizer`. Arrays that are returned are new, on the devices of those
    that they replace; a tree in which nothing is due is returned as it came.

    Args:
        worker, params: as in `DistributedOptimizer`.
        outer_rule: what the servers do with a change.
        every, fragments, merge, codec, values_codec, overlap, blend, weight, name, nonfinite: as in
            `headwater.torch.OuterOptimizer`.

    Attributes:
        params: the tree that was returned last, at first the servers' values.

    Raises:
        ConfigurationError: an impossible argument.
        RegistrationError: no leaves, one that is no array or of another dtype, two of the same name, or
            another model of that name.
    """

    def __init__(
        self,
        worker: Worker,
        params: Tree,
        outer_rule: Rule,
        *,
        every: int = 24,
        fragments: int = 1,
        merge: str | None = "mean",
        codec: str | None = None,
        values_codec: str | None = None,
        overlap: int = 0,
        blend: float = 0.0,
        weight: Weighing = "one",
        name: str = "model",
        nonfinite: NonFinite = "raise",
    ) -> None:
        check_nonfinite(nonfinite)
        leaves, self._structure = flatten(params, RegistrationError)
        trained = {path: leaf for path, leaf in leaves if leaf is not None}
        self._names = names_of(trained)
        for path, leaf in trained.items():
            check_parameter(self._names[path], leaf)
        values = {self._names[path]: leaf for path, leaf in trained.items()}
        self._leaves = _Leaves(values)
        self._counts = weight != "one"
        self._claim = FragmentClaim()
        self._steps = LocalSteps(
            worker,
            self._leaves,
            values,
            outer_rule,
            OuterPlan(every, fragments, overlap, blend, weight, len(values)),
            name=name,
            merge=merge,
            codec=codec,
            values_codec=values_codec,
            aliases={},
            nonfinite=nonfinite,
            claim=self._claim,
        )
        self._claim.models = [fragment.model for fragment in self._steps.fragments]
        self.params: Tree = self._tree()

    @property
    def result(self) -> StepResult | None:
        """Of the last outer step that was answered; None before."""
        return self._steps.result

    @property
    def fragments(self) -> tuple[tuple[str, ...], ...]:
        """Names of the leaves of each fragment, in the order in which they are sent."""
        return tuple(fragment.names for fragment in self._steps.fragments)

    def step(self, params: Tree, count: float | None = None) -> Tree:
        """Say that a local step came to `params`; sends, and receives, what is due.

        Returns what to go on with. Blocks as the mode says where a fragment is received.

        Args:
            params: a tree like the first one.
            count: samples or tokens that the step was computed from; needed where `weight` says so.

        Raises:
            ConfigurationError: no `count` where `weight` needs one, or an impossible one.
            GradientError: another tree than the parameters'; names the leaf.
            NonFiniteError: a leaf to be sent is not finite, with `nonfinite="raise"`; nothing was sent.
            UsageError: called in a function that JAX traces.
            StalledError, ClosedError: as `Worker.step`.
        """
        if count is None and self._counts:
            raise ConfigurationError(
                "step: weight='samples' and 'tokens' need to know how many each local step was computed "
                "from: call step(params, len(batch))"
            )
        weighed = check_weight(0.0 if count is None else count)
        self._take(params)
        self._steps.step(weighed)
        return self._given()

    def finish(self, params: Tree) -> Tree:
        """Block for the fragment that is under way, if any, and return `params` with it taken over."""
        self._take(params)
        self._steps.finish()
        return self._given()

    def flush(self, params: Tree) -> Tree:
        """Send what was not sent yet; returns what came back: an outer step for each fragment.

        For all workers at one place of the program, such as the end. Raises as `step`.
        """
        self._take(params)
        self._steps.flush()
        return self._given()

    def pull(self) -> Tree:
        """The servers' current parameters; what was not sent is given up. An exchange for each fragment."""
        self._check_owner()
        self._steps.pull()
        return self._given()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _check_owner(self) -> None:
        if lost := self._claim.lost:
            raise UsageError(
                f"another OuterOptimizer was made for model {lost!r} after this one and has taken it over: "
                f"use that one"
            )

    def _take(self, params: Tree) -> None:
        self._check_owner()
        leaves = {path: leaf for path, leaf in flatten(params, GradientError)[0] if leaf is not None}
        for path in [*leaves.keys() ^ self._names.keys()][:1]:
            what = "no leaf" if path in self._names else "a leaf"
            raise GradientError(f"step: the tree has {what} at {shown(path)}, unlike the first one")
        now = {self._names[path]: leaf for path, leaf in leaves.items()}
        for name, leaf in now.items():
            if np.shape(leaf) != self._leaves.shapes[name]:
                raise GradientError(
                    f"step: leaf {name!r} has shape {np.shape(leaf)}, expected {self._leaves.shapes[name]}"
                )
        self._leaves.now, self._leaves.changed = now, False
        self.params = params

    def _given(self) -> Tree:
        """The tree that the user goes on with: the same object where nothing came."""
        if self._leaves.changed:
            self.params = self._tree()
        return self.params

    def _tree(self) -> Tree:
        self._leaves.changed = False
        leaves: Sequence[Any] = [self._leaves.now[name] for name in self._names.values()]
        tree: Tree = tree_util.tree_unflatten(self._structure, leaves)
        return tree


class _Leaves:
    """The leaves of a tree as `Local` parameters.

    Attributes:
        now: by name. changed: whether any was replaced since somebody looked.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.now = dict(values)
        self.changed = False
        self.shapes = {name: np.shape(leaf) for name, leaf in values.items()}
        self._dtypes = {name: np.dtype(leaf.dtype) for name, leaf in values.items()}
        self._places = {name: place_of(leaf) for name, leaf in values.items()}

    def read(self, names: Sequence[str]) -> Mapping[str, Any]:
        """As `Local.read`."""
        with jax.transfer_guard("allow"):
            return {name: np.asarray(self.now[name]) for name in names}

    def write(self, values: Mapping[str, Array]) -> None:
        """As `Local.write`; new arrays that own their memory."""
        with jax.transfer_guard("allow"):
            for name, value in values.items():
                copied = np.array(value, self._dtypes[name])
                self.now[name] = jax.device_put(copied, self._places[name])
        self.changed = True

    def sending(self) -> None:
        """As `Local.sending`: nothing else travels."""
