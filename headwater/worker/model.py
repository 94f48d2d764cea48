"""A worker's handle on a registered model: gradients and values as arrays, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels import finite, finite_sum, stager
from headwater.machines.connections import Frame
from headwater.machines.current_read import is_large
from headwater.spec.amounts import flag
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.worker.local_model import Array, LocalModel
from headwater.worker.vectors import Vectors

_FLOAT32 = np.dtype(np.float32)
_NOTHING: Array = np.empty(0, dtype=np.float32)
_NOWHERE: tuple[Array, tuple[int, ...], Array] = (_NOTHING, (-1,), _NOTHING)


class Model:
    """A model on the servers, as one worker sees it. Not thread-safe, like its worker.

    Attributes:
        name, layout: as registered.
        gradients: by name, writable float32 views of the memory that servers read gradients from. Whoever
            can compute into them saves a copy: `push` of these very arrays stages what is in them. While a
            step is under way they belong to the servers.
        parameters: by name, writable float32 views of the memory that answers overwrite.
        local: this worker's side of the model, for adapters.
    """

    def __init__(self, local: LocalModel, vectors: Vectors) -> None:
        self.local = local
        self.name, self.layout = local.name, local.layout
        self.gradients, self.parameters = local.gradients, local.parameters
        self._vectors = vectors
        self._session = local.session
        self._places = {name: (view, view.shape, view.reshape(-1)) for name, view in self.gradients.items()}
        self._read_only = {name: _read_only(view) for name, view in self.parameters.items()}

    def pull(self, copy: bool = False) -> dict[str, Array]:
        """Current values by name, all of one version; blocks for an exchange.

        Right after a step of a synchronous worker the values are there already. Without `copy` the
        arrays are read-only views that the next step or pull overwrites.

        Raises:
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._session.check_open("pull")
        copy = flag("pull: copy", copy)
        local = self.local
        if not (local.fresh and self._session.mode.rounds and self._session.usable()):
            have = local.read_version
            ordered = is_large(4 * local.layout.elements, self._session.machine.servers)
            self._session.ask(lambda number: m.Pull(number, (local.id,), have, ordered), "pull")
            local.took = False
            local.written()
        local.fresh = False
        return {name: view.copy() if copy else view for name, view in self._read_only.items()}

    def push(self, grads: Mapping[str, Any]) -> None:
        """Stage gradients by tensor name for the next `step`; a second push of a tensor adds.

        Copies; takes anything with `__dlpack__` or `__array__` of a real dtype and the tensor's
        shape. All or nothing: on an error no tensor is staged. Does not block.

        The arrays of `gradients` themselves are not copied: what is in them is tested and staged as it is,
        instead of what was staged of these tensors before.

        Raises:
            GradientError: an unknown name, a wrong shape or dtype; lists what was expected.
            NonFiniteError: NaN or infinity, or a sum that is, with `nonfinite="raise"`.
            ClosedError: the worker has left.
        """
        self._session.check_open("push")
        stages = self._session.stages
        began = stages.now()
        arrays = self._flattened(grads)
        places, staged, put = self._places, self.local.staged, stager()
        bad = []
        for name, array in arrays.items():
            target = places[name][2]
            if array is target:
                good = finite(array)
            elif name in staged:
                good = finite_sum(array, target)
            else:
                good = put(array, target, False)
            if not good:
                bad.append(name)
        if bad and self.local.nonfinite != "off":
            self.local.report_nonfinite(bad)
            return
        for name in arrays.keys() & staged if staged else ():
            if arrays[name] is not places[name][2]:
                put(arrays[name], places[name][2], True)
        staged.update(arrays)
        stages.pushed(began)

    def discard(self) -> None:
        """Forget what is staged."""
        self.local.discard()

    def assign(self, values: Mapping[str, Any]) -> None:
        """Set tensors to `values` on the servers, a version of its own; blocks for an exchange.

        The rule's state stays. Other workers see it with their next answer.

        Raises:
            GradientError: an unknown name, a wrong shape or dtype; nothing was assigned.
        """
        self._session.check_open("assign")
        for name, array in self.local.checked(values).items():
            self.parameters[name][...] = array
        self.local.outdated()
        self.local.assign(list(values))

    def set(self, *, group: int | None = None, **values: float | Schedule) -> None:
        """Change settings of the rule, such as `lr`, with the next `step` that this worker makes.

        `group`: the parameter group, all by default. Numbers of any kind, NumPy's too; a schedule for `lr`.
        Of several workers in one round the lowest rank wins.

        Raises:
            ConfigurationError: the rule has no such setting, an impossible value, or there is no such group.
        """
        self.local.settings.set(group, values)

    def state(self) -> dict[str, dict[str, Any]]:
        """The rule's state on the servers by tensor name, at one version; blocks for an exchange.

        Each tensor has `step`, its number of updates, and a float32 array of its shape for each of the
        rule's state vectors, under torch's names. The arrays are the caller's.

        Raises:
            ClosedError: the worker has left.
        """
        self._session.check_open("state")
        vectors: dict[str, Array] = {}

        def place(server: int, answer: m.Answer) -> list[Array]:
            for name in answer.states:
                vectors.setdefault(name, np.zeros(self.layout.elements, dtype=np.float32))
            return self.local.buffer.vectors(server, [vectors[name] for name in answer.states])

        answer: m.Answer = self._session.call(
            lambda _, number: Frame(m.ReadState(number, self.local.id)), "state", place
        )
        self.local.settings.arrived(answer.rules[0])
        views = {name: self.layout.views(vector) for name, vector in vectors.items()}
        state: dict[str, dict[str, Any]] = {}
        for tensor, count in zip(self.layout.tensors, answer.counts, strict=True):
            own = self.rules[tensor.group].states()
            state[tensor.name] = {"step": count, **{name: views[name][tensor.name] for name in own}}
        return {name: state[name] for name in self.gradients}

    def load_state(self, state: Mapping[str, Mapping[str, Any]], *, updates: int | None = None) -> None:
        """Set the rule's state of tensors on the servers, a version of its own; blocks for an exchange.

        The inverse of `state`: of each tensor `step`, its number of updates, and each of the rule's state
        vectors; one that has had no update, with a step of 0, needs no vectors. Tensors that are left out
        keep theirs. For one worker to call.

        Args:
            updates: of the model, which schedules are evaluated at; by default the largest `step`.

        Raises:
            GradientError: an unknown tensor or state, one that is missing, a wrong shape or dtype, an
                impossible step; names it. Nothing changed.
        """
        self.local.load_state(state, updates, None)

    @property
    def vectors(self) -> Vectors:
        """Vectors of this model's layout that stay on the servers beside its parameters."""
        return self._vectors

    @property
    def rules(self) -> list[Rule]:
        """The rule of each parameter group, with the settings that this worker knows to be in force."""
        return self.local.settings.rules

    @property
    def read_version(self) -> int:
        """Version of the values in `parameters`; -1 where they are those of none."""
        return self.local.read_version

    @property
    def residual(self) -> dict[str, Array]:
        """By name, what the codec has lost so far and the next gradients bring: views, to look at only.

        Empty without a codec, and before the first step.
        """
        lost = self.local.buffer.lost
        return {} if lost is None else {n: _read_only(v) for n, v in self.layout.views(lost).items()}

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _flattened(self, grads: Any) -> dict[str, Array]:
        """float32[n] each, contiguous: views where that is possible; of `gradients` the very views that stand
        for them here. Raises GradientError."""
        if not isinstance(grads, Mapping):
            self.local.checked(grads)
        arrays: dict[str, Array] = {}
        for name, value in grads.items():
            own, shape, flat = self._places.get(name, _NOWHERE)
            if value is own:
                arrays[name] = flat
            elif (
                type(value) is np.ndarray
                and value.dtype is _FLOAT32
                and value.shape == shape
                and value.flags.c_contiguous
            ):
                arrays[name] = value.reshape(-1)
            else:
                arrays[name] = _flat(self.local.checked({name: value})[name])
        return arrays


def _flat(array: NDArray[Any]) -> Array:
    """float32[n], contiguous; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32).reshape(-1)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
