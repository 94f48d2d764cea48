"""One member's memory of a model: what of it servers are given, and what travels to them and back instead.

Decides and does no I/O: where the memory lies, and how others are given it, is the business of `ModelMemory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.machines.client import ClientMachine
from headwater.machines.connections import Frame
from headwater.machines.model_codec import CodedGradients, CodedValues
from headwater.spec.codecs import parse_codec, parse_values_codec
from headwater.spec.layout import Layout

Array: TypeAlias = NDArray[np.float32]


class ModelMemory(Protocol):
    """Memory for gradients and parameters of one model: float32[elements] each.

    Attributes:
        shared: whether others can be given it.
        size: bytes, of both. descriptors: what travels to give it to others.
    """

    @property
    def gradients(self) -> Array: ...
    @property
    def parameters(self) -> Array: ...
    @property
    def shared(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @property
    def descriptors(self) -> Sequence[Any]: ...

    def renew(self) -> None:
        """Go on in memory with the same content, at the same addresses, that nobody else has."""

    def release(self) -> None:
        """Give nobody else this memory any more."""


class PrivateMemory:
    """A `ModelMemory` that is not shared."""

    shared = False
    size = 0
    descriptors = ()

    def __init__(self, elements: int) -> None:
        self.gradients: Array = np.zeros(elements, dtype=np.float32)
        self.parameters: Array = np.zeros(elements, dtype=np.float32)

    def renew(self) -> None:
        """Nobody else ever has it."""

    def release(self) -> None:
        """Nobody else ever has it."""


class ModelBuffer:
    """Of the model `spec`, in `memory`, as the member that `machine` is.

    Attributes:
        id: of the model; -1 until servers know it.
        layout: of the vectors in `memory`.
    """

    def __init__(self, machine: ClientMachine, spec: m.ModelSpec, memory: ModelMemory) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.memory = memory
        self.id = -1
        self._machine = machine
        self._cuts = self.layout.cut(machine.servers)
        codec, values = parse_codec(spec.codec), parse_values_codec(spec.values_codec)
        self._coded = None if codec is None else CodedGradients(codec, self.layout, self._cuts)
        self._values = None if values is None else CodedValues(values, memory.parameters, self._cuts)
        self._taken = 0

    # ── frames ──────────────────────────────────────────────────────────────────────────────────

    def register(self, server: int, number: int) -> Frame:
        """Declare the model, with what is in the parameters as initial values."""
        window, descriptors = self._window(self._machine.shares[server])
        start, stop = self._cuts[server]
        values = [] if window is not None or start == stop else [self.memory.parameters[start:stop]]
        return Frame(m.Register(number, self.spec, window), values, descriptors)

    def attach(self, model: int, server: int, number: int) -> Frame:
        """Read a model that exists."""
        window, descriptors = self._window(self._machine.shares[server])
        return Frame(m.Attach(number, model, window), (), descriptors)

    def assign(self, carried: m.Carried, written: m.ProgramWrite | None, server: int, number: int) -> Frame:
        """Set tensors on the servers to what is in the parameters."""
        runs, values = self._runs(server, carried.tensors, self.memory.parameters)
        return Frame(m.Assign(number, carried, runs, written), values)

    def load_state(self, request: m.LoadState, states: Sequence[Array], server: int, number: int) -> Frame:
        """Set states on the servers: `states` are vectors of the model's layout, in the request's order."""
        start, stop = self._cuts[server]
        ranges = self.vectors(server, states) if stop > start else []
        return Frame(msgspec.structs.replace(request, number=number), ranges)

    def meet(self, meet: m.Meet, server: int) -> Frame:
        """Have the servers work on vectors, with all gradients where that gathers them: float32 whatever the
        codec, and none for a server that reads them itself."""
        if meet.work is None or not meet.work.gathers:
            return Frame(meet)
        runs, values = self._runs(server, self.layout.mask(self.layout.index), self.memory.gradients)
        return Frame(msgspec.structs.replace(meet, payload=runs), values)

    def portion(self, request: m.NextPortion, server: int) -> Frame:
        """Bring the gradient of a portion, if there is a result, and ask for the next."""
        if request.done is None:
            return Frame(request)
        runs, values = self._runs(server, self.layout.mask(self.layout.index), self.memory.gradients)
        return Frame(msgspec.structs.replace(request, payload=runs), values)

    def take(self, mask: bytes) -> None:
        """A step carries the gradients of these tensors: make them what the model's codec says."""
        if self._coded is not None:
            self._coded.encode(mask, self.memory.gradients)
        else:
            carried = self.layout.unmask(mask)
            self._taken += 4 * int((self.layout.stops - self.layout.starts)[carried].sum())

    @property
    def taken(self) -> int:
        """Bytes that the gradients of all steps so far take, whether they travelled or lay in memory that is
        shared."""
        return self._taken if self._coded is None else self._coded.taken

    @property
    def lost(self) -> Array | None:
        """float32[elements]: what the codec lost and the next gradients bring; None where nothing is."""
        return None if self._coded is None else self._coded.lost

    def staged(self, mask: bytes, server: int) -> tuple[tuple[m.Run, ...], list[Array]]:
        """The gradients of these tensors that follow a step to a server; none where it reads them itself, or
        gets them as a codec makes them."""
        return ((), []) if self._coded is not None else self._runs(server, mask, self.memory.gradients)

    def coded(self, server: int) -> tuple[tuple[m.Coded, ...], list[Any]]:
        """The gradients that follow a step to a server as the model's codec makes them, behind `staged`."""
        if self._coded is None or self._is_shared(server):
            return (), []
        return self._coded.outgoing(self.id, server)

    def incoming(self, server: int) -> list[Any]:
        """Where a server's range of the parameters goes that follows its answer; none where it writes it."""
        if self._is_shared(server):
            return []
        if self._values is not None:
            return self._values.incoming(server)
        start, stop = self._cuts[server]
        return [self.memory.parameters[start:stop]]

    def arrived(self) -> None:
        """All servers have answered with values."""
        if self._values is not None:
            self._values.arrived()

    def vectors(self, server: int, vectors: Sequence[Array]) -> list[Array]:
        """The server's range of vectors of the model's layout."""
        start, stop = self._cuts[server]
        return [vector[start:stop] for vector in vectors]

    # ── with the member's connections ───────────────────────────────────────────────────────────

    def open(self) -> None:
        """Servers are given this memory from now on, whenever connections are made."""
        self._machine.connections.buffers.append(self)

    def registered(self, model: int) -> None:
        """The servers know the model, and this is where its values arrive from now on."""
        self.id = model
        self._machine.receivers[model] = self.incoming

    def close(self) -> None:
        """Servers are given it no more; idempotent. Arrays of it stay valid."""
        if self in self._machine.connections.buffers:
            self._machine.connections.buffers.remove(self)
        self.memory.release()

    def renew(self) -> None:
        """Go on in memory with the same content that nobody else has."""
        self.memory.renew()

    def offer(self, server: int, shared: bool, anew: bool) -> Frame | None:
        """What gives the memory to a server that knows this model as registered by this member, or tells it
        that there is none."""
        if self.id < 0 or not anew:
            return None
        window, descriptors = self._window(shared)
        return Frame(m.Renew(self.id, window), (), descriptors)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _is_shared(self, server: int) -> bool:
        return self.memory.shared and self._machine.shares[server]

    def _window(self, shared: bool) -> tuple[m.WindowSpec | None, Sequence[Any]]:
        if not shared or not self.memory.shared:
            return None, ()
        return m.WindowSpec(self.memory.size), self.memory.descriptors

    def _runs(self, server: int, mask: bytes, memory: Array) -> tuple[tuple[m.Run, ...], list[Array]]:
        if self._is_shared(server):
            return (), []
        runs = self.layout.runs(self.layout.unmask(mask), *self._cuts[server])
        return tuple(m.Run(self.id, *run) for run in runs), [memory[low:high] for low, high in runs]
