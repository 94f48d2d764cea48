"""A worker's side of a model: its memory, what is staged there, and which version its values are.

`Model` is the user's handle on it; what steps, meetings and adapters for frameworks need of a model is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import GradientError, NonFiniteError, RegistrationError
from headwater.kernels.ahead import compile_for_model
from headwater.loggers import logger
from headwater.machines.connections import Frame, Outgoing
from headwater.machines.model_buffer import ModelBuffer, ModelMemory, PrivateMemory
from headwater.runtime.client import Client
from headwater.spec.declaration import model_difference
from headwater.spec.layout import Layout
from headwater.wire.window import Window
from headwater.worker.model_spec import NonFinite, as_array, check_nonfinite, named
from headwater.worker.rule_settings import RuleSettings
from headwater.worker.rule_state import digest_of, vectors_of

_log = logger("headwater.worker")

Array: TypeAlias = NDArray[np.float32]


class Adapter(Protocol):
    """Whoever has a model's values elsewhere too: in a framework's parameters."""

    def before_read(self) -> None:
        """A step is about to have the servers overwrite the values; what a program wrote must leave first."""

    def after_read(self) -> None:
        """The servers have overwritten the values."""


class LocalModel:
    """One worker's side of a model. Not thread-safe.

    Attributes:
        name, spec, layout: as registered.
        buffer: what of the memory servers are given, and what travels to them and back instead.
        gradients, parameters: as `Model` has them; vector: all parameters one after the other.
        staged: names of tensors that the next step carries; their gradients are in `gradients`.
        read_version: that of the values in `parameters`; -1 when they are none.
        fresh: the values are those of the last answer of this worker.
        took: the values came with the answer to a step whose gradients of this model were applied.
        adapter: what uses the memory for a framework's parameters; None for a plain model.
        settings: of its rules.
        nonfinite: what a gradient that is not finite does.
    """

    def __init__(
        self, session: Client, spec: m.ModelSpec, names: Iterable[str] = (), nonfinite: NonFinite = "raise"
    ) -> None:
        check_nonfinite(nonfinite)
        self.name = spec.name
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.session = session
        self.nonfinite = nonfinite
        # Fixed from now on, as views of it are the user's: a server that comes within reach only later is
        # sent values like one that is not.
        elements = self.layout.elements
        memory: ModelMemory = Window(elements) if any(session.shares) else PrivateMemory(elements)
        self.buffer = ModelBuffer(session.machine, spec, memory)
        order = list(names) or [tensor.name for tensor in spec.tensors]
        gradients = self.layout.views(memory.gradients)
        parameters = self.layout.views(memory.parameters)
        self.gradients = {name: gradients[name] for name in order}
        self.parameters = {name: parameters[name] for name in order}
        self.vector = memory.parameters
        self.adapter: Adapter | None = None
        self.settings = RuleSettings(f"model {spec.name!r}", spec.rules)
        self.staged: set[str] = set()
        self.fresh = False
        self.took = False
        self.read_version = -1
        self._skip = False

    @property
    def id(self) -> int:
        """The model's number in the cluster; -1 until servers know it."""
        return self.buffer.id

    # ── staged gradients ────────────────────────────────────────────────────────────────────────────────

    def carry(self, name: str) -> None:
        """The next step carries this tensor: its gradient is in `gradients` and was tested."""
        self.staged.add(name)

    def discard(self) -> None:
        """Forget what is staged."""
        self.staged.clear()

    def skip(self) -> None:
        """Make the next step an empty turn: a gradient was not finite."""
        self._skip = True

    def report_nonfinite(self, names: Sequence[str]) -> None:
        """Gradients of these tensors are not finite: with `nonfinite="skip"` the next step is an empty turn.

        Raises:
            NonFiniteError: with any other; names the tensors.
        """
        if self.nonfinite == "skip":
            self._skip = True
            return
        raise NonFiniteError(
            f"the gradient of {named(names)} of model {self.name!r} holds NaN or infinity: nothing was "
            f"staged and the turn was not taken; pass nonfinite='skip' to make such a step an empty turn"
        )

    def take_staged(self) -> tuple[m.Carried | None, tuple[m.Setting, ...], bool]:
        """What the next step carries, its settings, and whether it must be an empty turn; clears all."""
        carried = m.Carried(self.id, self.layout.mask(self.staged)) if self.staged else None
        governs = self.settings.governs
        settings = tuple(m.Setting(self.id, group, values, governs) for group, values in self.settings.take())
        skip = self._skip
        self.staged, self._skip = set(), False
        return carried, settings, skip

    def keep_staged(self, carried: m.Carried) -> None:
        """Have the next step carry these again, with what is pushed until then: they came too late."""
        names = [tensor.name for tensor in self.layout.tensors]
        kept = self.layout.unmask(carried.tensors)
        self.staged |= {name for name, keep in zip(names, kept, strict=True) if keep}

    def checked(self, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Values as arrays of the tensors' shapes. Raises GradientError."""
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

    # ── values ──────────────────────────────────────────────────────────────────────────────────────────

    def written(self) -> None:
        """Note that the window holds the values of the last answer's version."""
        self.buffer.arrived()
        self.fresh, self.read_version = True, self.session.version
        if self.adapter is not None:
            self.adapter.after_read()

    def before_read(self) -> None:
        """Note that a step is about to ask for values."""
        if self.adapter is not None:
            self.adapter.before_read()

    def outdated(self) -> None:
        """Note that values may have changed without this worker's step."""
        self.fresh = False

    def changed_here(self) -> None:
        """Note that the window's parameters may differ from those of any version."""
        self.fresh, self.read_version = False, -1

    # ── registration ────────────────────────────────────────────────────────────────────────────────────

    def register(self, initial: Mapping[str, NDArray[Any]]) -> None:
        """Declare the model with these values, or join one that exists; blocks for an exchange."""
        for name, value in initial.items():
            self.parameters[name][...] = value
        coded = self.spec.codec is not None or self.spec.values_codec is not None
        compile_for_model(measured=False, merged=False, coded=coded)
        self._join(self.buffer.register, "register")

    def attach(self, model: int) -> None:
        """Read a model that exists; blocks for an exchange."""
        self._join(partial(self.buffer.attach, model), "attach")

    def _join(self, outgoing: Callable[[int, int], Outgoing], what: str) -> None:
        self.buffer.open()
        try:
            answer = self.session.call(
                outgoing, f"{what} {self.name!r}", lambda server, _: self.buffer.incoming(server)
            )
        except BaseException:
            self.buffer.close()
            raise
        assert answer.model is not None
        if answer.notice:
            _log.warning("model %r: %s", self.name, answer.notice)
        self.buffer.registered(answer.model)
        for rules in answer.rules:
            self.settings.arrived(rules, joined=True)
        self.written()

    def redeclare(self, spec: m.ModelSpec, nonfinite: NonFinite) -> None:
        """The program declares the model again: it goes on in the same memory, with the new settings.

        Raises:
            RegistrationError: it is another model; names both. Nothing changed.
        """
        check_nonfinite(nonfinite)
        if unlike := model_difference(self.spec, spec):
            raise RegistrationError(unlike)
        self.settings.redeclare(spec.rules)
        self.nonfinite = nonfinite

    def warn_of_unused(self, initial: Mapping[str, NDArray[Any]]) -> None:
        """Say so where a plain model is declared again with values that it does not have."""
        same = (np.array_equal(self.parameters[name], value) for name, value in initial.items())
        if self.adapter is None and not all(same):
            _log.warning(
                "model %r is declared again and goes on with the values that it has, the values passed now "
                "are not used: assign(…) sets values, another name makes another model",
                self.name,
            )

    def release(self) -> None:
        """Give the window's descriptor back; its memory lives as long as arrays made from it."""
        self.buffer.close()

    # ── exchanges ───────────────────────────────────────────────────────────────────────────────────────

    def assign(self, names: Sequence[str], step: int | None = None) -> None:
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
        self.session.call(partial(self.buffer.assign, carried, written), "assign")

    def load_state(
        self, state: Mapping[str, Mapping[str, Any]], updates: int | None, step: int | None
    ) -> None:
        """As `Model.load_state`; `step`: every rank's program may do so when it has made so many steps.

        Raises:
            UsageError: another rank loaded something else.
        """
        self.session.check_open("load_state")
        counts, vectors = vectors_of(f"model {self.name!r}", self.layout, self.settings.rules, state)
        carried = m.Carried(self.id, self.layout.mask(state))
        told = max(counts) if updates is None else updates
        digest = digest_of((carried.tensors, counts, told), vectors.values())
        written = None if step is None else m.ProgramWrite(digest, step)
        request = m.LoadState(0, carried, tuple(vectors), counts, told, written)
        self.session.call(partial(self.buffer.load_state, request, list(vectors.values())), "load_state")

    def exchange(self, request: Callable[[int, int], m.Request], what: str) -> m.Answer:
        """An exchange for this model, given a server and the number: its values may come with the answer.

        The result of a portion brings all gradients.
        """
        self.session.check_open(what)

        def outgoing(server: int, number: int) -> Outgoing:
            made = request(server, number)
            return self.buffer.portion(made, server) if isinstance(made, m.NextPortion) else Frame(made)

        answer: m.Answer = self.session.call(outgoing, what, self.session.machine.values)
        return answer
