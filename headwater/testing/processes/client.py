"""Members of a simulated cluster: what a worker or reader keeps, and the calls that its program can make.

A program is a generator: it yields the calls that a client's methods make, and is sent (or thrown) what came
of each. How calls travel is the business of `headwater.testing.processes.member`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels.arrange import arrange
from headwater.machines.client import ClientMachine
from headwater.machines.connections import Frame, Outgoing
from headwater.machines.exchange import AnyAnswer
from headwater.machines.model_buffer import ModelBuffer
from headwater.machines.row_buffer import RowBuffer, RowSlice
from headwater.machines.rows_ahead import RowsAhead
from headwater.spec.layout import Layout
from headwater.testing.processes.memory import ScratchArray, WindowArrays

Asked: TypeAlias = "Call | SendAhead | AwaitAnswer | Question | Rest | WriteNow"

Program: TypeAlias = Callable[["Client"], Generator[Asked, Any, Any]]
"""What a member does: given its client, yields calls."""

Floats: TypeAlias = NDArray[np.float32]


class Window:
    """A model as one client sees it, in memory that servers may have mapped.

    Attributes:
        memory: where it lies; `buffer`: what servers are told of it.
    """

    def __init__(self, machine: ClientMachine, spec: m.ModelSpec, shared: bool) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.memory = WindowArrays(self.layout.elements, shared)
        self.buffer = ModelBuffer(machine, spec, self.memory)

    @property
    def gradients(self) -> Floats:
        """float32[elements]."""
        return self.memory.gradients

    @property
    def parameters(self) -> Floats:
        """float32[elements]."""
        return self.memory.parameters

    @property
    def grads(self) -> dict[str, Floats]:
        """The gradients by tensor."""
        return self.layout.views(self.memory.gradients)

    @property
    def values(self) -> dict[str, Floats]:
        """The parameters by tensor."""
        return self.layout.views(self.memory.parameters)


@dataclass(eq=False)
class Call:
    """One exchange: the request, and what is not the same for all servers.

    Attributes:
        frame: given a server and the number: what it is sent; None: the request.
        place: where the payload of a server's answer goes; None: to the models whose values it is.
        brought: told of the answer of all servers.
        rows: the request refers to the member's scratch memory; `pulled`: (table, id) of rows it asks for.
        expects: the class of the answers.
    """

    request: m.Request | m.Compare | m.Store
    frame: Callable[[int, int], Outgoing] | None = None
    place: Callable[[int, Any], Sequence[Any]] | None = None
    brought: Callable[[m.Answer], None] | None = None
    rows: bool = False
    pulled: Sequence[tuple[int, int]] = ()
    expects: type[AnyAnswer] = m.Answer

    def __repr__(self) -> str:
        step = f" {self.request.step}" if isinstance(self.request, m.Step) else ""
        return f"{type(self.request).__name__}{step} (exchange {self.request.number})"


@dataclass(frozen=True)
class SendAhead:
    """Send this, and go on without its answer. The next exchange comes after `AwaitAnswer`."""

    call: Call


@dataclass(frozen=True)
class AwaitAnswer:
    """Wait for the answer to what was begun."""


@dataclass(frozen=True)
class Rest:
    """Do nothing for a while."""


@dataclass(frozen=True)
class WriteNow:
    """Have the cluster write a checkpoint; its path, once it is on disk."""


@dataclass(frozen=True)
class Question:
    """To the coordinator; its answer is Leased or Unleased. `lease` None: to wait on, when told to."""

    lease: m.Lease | None = None


class Client:
    """One member: its counters and the calls it can make.

    Attributes:
        machine: what decides for it.
        id: of its membership, 0 before it has one; rank: -1 for readers.
        number, steps, version: of the last exchange, step and answer; meetings: begun so far.
        windows: its models, by id; tables: dim of each table, by id.
        rows: what was last pulled, by (table, id). ahead: by table, rows that came before they were asked
            for.
        recorded: where the log had its rank, when it joined.
        late_steps: those whose gradients the next step carries again.
        memory: where rows lie on their way; `scratch`: what servers are told of it.
        said: by step, the gradients of a model with a codec as its bytes stand for them.
    """

    def __init__(self, machine: ClientMachine, *, shares: bool) -> None:
        self.id = 0
        self.rank = -1
        self.number = self.steps = self.version = self.meetings = 0
        self.windows: dict[int, Window] = {}
        self.tables: dict[int, int] = {}
        self.rows: dict[tuple[int, int], Floats] = {}
        self.ahead: dict[int, RowsAhead] = {}
        self.recorded: m.Position | None = None
        self._shares = shares
        self._staged: dict[int, set[str]] = {}
        self._staged_rows: dict[int, RowSlice] = {}
        self.late_steps: tuple[int, ...] = ()
        self.said: dict[int, Floats] = {}
        self.use(machine)

    def use(self, machine: ClientMachine) -> None:
        """Have this machine decide; it knows no models and tables yet."""
        self.machine = machine
        self.memory = ScratchArray(self._shares)
        self.scratch = RowBuffer(machine, self.memory)

    @property
    def is_declared(self) -> bool:
        """Whether there is a model to read; after everything has begun anew there may be none yet."""
        return True

    # ── calls to yield ──────────────────────────────────────────────────────────────────────────

    def register(self, spec: m.ModelSpec, value: float = 0.0) -> Call:
        """Declare a model, with `value` everywhere."""
        window = Window(self.machine, spec, self._shares)
        for view in window.values.values():
            view[...] = value
        return self._declare(m.Register(self._next(), spec, None), window, window.buffer.register)

    def attach(self, info: m.ModelInfo) -> Call:
        """Read a model that others have declared."""
        window = Window(self.machine, info.spec, self._shares)
        frame = partial(window.buffer.attach, info.model)
        return self._declare(m.Attach(self._next(), info.model, None), window, frame)

    def _declare(self, request: m.Request, window: Window, frame: Callable[[int, int], Outgoing]) -> Call:
        def brought(answer: m.Answer) -> None:
            assert answer.model is not None
            window.buffer.registered(answer.model)
            self.windows[answer.model] = window

        window.buffer.open()
        return Call(request, frame, lambda server, _: window.buffer.incoming(server), brought)

    def register_table(self, spec: m.TableSpec) -> Call:
        """Declare a table."""

        def brought(answer: m.Answer) -> None:
            assert answer.table is not None
            self.tables[answer.table] = spec.dim

        return Call(m.RegisterTable(self._next(), spec), brought=brought)

    def step(
        self,
        *,
        read: bool | tuple[int, ...] = True,
        settings: Iterable[m.Setting] = (),
        step: int | None = None,
        position: m.Position | None = None,
        weight: float = 1.0,
        pace: m.Pace | None = None,
        fragment: int = -1,
        kept: bytes | None = None,
    ) -> Call:
        """What was pushed leaves; `step` other than the next one is a repeat, or an error."""
        if step is None:
            self.steps += 1
        carried = {id: self.windows[id].layout.mask(names) for id, names in self._staged.items()}
        pushed, self._staged_rows = self._staged_rows, {}
        places = {
            table: self.scratch.take(plan, self.tables[table])
            for table, ahead in self.ahead.items()
            if (plan := ahead.leaves()) is not None
        }
        self._staged = {}
        for id, mask in carried.items():
            self.windows[id].buffer.take(mask)
            if self.windows[id].spec.codec is not None:
                self.said[step or self.steps] = self.windows[id].gradients.copy()
        request = m.Step(
            self._next(),
            step or self.steps,
            self.version,
            tuple(m.Carried(id, mask) for id, mask in carried.items()),
            tuple(settings),
            read,
            position=position,
            weight=weight,
            pace=pace,
            fragment=fragment,
            kept=kept,
        )

        def frame(server: int, number: int) -> Outgoing:
            staged = [self.windows[id].buffer.staged(mask, server) for id, mask in carried.items()]
            coded = [self.windows[id].buffer.coded(server) for id in carried]
            arrays: list[Any] = [array for _, arrays in (*staged, *coded) for array in arrays]
            for place in pushed.values():
                arrays += self.scratch.outgoing(place, server, rows=True)
            for place in places.values():
                arrays += self.scratch.outgoing(place, server, rows=False)
            message = msgspec.structs.replace(
                request,
                payload=tuple(run for runs, _ in staged for run in runs),
                coded=tuple(piece for pieces, _ in coded for piece in pieces),
                pushed=tuple(self.scratch.part(place, table, server) for table, place in pushed.items()),
                pulled=tuple(self.scratch.part(place, table, server) for table, place in places.items()),
            )
            return Frame(message, arrays)

        def place(server: int, answer: m.Answer) -> list[Any]:
            values = self.machine.values(server, answer)
            return [*values, *self.scratch.incoming(list(places.values()), server)]

        def brought(answer: m.Answer) -> None:
            self._read_rows(places)
            for table, place in places.items():
                self.ahead[table].brought(place.plan, self.scratch.rows(place).copy(), answer.version)
            self.scratch.reset()

        return Call(request, frame, place, brought, bool(pushed or places), _wanted(places))

    def prefetch(self, table: int, ids: NDArray[np.int64]) -> None:
        """Have the next step bring these rows."""
        self.ahead.setdefault(table, RowsAhead()).want(ids, arrange(ids, self.machine.servers))

    def read_ahead(self, table: int, ids: NDArray[np.int64]) -> bool:
        """Whether rows that came ahead may be read; they are in `rows` then. Else they are to be pulled."""
        kept = self.ahead.setdefault(table, RowsAhead())
        kept.asked(ids)
        ahead = kept.take(ids, self.version)
        if ahead is not None:
            ids = ahead.plan.ids
            self.rows.update({(table, int(id)): row for id, row in zip(ids, ahead.rows, strict=True)})
        return ahead is not None

    def _taken(self, table: int, ids: NDArray[np.int64]) -> RowSlice:
        return self.scratch.take(arrange(ids, self.machine.servers), self.tables[table])

    def _read_rows(self, places: Mapping[int, RowSlice]) -> None:
        for table, place in places.items():
            rows = self.scratch.rows(place).copy()
            self.rows.update({(table, int(id)): row for id, row in zip(place.plan.ids, rows, strict=True)})

    def pull_rows(self, wanted: Mapping[int, NDArray[np.int64]]) -> Call:
        """Read rows of tables together, to `rows`."""
        used = self.scratch.used
        places = {table: self._taken(table, ids) for table, ids in wanted.items()}
        number = self._next()

        def frame(server: int, _: int) -> Outgoing:
            parts = tuple(self.scratch.part(place, table, server) for table, place in places.items())
            sent = (self.scratch.outgoing(place, server, rows=False) for place in places.values())
            return Frame(m.PullRows(number, parts), [array for arrays in sent for array in arrays])

        def brought(answer: m.Answer) -> None:
            self._read_rows(places)
            self.scratch.reset(used)

        return Call(
            m.PullRows(number, ()),
            frame,
            lambda server, _: self.scratch.incoming(list(places.values()), server),
            brought,
            rows=True,
            pulled=_wanted(places),
        )

    def delete_rows(self, table: int, ids: NDArray[np.int64]) -> Call:
        """Forget ids; each server says of how many there was a row."""
        used, numbers = self.scratch.used, np.zeros(self.machine.servers, np.int64)
        place = self._taken(table, ids)
        request = m.DeleteRows(self._next(), m.Rows(table, len(place.plan.ids), 0, 0))

        def frame(server: int, _: int) -> Outgoing:
            part = self.scratch.part(place, table, server)
            arrays = self.scratch.outgoing(place, server, rows=False)
            return Frame(msgspec.structs.replace(request, rows=part), arrays)

        return Call(
            request,
            frame,
            lambda server, _: [numbers[server : server + 1]],
            lambda answer: self.scratch.reset(used),
            rows=True,
        )

    def pull(self, *models: int, have: int = -1) -> Call:
        """Read models, all by default."""
        return Call(m.Pull(self._next(), models or tuple(self.windows), have))

    def state(self, model: int = 0) -> Call:
        """Read a rule's state."""
        window = self.windows[model]
        vectors: dict[str, Floats] = {}

        def place(server: int, answer: m.Answer) -> list[Any]:
            for name in answer.states:
                vectors.setdefault(name, np.zeros(window.layout.elements, np.float32))
            return window.buffer.vectors(server, [vectors[name] for name in answer.states])

        return Call(m.ReadState(self._next(), model), place=place)

    def assign(self, model: int = 0, **values: float) -> Call:
        """Set tensors of a model."""
        window = self.windows[model]
        for name, value in values.items():
            window.values[name][...] = value
        carried = m.Carried(model, window.layout.mask(values))
        return Call(m.Assign(self._next(), carried), partial(window.buffer.assign, carried, None))

    def recall(self) -> Call:
        """What does the log know of its rank?"""
        return Call(m.Recall(self._next()))

    def verify(self) -> Call:
        """Have every server, and its standby, sum up what it is then."""
        return Call(m.Verify(self._next()))

    def compare(self) -> Call:
        """What did they come to?"""
        return Call(m.Compare(self._next()), expects=m.Compared)

    def barrier(self) -> Call:
        """Wait for everybody."""
        return Call(m.Meet(self._next(), self._meeting("barrier"), {}))

    def sum(self, **values: float) -> Call:
        """Add numbers over everybody."""
        return Call(m.Meet(self._next(), self._meeting("sum", tuple(values)), values))

    def _meeting(self, kind: m.MeetingKind, names: tuple[str, ...] = ()) -> m.Meeting:
        self.meetings += 1
        return m.Meeting(self.meetings, kind, names)

    def end(self, position: m.Position | None = None) -> Call:
        """Its batches are over."""
        return Call(m.End(self._next(), position))

    def stop(self) -> Call:
        """Everybody's batches are to end."""
        return Call(m.Stop(self._next()))

    def leave(self) -> Call:
        """Go for good."""
        return Call(m.Leave(self._next()))

    def checkpoint(self, at: int = 0) -> Call:
        """Have every server take a snapshot, at this version or later."""
        return Call(m.Checkpoint(self._next(), at))

    def store(self, directory: str, generation: int, version: int) -> Call:
        """Have every server write its part of a checkpoint."""
        return Call(m.Store(self._next(), directory, generation, version), expects=m.Stored)

    def lease(self, call: int, epochs: int, size: int, batch: int, pending: int) -> Question:
        """Ask for the next split of a call that all workers make."""
        number = self.machine.splits.next_number
        return Question(m.Lease(number, call, epochs, size, False, 0, batch, pending))

    # ── what a program does between calls ───────────────────────────────────────────────────────

    def push(
        self, value: float | Floats | Mapping[str, Any], names: Sequence[str] | None = None, model: int = 0
    ) -> None:
        """Stage `value` for the named tensors (all by default)."""
        window = self.windows[model]
        for name in window.layout.index if names is None else names:
            window.grads[name][...] = value[name] if isinstance(value, Mapping) else value
            self.carry(name, model)

    def carry(self, name: str, model: int = 0) -> None:
        """What lies in the gradients of this tensor is staged."""
        self._staged.setdefault(model, set()).add(name)

    def push_rows(self, ids: Sequence[int], value: float | Floats, table: int = 0) -> None:
        """Stage `value` for these rows, each once: for each element, or float32[n, dim]."""
        place = self._staged_rows[table] = self._taken(table, np.array(ids, np.int64))
        rows = np.broadcast_to(np.asarray(value, np.float32), (len(ids), self.tables[table]))
        place.plan.combine(np.ascontiguousarray(rows), self.scratch.rows(place))

    def read(self, model: int = 0) -> float:
        """The one value that all elements of a model have, on every server."""
        values = {float(x) for view in self.windows[model].values.values() for x in np.unique(view)}
        assert len(values) == 1, f"client {self.rank} reads a mixture of {sorted(values)[:5]}"
        return values.pop()

    def next_number(self) -> int:
        """Of an exchange that is made elsewhere; it must be made next."""
        return self._next()

    def _next(self) -> int:
        self.number += 1
        return self.number


def _wanted(places: Mapping[int, RowSlice]) -> list[tuple[int, int]]:
    return [(table, int(id)) for table, place in places.items() for id in place.plan.ids]
