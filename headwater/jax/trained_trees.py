"""Training JAX programs: a pytree of parameters on the servers; gradients in, new parameters out.

Invariants:
- Leaves are matched by their key path, never by position; names depend on the paths alone.
- What is returned owns its memory. JAX on the CPU takes a NumPy array's memory for an array of its own
  where it can, so nothing over the window goes to JAX but what is copied before the call returns.
- Nothing is sent, and the turn is not taken, when a step raises UsageError.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, cast

import jax
import numpy as np
from jax import numpy as jnp
from jax import tree_util

from headwater.errors import GradientError, RegistrationError, UsageError
from headwater.messages import StepResult
from headwater.spec.layout import DTYPES
from headwater.spec.rules import Rule
from headwater.worker import Worker
from headwater.worker.model import Model
from headwater.worker.model_spec import Group, NonFinite, check_weight

__all__ = ["DistributedOptimizer"]

Tree = TypeVar("Tree")
Path: TypeAlias = tuple[Any, ...]


class DistributedOptimizer(Generic[Tree]):
    """Trains a pytree on the servers: `step` takes gradients and returns the new parameters.

    Construction registers the model; all workers then have the initial values of the lowest rank. It
    blocks until that one has declared them. Made again, under the same name, with the tree that the model has
    now, it takes the model over with the new settings, and the earlier one refuses use.

    A leaf is a tensor of the model, named by its key path with dots: `{"layers": [{"w": …}]}` has
    `layers.0.w`; a tree that is one array has `params`.

    Every tree that is returned is made of new arrays, on the devices (or with the shardings) that the
    first parameters were committed to: keep them, donate them, as you like.

    Args:
        worker: joined, used by this thread.
        params: pytree of float32, float16 or bfloat16 arrays; the servers hold float32 values of them.
        rule: what the servers do with a gradient.
        name: of the model.
        groups: tensors, by name, whose rule has other settings.
        clip_norm: largest norm of the gradient of all leaves together, as the servers combined it from all
            workers; a larger one is scaled down before the rule gets it. As in `Worker.model`.
        merge: how the gradients of all workers become one, as in `Worker.model`.
        codec, values_codec: how gradients and values travel, as in `Worker.model`.
        nonfinite: what a NaN or infinite gradient does: "raise", "skip" (an empty turn) or "off".

    Attributes:
        params: the tree that was returned last, at first the initial values; if you donated its arrays
            they are gone from here too, and `pull` makes new ones.
        result: of the last step; None before.
        model: the tensors by name; its `state()` is the rule's, its `assign` sets values.

    Raises:
        ConfigurationError: an impossible argument.
        RegistrationError: no leaves, one that is no array or of another dtype, two of the same name, or
            another model of that name, or other values than that model has now.
    """

    def __init__(
        self,
        worker: Worker,
        params: Tree,
        rule: Rule,
        *,
        name: str = "model",
        groups: Sequence[Group] = (),
        clip_norm: float | None = None,
        merge: str | None = None,
        codec: str | None = None,
        values_codec: str | None = None,
        nonfinite: NonFinite = "raise",
    ) -> None:
        leaves, self._structure = flatten(params, RegistrationError)
        self._known = {path[:depth] for path, _ in leaves for depth in range(len(path) + 1)}
        trained = {path: leaf for path, leaf in leaves if leaf is not None}
        self._names = names_of(trained)
        for path, leaf in trained.items():
            check_parameter(self._names[path], leaf)
        values = {self._names[path]: leaf for path, leaf in trained.items()}
        self._dtypes = tuple(np.dtype(leaf.dtype) for leaf in values.values())
        self._places = [place_of(leaf) for leaf in values.values()]
        self._on_host = jax.default_backend() == "cpu" and not any(self._places)
        self._worker = worker
        self.result: StepResult | None = None
        _check_known(worker, name, values)
        self.model: Model = worker.model(
            name,
            values,
            rule,
            groups=groups,
            clip_norm=clip_norm,
            merge=merge,
            codec=codec,
            values_codec=values_codec,
            nonfinite=nonfinite,
        )
        self._claim = self.model.local.adapter = _Claim()
        self.params: Tree = self._read()

    def step(self, grads: Any, *, weight: float = 1.0) -> Tree:
        """End the turn: send the gradients, return the new parameters; blocks as the mode says.

        Args:
            weight: what they count in the mean over all workers, as in `Worker.step`; 0 drops them.
            grads: a tree as the parameters, with arrays of the same shapes. Where it has None, or nothing,
                instead of an array or a subtree, those tensors are not touched, as if they were in no
                worker's loss. None alone is an empty turn. Its arrays are read before `step` returns.

        Raises:
            ConfigurationError: `weight` is negative, not finite or no number.
            GradientError: a leaf the parameters do not have, or of another shape or dtype; names it.
            NonFiniteError: a gradient holds NaN or infinity, with `nonfinite="raise"`.
            UsageError: called in a function that JAX traces.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._check_owner()
        weight = check_weight(weight)
        if weight:
            with jax.transfer_guard("allow"):  # the guard is for transfers nobody asked for
                self.model.push(self._by_name(grads))
        self.result = self._worker.step(read=[self.model], weight=weight)
        self.params = self._read()
        return self.params

    def pull(self) -> Tree:
        """The servers' current parameters; blocks for an exchange.

        After a barrier, this is how every worker evaluates the same version.

        Raises:
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._check_owner()
        self.model.pull()
        self.params = self._read()
        return self.params

    def set(self, *, group: int | None = None, **values: float) -> None:
        """Change scalars of the rule, such as `lr`, with the next `step`; as `Model.set`.

        Takes arrays of one number too, as schedules written in JAX give.

        Raises:
            ConfigurationError: the rule has no such setting, or there is no such group.
        """
        self._check_owner()
        self.model.set(group=group, **{name: _number(value) for name, value in values.items()})

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _check_owner(self) -> None:
        if self.model.local.adapter is not self._claim:
            raise UsageError(
                f"another DistributedOptimizer was made for model {self.model.name!r} after this one and "
                f"has taken the model over: use that one"
            )

    def _by_name(self, grads: Any) -> dict[str, Any]:
        """The gradients there are."""
        found: dict[str, Any] = {}
        for path, leaf in flatten(grads, GradientError)[0]:
            if leaf is None and path in self._known:
                continue
            if leaf is None or path not in self._names:
                what = "None" if leaf is None else f"a {type(leaf).__name__}"
                raise GradientError(
                    f"the gradients have {what} at {shown(path)}, where model {self.model.name!r} has no "
                    f"parameter: pass a tree like the parameters', which are {self._listed()}"
                )
            found[self._names[path]] = leaf
        if not self._on_host:
            for leaf in found.values():
                if isinstance(leaf, jax.Array):
                    leaf.copy_to_host_async()
        return found

    def _listed(self) -> str:
        paths = [shown(path) for path in self._names]
        return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")

    def _read(self) -> Tree:
        """New arrays with what the window has."""
        views = [self.model.parameters[name] for name in self._names.values()]
        if self._on_host:
            with jax.transfer_guard("allow"):
                arrays = jax.block_until_ready(_copy(views, self._dtypes))  # type: ignore[no-untyped-call]
        else:
            leaves = zip(views, self._dtypes, self._places, strict=True)
            arrays = [jax.device_put(np.array(view, dtype), place) for view, dtype, place in leaves]
        return cast(Tree, tree_util.tree_unflatten(self._structure, arrays))


@functools.partial(jax.jit, static_argnums=1)
def _copy(views: Sequence[Any], dtypes: Sequence[Any]) -> list[jax.Array]:
    """Copy and convert all leaves in one compiled call: a fifth of the time of an eager call a leaf."""
    return [jnp.array(view, dtype, copy=True) for view, dtype in zip(views, dtypes, strict=True)]


class _Claim:
    """Held by the optimizer that may use a model: trees are made anew, so nobody writes to its values."""

    def before_read(self) -> None:
        """Nothing to do."""

    def after_read(self) -> None:
        """Nothing to do."""


def _check_known(worker: Worker, name: str, values: dict[str, Any]) -> None:
    """Refuse to share the model of this name, if the worker has one, unless it has these values now.

    Arrays have no identity that would tell a model's parameters from another model's of equal shapes.

    Raises:
        RegistrationError: it has other values; says what to do.
    """
    model = worker.models.get(name)
    if model is None:
        return
    same = model.parameters.keys() == values.keys() and all(
        np.array_equal(model.parameters[one].astype(leaf.dtype), np.asarray(leaf), equal_nan=True)
        for one, leaf in values.items()
    )
    if not (same and isinstance(model.local.adapter, _Claim)):
        raise RegistrationError(
            f"model {name!r} of this worker has other parameters: pass name=… for another model, or the "
            f"`params` of its DistributedOptimizer to go on with it"
        )


def flatten(tree: Any, error: type[UsageError]) -> tuple[list[tuple[Path, Any]], Any]:
    """Leaves with their paths, None among them, and the structure without None.

    Raises:
        error: JAX cannot flatten it.
        UsageError: it is being traced.
    """
    try:
        leaves = tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)[0]
        structure = tree_util.tree_structure(tree)
    except (TypeError, ValueError) as cause:
        raise error(f"cannot flatten this tree: {cause}") from cause
    for path, leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            raise UsageError(
                f"the leaf at {shown(path)} is being traced: call the optimizer outside of "
                f"functions that jax.jit, jax.grad and the like transform, with what they return"
            )
    return leaves, structure


def names_of(paths: Iterable[Path]) -> dict[Path, str]:
    """Each path's name.

    Raises:
        RegistrationError: two have the same.
    """
    first: dict[str, Path] = {}
    for path in paths:
        name = ".".join(_part(key) for key in path) or "params"
        other = first.setdefault(name, path)
        if other is not path:
            raise RegistrationError(
                f"the leaves at {shown(other)} and {shown(path)} would have the same name {name!r}: "
                f"rename one of them"
            )
    return {path: name for name, path in first.items()}


def _part(key: Any) -> str:
    match key:
        case tree_util.DictKey() | tree_util.FlattenedIndexKey():
            return str(key.key)
        case tree_util.SequenceKey():
            return str(key.idx)
        case tree_util.GetAttrKey():
            return str(key.name)
    return str(key)


def shown(path: Path) -> str:
    return tree_util.keystr(path) or "the top"


def check_parameter(name: str, leaf: Any) -> None:
    """Raise RegistrationError unless it is an array of a dtype that can be trained."""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise RegistrationError(
            f"leaf {name!r} of params is a {type(leaf).__name__}, expected an array: make it one, such as "
            f"jnp.float32({leaf!r}), or keep what is not trained out of params"
        )
    if leaf.dtype == np.float64:
        raise RegistrationError(
            f"leaf {name!r} of params is float64, but models are kept in float32: convert it first, for "
            f"example with jax.tree.map(lambda leaf: leaf.astype('float32'), params); with jax_enable_x64 "
            f"new arrays are float64 unless they are given a dtype"
        )
    if str(leaf.dtype) not in DTYPES:
        raise RegistrationError(
            f"leaf {name!r} of params has dtype {leaf.dtype}, expected one of {', '.join(DTYPES)}: keep "
            f"what is not trained out of params"
        )


def place_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Where arrays for this leaf go; None where JAX would put them by itself."""
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, jax.Array | np.generic) and value.ndim == 0 else value
