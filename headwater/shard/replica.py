"""What of an entry's effect does not follow from the log: as members have it, or collected for a standby.

A server without a standby reads it from its members' memory while it processes the entry (`LiveInputs`).
One with a
standby collects it beforehand (`MaterializedEntry`): requests, reduced gradients, initial and assigned
values, ids.
Both then process the entry from that, in the same way, so they end with the same bits.

Invariant: nothing collected depends on entries before it that are not applied yet, because a member is
answered, and goes on, only when its entry is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels.combinations import Combination, combine
from headwater.log.state import tickets_of
from headwater.shard.merges import CommitMerges
from headwater.shard.named_vectors import BroughtGradients
from headwater.shard.outstanding import Members
from headwater.shard.staging import Array, Staging, Update
from headwater.shard.tables import Pushed, StagedRows, Tables
from headwater.shard.vector import Vector
from headwater.shard.vector_work import gathered
from headwater.spec.sync import Reduce

Room: TypeAlias = Callable[[int], NDArray[np.uint8]]
"""Gives so many bytes, contiguous, at a multiple of 8: for an array that stays until its entry is applied."""

Steps: TypeAlias = Sequence[tuple[m.ExchangeId, m.Step]]
Meetings: TypeAlias = Sequence[tuple[m.ExchangeId, m.Meet]]


def own_memory(size: int) -> NDArray[np.uint8]:
    """Room in this process's own memory."""
    return np.empty(-(-size // 8), dtype=np.int64).view(np.uint8)[:size]


class EntryInputs(Protocol):
    """Where an entry's processing finds what the log does not say; the methods fit the kinds of entries.

    Attributes:
        summed: gradients are merged already, but for the divisor.
    """

    @property
    def summed(self) -> bool: ...

    def request(self, ticket: m.ExchangeId) -> m.Request:
        """The request that an entry names."""

    def updates(self, model: int, vector: Vector, steps: Steps) -> list[Update]:
        """Gradients of a model, to be added up in this order."""

    def pushed(self, steps: Steps) -> Pushed:
        """Gradients of rows, to be added up in this order."""

    def gathered(self, work: m.VectorWork, requests: Meetings) -> BroughtGradients:
        """The gradients that work on vectors gathers."""

    def gradient(self, ticket: m.ExchangeId, model: int) -> Array:
        """Of a portion that a member has computed."""

    def initial(self, ticket: m.ExchangeId) -> Array:
        """Initial values of this server's range of a model."""

    def assigned(self, ticket: m.ExchangeId, model: int) -> Staging:
        """Where what is assigned to a model is: values, or its states one after the other."""

    def named_rows(self, ticket: m.ExchangeId) -> StagedRows:
        """The ids to be deleted, or the rows to be assigned."""


class LiveInputs:
    """Inputs as members have them now."""

    summed = False

    def __init__(self, members: Members) -> None:
        self._members = members

    def request(self, ticket: m.ExchangeId) -> m.Request:
        """As it is held."""
        return self._members.of(ticket).request

    def step(self, ticket: m.ExchangeId) -> m.Step:
        """As it is held."""
        request = self.request(ticket)
        assert isinstance(request, m.Step)
        return request

    def updates(self, model: int, vector: Vector, steps: Steps) -> list[Update]:
        """Each member's, from its window."""
        return [
            Update(self._members.staging(ticket.member, model), vector.layout.unmask(carried.tensors), place)
            for place, (ticket, step) in enumerate(steps)
            for carried in step.carried
            if carried.model == model and any(carried.tensors)
        ]

    def pushed(self, steps: Steps) -> Pushed:
        """Each member's."""
        return [
            (place, self._members.of(ticket).pushed())
            for place, (ticket, step) in enumerate(steps)
            if step.pushed
        ]

    def meet(self, ticket: m.ExchangeId) -> m.Meet:
        """As it is held."""
        request = self.request(ticket)
        assert isinstance(request, m.Meet)
        return request

    def gathered(self, work: m.VectorWork, requests: Meetings) -> BroughtGradients:
        """Each member's, from its window."""
        staged = [self._members.staging(ticket.member, work.model).gradients for ticket, _ in requests]
        return gathered(work, [request for _, request in requests], staged)

    def gradient(self, ticket: m.ExchangeId, model: int) -> Array:
        """From its window."""
        return self._members.staging(ticket.member, model).gradients

    def initial(self, ticket: m.ExchangeId) -> Array:
        """From the member's parameters."""
        staging = self._members.of(ticket).staging
        assert staging is not None
        return staging.parameters

    def assigned(self, ticket: m.ExchangeId, model: int) -> Staging:
        """The member's parameters, or what came with its request."""
        exchange = self._members.of(ticket)
        if isinstance(exchange.request, m.LoadState):
            assert exchange.staging is not None
            return exchange.staging
        return self._members.staging(ticket.member, model)

    def named_rows(self, ticket: m.ExchangeId) -> StagedRows:
        """From the request."""
        (staged,) = self._members.of(ticket).rows
        return staged


@dataclass(frozen=True, slots=True, eq=False)
class MaterializedEntry:
    """An entry with its inputs. As a message: `inputs`, with `payload()` as its payload.

    `models`: this server's whole range of each of `inputs.models`, float32; `tables`: the rows of each of
    `inputs.tables`; `blobs`: uint8, of each of `inputs.blobs`. The arrays must stay as they are until the
    entry was applied.
    """

    inputs: m.EntryInputs
    models: tuple[Array, ...] = ()
    tables: tuple[StagedRows, ...] = ()
    blobs: tuple[NDArray[np.uint8], ...] = ()
    summed: ClassVar[bool] = True

    def payload(self) -> list[NDArray[Any]]:
        """The arrays in the order in which they travel."""
        rows = [array for staged in self.tables for array in (staged.ids, staged.rows)]
        return [array for array in (*self.models, *rows, *self.blobs) if array.size]

    def request(self, ticket: m.ExchangeId) -> m.Request:
        """As it was held."""
        request = next(request for member, request in self.inputs.requests if member == ticket.member)
        for (member, field, _), blob in zip(self.inputs.blobs, self.blobs, strict=True):
            if member == ticket.member:
                request = msgspec.structs.replace(request, **{field: blob.tobytes()})
        return request

    def updates(self, model: int, vector: Vector, steps: Steps) -> list[Update]:
        """One, the sum of all."""
        if all(model != present for present, _ in self.inputs.models):
            return []
        masks = [
            vector.layout.unmask(carried.tensors)
            for _, step in steps
            for carried in step.carried
            if carried.model == model
        ]
        return [Update(self._staging(model), np.logical_or.reduce(masks, axis=0))]

    def pushed(self, steps: Steps) -> Pushed:
        """One, the sum of all."""
        return [(0, self.tables)]

    def gathered(self, work: m.VectorWork, requests: Meetings) -> BroughtGradients:
        """One, which is gathered already."""
        return BroughtGradients(self.models, [1.0] * len(self.models))

    def gradient(self, ticket: m.ExchangeId, model: int) -> Array:
        """As it was."""
        return self.models[0]

    def initial(self, ticket: m.ExchangeId) -> Array:
        """As they were."""
        return self._staging(INITIAL).parameters

    def assigned(self, ticket: m.ExchangeId, model: int) -> Staging:
        """As they were."""
        return self._staging(model)

    def named_rows(self, ticket: m.ExchangeId) -> StagedRows:
        """As they were."""
        return self.tables[0]

    def _staging(self, model: int) -> Staging:
        array = next(
            array
            for (present, _), array in zip(self.inputs.models, self.models, strict=True)
            if present == model
        )
        return Staging(array, array)


INITIAL = -1
"""Stands in `m.EntryInputs.models` for a model that has no id yet."""


def arriving(inputs: m.EntryInputs, room: Room = own_memory) -> MaterializedEntry:
    """A Resolved with room for the payload that follows `inputs`: its `payload()` is to be received into."""
    return MaterializedEntry(
        inputs,
        tuple(_floats(room, elements) for _, elements in inputs.models),
        tuple(
            StagedRows(table, _ids(room, count), _floats(room, count, dim))
            for table, count, dim in inputs.tables
        ),
        tuple(room(size) for *_, size in inputs.blobs),
    )


def restamped(resolved: MaterializedEntry, term: int) -> MaterializedEntry:
    """The same as it is sent in another term."""
    inputs = msgspec.structs.replace(resolved.inputs, term=term)
    return MaterializedEntry(inputs, resolved.models, resolved.tables, resolved.blobs)


def owned(resolved: MaterializedEntry) -> MaterializedEntry:
    """The same in this process's own memory."""
    own = arriving(resolved.inputs)
    for mine, shared in zip(own.payload(), resolved.payload(), strict=True):
        mine[...] = shared
    return own


@dataclass(frozen=True, slots=True, eq=False)
class Uncommitted:
    """An entry that is not applied yet; `written`: the term of its sequencer; `resolved`: with a standby."""

    entry: m.AnyEntry
    written: int
    resolved: MaterializedEntry | None = None


class ReplicationProgress:
    """What a standby, which began with a snapshot of `position`, was sent, and how far it has that.

    Entries may be discarded after they were sent, and others be sent for their positions: those of a newer
    term. An acknowledgement of an older one does not count for them.

    Attributes:
        acknowledged: up to here it has every entry as it stands now.
    """

    def __init__(self, position: int) -> None:
        self.acknowledged = position
        self._open: deque[m.EntryInputs] = deque()

    def add(self, resolved: MaterializedEntry) -> None:
        """This was sent, after all others."""
        self._open.append(resolved.inputs)

    def acknowledge(self, term: int, position: int) -> None:
        """It has everything up to `position` that was sent in `term` or before."""
        while self._open and self._open[0].entry.position <= position and self._open[0].term <= term:
            self.acknowledged = self._open.popleft().entry.position

    def truncate(self, position: int) -> None:
        """Entries after `position` are discarded, there as here."""
        while self._open and self._open[-1].entry.position > position:
            self._open.pop()
        self.acknowledged = min(self.acknowledged, position)


class InputCollector:
    """Collects the inputs of entries on a server with a standby; reads members' memory, changes nothing."""

    def __init__(
        self, vectors: Mapping[int, Vector], tables: Tables, live: LiveInputs, reduce: Reduce
    ) -> None:
        self._vectors = vectors
        self._tables = tables
        self._live = live
        self._reduce = reduce

    def collect(self, entry: m.AnyEntry, term: int, written: int, room: Room) -> MaterializedEntry:
        """The entry with copies of all it needs, as it is sent in `term` and was written in `written`.

        Blocks for a pass over the gradients of a commit.
        """
        models: dict[int, Array] = {}
        tables: list[StagedRows] = []
        requests = tuple((ticket.member, self._live.request(ticket)) for ticket in tickets_of(entry))
        if isinstance(entry, m.Committed):
            steps = [(ticket, self._live.step(ticket)) for ticket in entry.updates]
            merges = CommitMerges([step for _, step in steps], entry.weights, self._reduce, entry.scales)
            models = self._reduced(steps, merges, room)
            rows = self._tables.reduce(self._live.pushed(steps), merges.rows)
            tables = [_copy(staged, room) for staged in rows]
        elif isinstance(entry, m.Registered) and isinstance(requests[0][1], m.Register):
            models[INITIAL] = _fill(room, self._live.initial(entry.source))
        elif isinstance(entry, m.Assigned) and isinstance(requests[0][1], m.Assign | m.LoadState):
            model = requests[0][1].carried.model
            models[model] = _fill(room, self._live.assigned(entry.source, model).parameters)
        elif isinstance(entry, m.Counted):
            model = entry.done.portion.model
            models[model] = _fill(room, self._live.gradient(entry.source, model))
        elif isinstance(entry, m.Met):
            models = self._gathered([(ticket, self._live.meet(ticket)) for ticket in entry.tickets], room)
        elif isinstance(entry, m.Assigned):
            staged = self._live.named_rows(entry.source)
            values = staged.rows if isinstance(requests[0][1], m.AssignRows) else staged.rows[:, :0]
            tables = [_copy(StagedRows(staged.table, staged.ids, values), room)]
        blobs = [(member, field, blob) for member, request in requests for field, blob in _blobs(request)]
        inputs = m.EntryInputs(
            term,
            entry,
            tuple((member, _alone(request)) for member, request in requests),
            tuple((model, len(array)) for model, array in models.items()),
            tuple((staged.table, *staged.rows.shape) for staged in tables),
            written,
            tuple((member, field, len(blob)) for member, field, blob in blobs),
        )
        copies = tuple(_bytes(room, blob) for *_, blob in blobs)
        return MaterializedEntry(inputs, tuple(models.values()), tuple(tables), copies)

    def _gathered(self, requests: Meetings, room: Room) -> dict[int, Array]:
        work = requests[0][1].work
        if work is None or not work.gathers:
            return {}
        brought = self._live.gathered(work, requests)
        vector = self._vectors[work.model]
        out = _floats(room, vector.stop - vector.start)
        combine(len(out), [Combination(out, brought.gradients, brought.coefficients)], ())
        return {work.model: out}

    def _reduced(self, steps: Steps, merges: CommitMerges, room: Room) -> dict[int, Array]:
        reduced: dict[int, Array] = {}
        for model, vector in self._vectors.items():
            updates = self._live.updates(model, vector, steps)
            if updates:
                reduced[model] = _floats(room, vector.stop - vector.start)
                vector.reduce(updates, merges.of(model, vector.spec), reduced[model])
        return reduced


def _floats(room: Room, *shape: int) -> Array:
    return room(4 * int(np.prod(shape))).view(np.float32).reshape(shape)


def _ids(room: Room, count: int) -> NDArray[np.int64]:
    return room(8 * count).view(np.int64)


def _fill(room: Room, values: Array) -> Array:
    copy = _floats(room, *values.shape)
    copy[...] = values
    return copy


def _copy(staged: StagedRows, room: Room) -> StagedRows:
    ids = _ids(room, len(staged.ids))
    ids[:] = staged.ids
    return StagedRows(staged.table, ids, _fill(room, staged.rows))


def _bytes(room: Room, blob: bytes) -> NDArray[np.uint8]:
    copy = room(len(blob))
    copy[:] = np.frombuffer(blob, np.uint8)
    return copy


def _blobs(request: m.Request) -> Iterator[tuple[Literal["kept", "data"], bytes]]:
    """What of a request may be so long that many of them do not fit into one header."""
    if isinstance(request, m.Step | m.Meet | m.End | m.Leave) and request.kept:
        yield "kept", request.kept
    if isinstance(request, m.Meet) and request.data:
        yield "data", request.data


def _alone(request: m.Request) -> m.Request:
    """The request without what travels beside it."""
    changes: dict[str, Any] = {field: b"" for field, _ in _blobs(request)}
    if isinstance(request, m.Step | m.Assign | m.Meet | m.NextPortion) and request.payload:
        changes["payload"] = ()
    if isinstance(request, m.Step) and request.coded:
        changes["coded"] = ()
    return msgspec.structs.replace(request, **changes) if changes else request
