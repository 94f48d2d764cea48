"""The memory of one member's connection to a server: where its values and rows come in and go out.

With a window the values lie in memory that both share, and nothing crosses the connection. Without one they
are the payload, and a private buffer takes the window's place. Rows of tables lie in a scratch window, or
are payload. Gradients of models and tables with a codec come as its bytes, and are decoded once all of them
are here; values of a model with a codec for them leave so.

Everything here runs in the connection's own thread and without the server's lock, so that a member whose
payload comes in never waits for a pass that answers another one. What it reads of the shard (which models
and tables there are, where they are cut, where this member stages) changes only by this member's own
exchanges, or grows. For the same reason the loops that a request will need are compiled here: nobody else
waits for that. (Those of a declaration take longer, and say so: see `headwater.machines.requests`.)

Invariants:
- Ids are copied before they are checked, so that what was checked cannot change afterwards.
- Runs of a payload lie within this server's range, and are received into private buffers only.
- What a member staged in a private buffer stays there when it connects anew: it may be part of an entry that
  comes before it is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError, UsageError
from headwater.kernels.codecs import decode, decode_rows, encode
from headwater.machines.memory import Given, ScratchPart, ServerMemory
from headwater.shard import Shard, StagedRows, Staging
from headwater.shard.loops_ahead import compile_for
from headwater.spec.codecs import parse_codec, parse_row_codec, parse_values_codec
from headwater.spec.layout import Layout

Arrays = list[NDArray[Any]]

_ID, _ITEM = 8, 4


@dataclass(frozen=True, slots=True)
class Brought:
    """What came with a message: where a model is staged, and the rows that the request names, in its order.

    `failure`: why the request cannot be served, where its memory already says so.
    """

    staging: Staging | None = None
    rows: Sequence[StagedRows] = ()
    failure: UsageError | None = None


_NOTHING = Brought()


class MemberMemory:
    """Of `member`, over one connection to the server that hosts `shard`. `exact`: values stay float32."""

    def __init__(self, shard: Shard, member: int, memory: ServerMemory, exact: bool = False) -> None:
        self._exact = exact
        self._shard = shard
        self._member = member
        self._memory = memory
        self._initial: NDArray[np.float32] | None = None
        self._state: NDArray[np.float32] | None = None
        self._scratch: ScratchPart | None = None
        self._received: list[StagedRows] = []
        self._coded: list[tuple[m.Coded, NDArray[np.uint8]]] = []
        self._coded_rows: dict[int, NDArray[np.uint8]] = {}  # by the place of theirs in `_received`
        self._pulled: Sequence[StagedRows] = ()

    # ── before a payload is received ────────────────────────────────────────────────────────────

    def place(self, message: m.AnyMessage, length: int) -> Arrays:
        """Where the `length` bytes of payload that follow `message` go.

        Raises:
            ProtocolError: the message has no payload, or its runs leave this server's range.
        """
        self._coded, self._coded_rows = [], {}
        if isinstance(message, m.Register) and message.window is None:
            start, stop = self._shard.range_of(Layout(message.spec.tensors))
            if length != _ITEM * (stop - start):
                raise ProtocolError(f"initial values of {length} bytes, expected {_ITEM * (stop - start)}")
            self._initial = np.zeros(stop - start, dtype=np.float32)
            return [self._initial]
        if isinstance(message, m.Meet | m.NextPortion):
            return [self._private(run).gradients[self._within(run)] for run in message.payload]
        if isinstance(message, m.Step):
            runs: Arrays = [self._private(run).gradients[self._within(run)] for run in message.payload]
            self._coded = [(coded, self._place_coded(coded)) for coded in message.coded]
            return [*runs, *(data for _, data in self._coded), *self._place_rows(message, length)]
        if isinstance(message, m.PullRows | m.DeleteRows | m.AssignRows):
            return self._place_rows(message, length)
        if isinstance(message, m.LoadState):
            self._state = np.empty(self._state_length(message), dtype=np.float32)
            if length != self._state.nbytes:
                raise ProtocolError(f"states of {length} bytes, expected {self._state.nbytes}")
            return [self._state]
        if isinstance(message, m.Assign):
            return [self._private(run).parameters[self._within(run)] for run in message.payload]
        raise ProtocolError(f"{type(message).__name__} with a payload of {length} bytes, expected none")

    def _state_length(self, message: m.LoadState) -> int:
        """Elements of all states that the message brings, of this server's range."""
        start, stop = self._shard.range_of(self._layout_of(message.carried.model))
        return len(message.states) * (stop - start)

    def _private(self, run: m.Run | m.Coded) -> Staging:
        staging = self._shard.staging(self._member, run.model)
        if not is_private(staging):
            raise ProtocolError(f"payload for model {run.model}, whose values are in a window")
        return staging

    def _place_coded(self, coded: m.Coded) -> NDArray[np.uint8]:
        """Where the bytes of a codec go; their number is checked before there is memory for them."""
        self._private(coded)
        codec = parse_codec(self._shard.vectors[coded.model].spec.codec)
        here = self._within(coded)
        if codec is None or not 0 <= coded.size <= codec.size(coded.start, here.stop - here.start):
            raise ProtocolError(f"{coded.size} bytes of {codec} for {here.stop - here.start} elements")
        return np.empty(coded.size, dtype=np.uint8)

    def _decode(self, step: m.Step) -> None:
        """Have what came in a codec's bytes stand where gradients do."""
        received, self._coded = self._coded, []
        if len(received) != len(step.coded):
            raise ProtocolError("a step names what a codec made, but it did not come")
        for coded, data in received:
            codec = parse_codec(self._shard.vectors[coded.model].spec.codec)
            assert codec is not None
            decode(codec, data, coded.start, self._private(coded).gradients[self._within(coded)])

    def _within(self, run: m.Run | m.Coded) -> slice:
        vector = self._shard.vectors[run.model]
        if not vector.start <= run.start <= run.stop <= vector.stop:
            raise ProtocolError(
                f"payload for elements [{run.start}, {run.stop}), "
                f"this server has [{vector.start}, {vector.stop})"
            )
        return slice(run.start - vector.start, run.stop - vector.start)

    def _place_rows(self, message: m.Request, length: int) -> Arrays:
        """Where ids and gradients of rows go: nowhere, with a scratch window."""
        if self._scratch is not None:
            return []
        count = sum(max(rows.count, 0) for rows in rows_of(message))
        if _ID * count > length:
            raise ProtocolError(f"{type(message).__name__} names {count} rows in {length} bytes of payload")
        if isinstance(message, m.AssignRows) and length != count * (_ID + _ITEM * message.width):
            raise ProtocolError(f"{count} rows of {message.width} floats in {length} bytes of payload")
        self._received = [self._allocate(message, rows) for rows in rows_of(message)]
        pushed = _pushed(message)
        arrays: Arrays = []
        for number, staged in enumerate(self._received):
            arrays.append(staged.ids)
            if number < pushed:
                arrays.append(self._place_gradients(message, number, staged))
        return arrays

    def _place_gradients(self, message: m.Request, number: int, staged: StagedRows) -> NDArray[Any]:
        codec = parse_row_codec(self._shard.tables[staged.table].spec.codec)
        if codec is None or not isinstance(message, m.Step):
            return staged.rows
        size = len(staged.ids) * codec.row_size(staged.rows.shape[1])
        data = self._coded_rows[number] = np.empty(size, dtype=np.uint8)
        return data

    def _decode_rows(self) -> None:
        coded, self._coded_rows = self._coded_rows, {}
        for number, data in coded.items():
            staged = self._received[number]
            codec = parse_row_codec(self._shard.tables[staged.table].spec.codec)
            assert codec is not None
            decode_rows(codec, data, staged.rows)

    # ── once the message is here ────────────────────────────────────────────────────────────────

    def unpack(self, message: m.AnyMessage, given: Given) -> Brought:
        """What came with `message`; takes what it uses out of `given`.

        Raises:
            ProtocolError: the window is not what the message says, there is no such model or table, memory
                lies outside of the scratch window, or ids did not come.
            EnvironmentFailure: the system would not map it.
        """
        kind = type(message)
        if kind is m.Pull and not given:  # the way of every pull
            self._pulled = ()
            return _NOTHING
        if kind is m.PullRows and not given:
            return Brought(rows=self._rows(message))  # type: ignore[arg-type]
        if type(message) is m.Step and not given:  # the way of every step
            compile_for(message)
            self._decode(message)
            if not message.pushed and not message.pulled:
                self._pulled = ()
                return _NOTHING
            return Brought(rows=self._rows(message))
        if not isinstance(message, m.Register | m.RegisterTable):  # these say what they wait for
            compile_for(message)
        if isinstance(message, m.Register | m.Attach | m.Renew):
            try:
                return Brought(self._staging(message, given))
            except UsageError as error:
                return Brought(failure=error)
        if isinstance(message, m.Scratch):
            self._scratch = self._memory.scratch(given, message.window.size)
            return _NOTHING
        if given:
            raise ProtocolError(f"{type(message).__name__} came with a descriptor, expected none")
        if isinstance(message, m.LoadState):
            return Brought(self._loaded(message))
        if isinstance(message, m.PullRows | m.DeleteRows | m.AssignRows):
            return Brought(rows=self._rows(message))
        self._pulled = ()
        return _NOTHING

    def _staging(self, message: m.Register | m.Attach | m.Renew, given: Given) -> Staging | None:
        if isinstance(message, m.Register):
            layout = Layout(message.spec.tensors)
        else:
            layout = self._layout_of(message.model)
        start, stop = self._shard.range_of(layout)
        self._pulled = ()
        if message.window is not None:
            return self._memory.window(given, message.window.size, layout.elements, start, stop)
        if given:
            raise ProtocolError(f"{type(message).__name__} without a window came with a descriptor")
        if isinstance(message, m.Renew):
            return self._renewed(message.model, stop - start)
        initial, self._initial = self._initial, None
        if initial is None or len(initial) != stop - start:
            initial = np.zeros(stop - start, dtype=np.float32)
        return Staging(initial, initial)

    def _renewed(self, model: int, length: int) -> Staging | None:
        """A private buffer for a member that connected anew; None where it has one, which stays."""
        old = self._shard.stagings(self._member).get(model)
        if old is None:
            initial = np.zeros(length, dtype=np.float32)
        elif is_private(old):
            return None
        else:
            initial = self._shard.staged(self._member, model).copy()
        return Staging(initial, initial)

    def _loaded(self, message: m.LoadState) -> Staging:
        state, self._state = self._state, None
        self._pulled = ()
        if state is None or len(state) != self._state_length(message):
            if self._state_length(message):
                raise ProtocolError(f"{type(message).__name__} came without its states")
            state = np.empty(0, dtype=np.float32)
        return Staging(state, state)

    def _layout_of(self, model: int) -> Layout:
        vector = self._shard.vectors.get(model)
        if vector is None:
            raise ProtocolError(f"there is no model {model}, known are {sorted(self._shard.vectors)}")
        return vector.layout

    def _rows(self, message: m.Step | m.PullRows | m.DeleteRows | m.AssignRows) -> Sequence[StagedRows]:
        """The ids and the memory of each of the message's rows, in its order."""
        rows = list(rows_of(message))
        if self._scratch is not None:
            staged = [self._mapped(self._scratch, message, one) for one in rows]
        else:
            self._decode_rows()
            staged, self._received = self._received, []
            if len(staged) != len(rows):
                if any(one.count for one in rows):
                    raise ProtocolError(f"{type(message).__name__} names rows, but no ids came with it")
                staged = [self._allocate(message, one) for one in rows]
        self._pulled = staged[_pushed(message) :] if isinstance(message, m.Step | m.PullRows) else []
        return staged

    def _allocate(self, message: m.Request, rows: m.Rows) -> StagedRows:
        width = self._width(message, rows)
        ids, memory = np.empty(rows.count, dtype=np.int64), np.empty((rows.count, width), dtype=np.float32)
        return StagedRows(rows.table, ids, memory)

    def _mapped(self, scratch: ScratchPart, message: m.Request, rows: m.Rows) -> StagedRows:
        width = self._width(message, rows)
        ids = scratch(rows.ids, _ID * rows.count).view(np.int64).copy()
        memory = scratch(rows.rows, _ITEM * width * rows.count).view(np.float32)
        return StagedRows(rows.table, ids, memory.reshape(rows.count, width))

    def _width(self, message: m.Request, rows: m.Rows) -> int:
        """Floats of each of the rows."""
        if rows.count < 0:
            raise ProtocolError(f"{rows.count} rows of table {rows.table}")
        table = self._shard.tables[rows.table]
        if not isinstance(message, m.AssignRows):
            return table.spec.dim
        if message.width != table.width_of(message.state):
            raise ProtocolError(f"rows of {message.width} floats, expected {table.width_of(message.state)}")
        return message.width

    # ── when the exchange is answered ───────────────────────────────────────────────────────────

    def payload(self, answer: m.Answer) -> Arrays:
        """What follows `answer`: arrays made for it, or values of models without a window, then rows.

        The arrays stay as they are until the member's next exchange.
        """
        pulled, self._pulled = self._pulled, ()
        if answer.failure is not None:
            return []
        arrays = self._shard.take_copies(self._member)
        for model in answer.values:
            staging = self._shard.staging(self._member, model)
            if is_private(staging):
                arrays.append(self._values(model, staging.parameters))
        if self._scratch is None:
            arrays += [one.rows for one in pulled]
        return arrays

    def _values(self, model: int, values: NDArray[np.float32]) -> NDArray[Any]:
        """This server's range of a model as it travels."""
        vector = self._shard.vectors[model]
        codec = None if self._exact else parse_values_codec(vector.spec.values_codec)
        return values if codec is None else encode(codec, values.copy(), vector.start, [len(values)])[0]


def is_private(staging: Staging) -> bool:
    """Whether values come and go as payload."""
    return staging.gradients is staging.parameters


def _pushed(message: m.AnyMessage) -> int:
    """How many of the rows bring values."""
    if isinstance(message, m.AssignRows):
        return 1
    return len(message.pushed) if isinstance(message, m.Step) else 0


def rows_of(message: m.AnyMessage) -> Iterator[m.Rows]:
    """All rows that a request names, pushed ones first."""
    if isinstance(message, m.Step):
        yield from message.pushed
        yield from message.pulled
    elif isinstance(message, m.PullRows):
        yield from message.rows
    elif isinstance(message, m.DeleteRows | m.AssignRows):
        yield message.rows
