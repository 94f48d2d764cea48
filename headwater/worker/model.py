"""A worker's handle on a registered model: its window, what is staged there, arrays in and out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import GradientError, NonFiniteError, RegistrationError, UsageError
from headwater.kernels import finite, finite_sum, stager
from headwater.machines.connections import Frame, Outgoing
from headwater.machines.model_buffer import ModelBuffer, ModelMemory, PrivateMemory
from headwater.runtime.client import Client
from headwater.spec.declaration import model_difference
from headwater.spec.layout import Layout
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.wire.window import Window
from headwater.worker.meetings import Meetings
from headwater.worker.model_spec import NonFinite, as_array, check_nonfinite, named
from headwater.worker.rule_settings import RuleSettings
from headwater.worker.rule_state import digest_of, vectors_of
from headwater.worker.vectors import Vectors

_log = logging.getLogger("headwater.worker")

Array: TypeAlias = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)
_NOTHING: Array = np.empty(0, dtype=np.float32)
_NOWHERE: tuple[Array, tuple[int, ...], Array] = (_NOTHING, (-1,), _NOTHING)


class Adapter(Protocol):
    """Whoever has a model's values elsewhere too: in a framework's parameters."""

    def before_read(self) -> None:
        """A step is about to have the servers overwrite the values; what a program wrote must leave first."""

    def after_read(self) -> None:
        """The servers have overwritten the values."""


class Model:
    """A model on the servers, as one worker sees it. Not thread-safe, like its worker.

    Attributes:
        name, layout: as registered.
        gradients: by name, writable float32 views of the memory that servers read gradients from. Whoever
            can compute into them saves a copy: `push` of these very arrays stages what is in them. While a
            step is under way they belong to the servers.
        parameters: by name, writable float32 views of the window that answers overwrite; `vector`: all of
            them one after the other, as the layout says.
        read_version: that of the values in `parameters`; -1 when they are none.
        adapter: what uses the model's memory for a framework's parameters; None for a plain model.
        settings: of its rules.
        took: the values came with the answer to a step whose gradients of this model were applied.
    """

    def __init__(
        self, session: Client, spec: m.ModelSpec, names: Iterable[str] = (), nonfinite: NonFinite = "raise"
    ) -> None:
        check_nonfinite(nonfinite)
        self.name = spec.name
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self._session = session
        self._nonfinite = nonfinite
        # Fixed from now on, as views of it are the user's: a server that comes within reach only later is
        # sent values like one that is not.
        elements = self.layout.elements
        self._memory: ModelMemory = Window(elements) if any(session.shares) else PrivateMemory(elements)
        self._buffer = ModelBuffer(session.machine, spec, self._memory)
        order = list(names) or [tensor.name for tensor in spec.tensors]
        gradients = self.layout.views(self._memory.gradients)
        parameters = self.layout.views(self._memory.parameters)
        self.gradients = {name: gradients[name] for name in order}
        self.parameters = {name: parameters[name] for name in order}
        self.vector = self._memory.parameters
        self._places = {name: (view, view.shape, view.reshape(-1)) for name, view in self.gradients.items()}
        self._read_only = {name: _read_only(view) for name, view in self.parameters.items()}
        self.adapter: Adapter | None = None
        self._vectors: Vectors | None = None
        self._staged: set[str] = set()
        self.settings = RuleSettings(f"model {spec.name!r}", spec.rules)
        self._skip = False
        self._fresh = False
        self.took = False
        self.read_version = -1

    @property
    def id(self) -> int:
        """Of the model; -1 until servers know it."""
        return self._buffer.id

    # ── the user's calls ────────────────────────────────────────────────────────────────────────

    def pull(self, copy: bool = False) -> dict[str, Array]:
        """Current values by name, all of one version; blocks for an exchange.

        Right after a step of a synchronous worker the values are there already. Without `copy` the
        arrays are read-only views that the next step or pull overwrites.

        Raises:
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._session.check_open("pull")
        if not (self._fresh and self._session.mode.rounds and self._session.usable()):
            have = self.read_version
            self._session.ask(lambda number: m.Pull(number, (self.id,), have), "pull")
            self._buffer.arrived()
            self.read_version = self._session.version
            self.took = False
            if self.adapter is not None:
                self.adapter.after_read()
        self._fresh = False
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
        places, staged, put = self._places, self._staged, stager()
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
        if bad and self._nonfinite != "off":
            self.report_nonfinite(bad)
            return
        for name in arrays.keys() & staged if staged else ():
            if arrays[name] is not places[name][2]:
                put(arrays[name], places[name][2], True)
        staged.update(arrays)
        stages.pushed(began)

    def assign(self, values: Mapping[str, Any]) -> None:
        """Set tensors to `values` on the servers, a version of its own; blocks for an exchange.

        The rule's state stays. Other workers see it with their next answer.

        Raises:
            GradientError: an unknown name, a wrong shape or dtype; nothing was assigned.
        """
        self._session.check_open("assign")
        for name, array in self.checked(values).items():
            self.parameters[name][...] = array
        self.outdated()
        self.assign_local(list(values))

    def set(self, *, group: int | None = None, **values: float | Schedule) -> None:
        """Change settings of the rule, such as `lr`, with the next `step` that this worker makes.

        `group`: the parameter group, all by default. Numbers of any kind, NumPy's too; a schedule for `lr`.
        Of several workers in one round the lowest rank wins.

        Raises:
            ConfigurationError: the rule has no such setting, an impossible value, or there is no such group.
        """
        self.settings.set(group, values)

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
            return self._buffer.vectors(server, [vectors[name] for name in answer.states])

        answer = self._call(lambda _, number: Frame(m.ReadState(number, self.id)), "state", place)
        self.settings.arrived(answer.rules[0])
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
        self.load_written_state(state, updates, None)

    @property
    def vectors(self) -> Vectors:
        """Vectors of this model's layout that stay on the servers beside its parameters.

        Raises:
            UsageError: the model is a reader's.
        """
        if self._vectors is None:
            raise UsageError(f"model {self.name!r}: only workers have vectors, this is a reader")
        return self._vectors

    @property
    def rules(self) -> list[Rule]:
        """The rule of each parameter group, with the settings that this worker knows to be in force."""
        return self.settings.rules

    # ── for adapters ────────────────────────────────────────────────────────────────────────────

    def carry(self, name: str) -> None:
        """The next step carries this tensor: its gradient is in `gradients` and was tested."""
        self._staged.add(name)

    def is_carried(self, name: str) -> bool:
        """Whether the next step carries this tensor."""
        return name in self._staged

    def discard(self) -> None:
        """Forget what is staged."""
        self._staged.clear()

    def skip(self) -> None:
        """Make the next step an empty turn: a gradient was not finite."""
        self._skip = True

    def report_nonfinite(self, names: Sequence[str]) -> None:
        """Gradients of these tensors are not finite: with `nonfinite="skip"` the next step is an empty turn.

        Raises:
            NonFiniteError: with any other; names the tensors.
        """
        if self._nonfinite == "skip":
            self._skip = True
            return
        raise NonFiniteError(
            f"the gradient of {named(names)} of model {self.name!r} holds NaN or infinity: nothing was "
            f"staged and the turn was not taken; pass nonfinite='skip' to make such a step an empty turn"
        )

    def assign_local(self, names: Sequence[str], step: int | None = None) -> None:
        """Set tensors on the servers to what is in `parameters`; blocks for an exchange.

        `step`: every rank's program may have written that when it had made so many steps.

        Raises:
            UsageError: another rank wrote something else there.
        """
        carried = m.Carried(self.id, self.layout.mask(names))
        written = None
        if step is not None:
            written = m.ProgramWrite(
                digest_of(carried.tensors, [self.parameters[name] for name in names]), step
            )
        self._session.call(partial(self._buffer.assign, carried, written), "assign")

    # ── for the worker ──────────────────────────────────────────────────────────────────────────

    def load_written_state(
        self, state: Mapping[str, Mapping[str, Any]], updates: int | None, step: int | None
    ) -> None:
        """As `load_state`; `step`: every rank's program may do so when it has made so many steps.

        Raises:
            UsageError: another rank loaded something else.
        """
        self._session.check_open("load_state")
        counts, vectors = vectors_of(f"model {self.name!r}", self.layout, self.rules, state)
        carried = m.Carried(self.id, self.layout.mask(state))
        told = max(counts) if updates is None else updates
        digest = digest_of((carried.tensors, counts, told), vectors.values())
        written = None if step is None else m.ProgramWrite(digest, step)

        request = m.LoadState(0, carried, tuple(vectors), counts, told, written)
        self._session.call(partial(self._buffer.load_state, request, list(vectors.values())), "load_state")

    def meets(self, meetings: Meetings) -> None:
        """Work on its vectors is a meeting of all workers."""
        self._vectors = Vectors(self, meetings)

    def register(self, initial: Mapping[str, NDArray[Any]]) -> None:
        """Declare the model with these values, or join one that exists; blocks for an exchange."""
        for name, value in initial.items():
            self.parameters[name][...] = value
        self._join(self._buffer.register, "register")

    def redeclare(self, spec: m.ModelSpec, nonfinite: NonFinite) -> None:
        """The program declares the model again: it goes on in the same memory, with the new settings.

        Raises:
            RegistrationError: it is another model; names both. Nothing changed.
        """
        check_nonfinite(nonfinite)
        if unlike := model_difference(self.spec, spec):
            raise RegistrationError(unlike)
        self.settings.redeclare(spec.rules)
        self._nonfinite = nonfinite

    def warn_of_unused(self, initial: Mapping[str, NDArray[Any]]) -> None:
        """Say so where a plain model is declared again with values that it does not have."""
        same = (np.array_equal(self.parameters[name], value) for name, value in initial.items())
        if self.adapter is None and not all(same):
            _log.warning(
                "model %r is declared again and goes on with the values that it has, the values passed now "
                "are not used: assign(…) sets values, another name makes another model",
                self.name,
            )

    def attach(self, model: int) -> None:
        """Read a model that exists; blocks for an exchange."""
        self._join(partial(self._buffer.attach, model), "attach")

    def take_staged(self) -> tuple[m.Carried | None, tuple[m.Setting, ...], bool]:
        """What the next step carries, its settings, and whether it must be an empty turn; clears all."""
        carried = m.Carried(self.id, self.layout.mask(self._staged)) if self._staged else None
        governs = self.settings.governs
        settings = tuple(m.Setting(self.id, group, values, governs) for group, values in self.settings.take())
        skip = self._skip
        self._staged, self._skip = set(), False
        return carried, settings, skip

    def keep_staged(self, carried: m.Carried) -> None:
        """Have the next step carry these again, with what is pushed until then: they came too late."""
        names = [tensor.name for tensor in self.layout.tensors]
        kept = self.layout.unmask(carried.tensors)
        self._staged |= {name for name, keep in zip(names, kept, strict=True) if keep}

    def encode(self, mask: bytes) -> None:
        """Make the gradients of these tensors, which a step carries, what the model's codec says."""
        self._buffer.take(mask)

    def gradient_payload(self, server: int, mask: bytes) -> tuple[tuple[m.Run, ...], list[Array]]:
        """The runs and arrays of staged gradients for a server without a window."""
        return self._buffer.staged(mask, server)

    def exchange(self, request: Callable[[int, int], m.Request], what: str) -> m.Answer:
        """An exchange for this model, given a server and the number: its values may come with the answer.

        The result of a portion brings all gradients.
        """
        self._session.check_open(what)

        def outgoing(server: int, number: int) -> Outgoing:
            made = request(server, number)
            return self._buffer.portion(made, server) if isinstance(made, m.NextPortion) else Frame(made)

        return self._call(outgoing, what, self._session.machine.values)

    def meet(self, meet: m.Meet, server: int) -> Frame:
        """What a server is sent of a meeting with work on this model's vectors."""
        return self._buffer.meet(meet, server)

    def coded_payload(self, server: int) -> tuple[tuple[m.Coded, ...], list[Any]]:
        """The same as the model's codec makes them."""
        return self._buffer.coded(server)

    @property
    def gradient_bytes(self) -> int:
        """Bytes that the gradients of all steps so far take, as they are represented."""
        return self._buffer.taken

    @property
    def residual(self) -> dict[str, Array]:
        """By name, what the codec has lost so far and the next gradients bring: views, to look at only.

        Empty without a codec, and before the first step.
        """
        lost = self._buffer.lost
        return {} if lost is None else {n: _read_only(v) for n, v in self.layout.views(lost).items()}

    def written(self) -> None:
        """Note that the window holds the values of the last answer's version."""
        self._buffer.arrived()
        self._fresh, self.read_version = True, self._session.version
        if self.adapter is not None:
            self.adapter.after_read()

    def before_read(self) -> None:
        """Note that a step is about to ask for values."""
        if self.adapter is not None:
            self.adapter.before_read()

    def outdated(self) -> None:
        """Note that values may have changed without this worker's step."""
        self._fresh = False

    def changed_here(self) -> None:
        """Note that the window's parameters may differ from those of any version."""
        self._fresh, self.read_version = False, -1

    def release(self) -> None:
        """Give the window's descriptor back; its memory lives as long as arrays made from it."""
        self._buffer.close()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _join(self, outgoing: Callable[[int, int], Outgoing], what: str) -> None:
        self._buffer.open()
        try:
            answer = self._call(
                outgoing, f"{what} {self.name!r}", lambda server, _: self._buffer.incoming(server)
            )
        except BaseException:
            self._buffer.close()
            raise
        assert answer.model is not None
        if answer.notice:
            _log.warning("model %r: %s", self.name, answer.notice)
        self._buffer.registered(answer.model)
        for rules in answer.rules:
            self.settings.arrived(rules, joined=True)
        self.written()

    def _call(
        self,
        outgoing: Callable[[int, int], Outgoing],
        what: str,
        place: Callable[[int, m.Answer], Sequence[Array]],
    ) -> m.Answer:
        """An exchange whose answers' payload goes where `place` says."""
        answer: m.Answer = self._session.call(outgoing, what, place)
        return answer

    def checked(self, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """As arrays of the tensors' shapes. Raises GradientError."""
        if not isinstance(values, Mapping):
            raise GradientError(
                f"model {self.name!r} takes a dict of tensor names and arrays, got a {type(values).__name__}"
            )
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in values.items():
            if name not in self.gradients:
                raise GradientError(
                    f"model {self.name!r} has no tensor {name!r}, it has {named(self.gradients)}"
                )
            array = as_array(f"tensor {name!r}", value)
            if array.shape != self.gradients[name].shape:
                raise GradientError(
                    f"tensor {name!r} of model {self.name!r} has shape {self.gradients[name].shape}, "
                    f"got {array.shape}"
                )
            arrays[name] = array
        return arrays

    def _flattened(self, grads: Any) -> dict[str, Array]:
        """float32[n] each, contiguous: views where that is possible; of `gradients` the very views that stand
        for them here. Raises GradientError."""
        if not isinstance(grads, Mapping):
            self.checked(grads)
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
                arrays[name] = _flat(self.checked({name: value})[name])
        return arrays


def _flat(array: NDArray[Any]) -> Array:
    """float32[n], contiguous; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32).reshape(-1)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
