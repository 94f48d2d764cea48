"""The memory side of a member's connection to a server: where its values and rows come in and go out.

With a window the values lie in memory that both share and nothing crosses the connection; without
one they are the payload, and a private buffer takes the window's place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.runtime.server.rows import RowIntake
from headwater.shard import Shard, StagedRows, Staging
from headwater.spec.layout import Layout
from headwater.wire.window import WindowView

Array = NDArray[np.float32]


class Intake:
    """For one member's connection to the server that hosts `shard`."""

    def __init__(self, shard: Shard, member: int) -> None:
        self._shard = shard
        self._member = member
        self._initial: Array | None = None
        self._state: Array | None = None
        self._rows = RowIntake(shard)

    def place(self, message: m.AnyMessage, length: int) -> Sequence[NDArray[Any]]:
        """Where the `length` bytes of payload that follow `message` go.

        Raises:
            ProtocolError: the message has no payload, or its runs leave this server's range.
        """
        if isinstance(message, m.Register) and message.window is None:
            start, stop = self._shard.range_of(Layout(message.spec.tensors))
            if length != 4 * (stop - start):
                raise ProtocolError(f"initial values of {length} bytes, expected {4 * (stop - start)}")
            self._initial = np.zeros(stop - start, dtype=np.float32)
            return [self._initial]
        if isinstance(message, m.Step):
            runs = [self._run(run).gradients[self._within(run)] for run in message.payload]
            return [*runs, *self._rows.place(message, length)]
        if isinstance(message, m.PullRows | m.DeleteRows | m.AssignRows):
            return self._rows.place(message, length)
        if isinstance(message, m.LoadState):
            return [self._room_for_state(message, length)]
        if isinstance(message, m.Assign):
            return [self._run(run).parameters[self._within(run)] for run in message.payload]
        raise ProtocolError(f"{type(message).__name__} with a payload of {length} bytes, expected none")

    def _room_for_state(self, message: m.LoadState, length: int) -> Array:
        start, stop = self._shard.range_of(self._layout_of(message.carried.model))
        if length != 4 * len(message.states) * (stop - start):
            raise ProtocolError(
                f"states of {length} bytes, expected {len(message.states)} of {4 * (stop - start)}"
            )
        self._state = np.empty(len(message.states) * (stop - start), dtype=np.float32)
        return self._state

    def _run(self, run: m.Run) -> Staging:
        staging = self._shard.staging(self._member, run.model)
        if not is_private(staging):
            raise ProtocolError(f"payload for model {run.model}, whose values are in a window")
        return staging

    def _within(self, run: m.Run) -> slice:
        vector = self._shard.vectors[run.model]
        if not vector.start <= run.start <= run.stop <= vector.stop:
            raise ProtocolError(
                f"payload for elements [{run.start}, {run.stop}), "
                f"this server has [{vector.start}, {vector.stop})"
            )
        return slice(run.start - vector.start, run.stop - vector.start)

    def rows(self, message: m.Request) -> Sequence[StagedRows]:
        """The ids that a request names, and the memory of their rows.

        Raises:
            ProtocolError: no such table, memory outside of the window, or ids that did not come.
        """
        return self._rows.staged(message)

    def staging(self, message: m.Request | m.Scratch | m.Renew, descriptors: list[int]) -> Staging | None:
        """The memory that comes with Register, Attach, Renew and LoadState.

        Takes over the descriptors, Scratch's too.

        Raises:
            ProtocolError: the window is not what the message says.
        """
        try:
            if isinstance(message, m.Renew) and message.window is None:
                return self._renewed(message.model)
            if isinstance(message, m.Register | m.Attach | m.Renew):
                return self._memory(message, descriptors)
            if isinstance(message, m.LoadState):
                return self._loaded(message)
            if isinstance(message, m.Scratch):
                self._rows.map(message, descriptors)
            if descriptors:
                raise ProtocolError(f"{type(message).__name__} came with a descriptor, expected none")
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _memory(self, message: m.Register | m.Attach | m.Renew, descriptors: list[int]) -> Staging:
        if isinstance(message, m.Register):
            layout = Layout(message.spec.tensors)
        else:
            layout = self._layout_of(message.model)
        start, stop = self._shard.range_of(layout)
        if message.window is None:
            initial, self._initial = self._initial, None
            if initial is None or len(initial) != stop - start:
                initial = np.zeros(stop - start, dtype=np.float32)
            return Staging(initial, initial)
        if len(descriptors) != 1:
            raise ProtocolError(f"a window came with {len(descriptors)} descriptors, expected 1")
        view = WindowView(
            descriptors.pop(), size=message.window.size, elements=layout.elements, start=start, stop=stop
        )
        return Staging(view.gradients, view.parameters)

    def _loaded(self, message: m.LoadState) -> Staging:
        state, self._state = self._state, None
        start, stop = self._shard.range_of(self._layout_of(message.carried.model))
        if state is None:
            state = np.empty(0, dtype=np.float32)
        if len(state) != len(message.states) * (stop - start):
            raise ProtocolError(f"{type(message).__name__} came without its states")
        return Staging(state, state)

    def _renewed(self, model: int) -> Staging | None:
        """A private buffer for a member that connected anew; None where it has one, which stays.

        What it staged before must stay there: it may be part of an entry that comes before it is sent again.
        """
        old = self._shard.stagings(self._member).get(model)
        if old is None:
            start, stop = self._shard.range_of(self._layout_of(model))
            initial = np.zeros(stop - start, dtype=np.float32)
        elif is_private(old):
            return None
        else:
            initial = self._shard.staged(self._member, model).copy()
        return Staging(initial, initial)

    def _layout_of(self, model: int) -> Layout:
        vector = self._shard.vectors.get(model)
        if vector is None:
            raise ProtocolError(f"there is no model {model}, known are {sorted(self._shard.vectors)}")
        return vector.layout

    def payload(self, answer: m.Answer | m.Description) -> list[NDArray[Any]]:
        """What follows `answer`: arrays made for it, or the values of models without a window, then rows."""
        rows = self._rows.payload()
        if not isinstance(answer, m.Answer) or answer.failure is not None:
            return []
        copies = self._shard.take_copies(self._member)
        stagings = [self._shard.staging(self._member, model) for model in answer.values]
        return [*copies, *(staging.parameters for staging in stagings if is_private(staging)), *rows]


def is_private(staging: Staging) -> bool:
    """Whether values come and go as payload."""
    return staging.gradients is staging.parameters
