"""Members of a simulated cluster: what a worker or reader keeps, and the calls that its program can make.

A program is a generator: it yields the calls that a client's methods make, and is sent (or thrown) what came
of each. How calls travel is the business of `headwater.testing.processes.member`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.spec.layout import Layout

Program: TypeAlias = Callable[["Client"], Generator["Call | Question", Any, Any]]
"""What a member does: given its client, yields calls."""

Rows: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]
"""int64[n] ids, each once, and float32[n, dim]."""

Floats: TypeAlias = NDArray[np.float32]


class Window:
    """A model as one client sees it, in memory that servers may have mapped.

    Attributes:
        gradients, parameters: float32[elements]; grads, values: the same by tensor.
        generation: counts `renew`.
        id: of the model; -1 until it is known.
    """

    def __init__(self, spec: m.ModelSpec) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.id = -1
        self.generation = 0
        self._adopt(*(np.zeros(self.layout.elements, np.float32) for _ in range(2)))

    def _adopt(self, gradients: Floats, parameters: Floats) -> None:
        self.gradients, self.parameters = gradients, parameters
        self.grads = self.layout.views(gradients)
        self.values = self.layout.views(parameters)

    def renew(self) -> None:
        """Go on in memory with the same content; who has mapped the old keeps that."""
        self._adopt(self.gradients.copy(), self.parameters.copy())
        self.generation += 1


@dataclass(eq=False)
class Call:
    """One exchange: the request, the window that comes into use with it, and what of others travels."""

    request: m.Request
    window: Window | None = None
    models: tuple[int, ...] = ()
    pushed: dict[int, Rows] = field(default_factory=dict)
    pulled: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __repr__(self) -> str:
        step = f" {self.request.step}" if isinstance(self.request, m.Step) else ""
        return f"{type(self.request).__name__}{step} (exchange {self.request.number})"


@dataclass(frozen=True)
class Question:
    """To the coordinator; its answer is Leased or Unleased. `lease` None: to wait on, when told to."""

    lease: m.Lease | None = None


class Client:
    """One member: its counters and the calls it can make.

    Attributes:
        id: of its membership, 0 before it has one; rank: -1 for readers.
        number, steps, version: of the last exchange, step and answer; meetings: begun so far.
        windows: its models, by id; tables: dim of each table, by id.
        rows: what was last pulled, by (table, id).
        place: where the log recorded its rank, when it joined.
        late_steps: those whose gradients the next step carries again.
    """

    def __init__(self, *, shares: bool) -> None:
        self.id = 0
        self.rank = -1
        self.number = self.steps = self.version = self.meetings = 0
        self.windows: dict[int, Window] = {}
        self.tables: dict[int, int] = {}
        self.rows: dict[tuple[int, int], Floats] = {}
        self.place: m.Position | None = None
        self._shares = shares
        self._staged: dict[int, set[str]] = {}
        self._staged_rows: dict[int, Rows] = {}
        self.late_steps: tuple[int, ...] = ()
        self._questions = 0

    # ── calls to yield ──────────────────────────────────────────────────────────────────────────

    def register(self, spec: m.ModelSpec, value: float = 0.0) -> Call:
        """Declare a model, with `value` everywhere."""
        window = Window(spec)
        for view in window.values.values():
            view[...] = value
        return Call(m.Register(self._next(), spec, self._offer()), window)

    def attach(self, info: m.ModelInfo) -> Call:
        """Read a model that others have declared."""
        return Call(m.Attach(self._next(), info.model, self._offer()), Window(info.spec))

    def register_table(self, spec: m.TableSpec) -> Call:
        """Declare a table."""
        return Call(m.RegisterTable(self._next(), spec))

    def step(
        self,
        *,
        read: bool | tuple[int, ...] = True,
        settings: Iterable[m.Setting] = (),
        step: int | None = None,
        pulled: Mapping[int, NDArray[np.int64]] | None = None,
        position: m.Position | None = None,
        weight: float = 1.0,
    ) -> Call:
        """What was pushed leaves; `step` other than the next one is a repeat, or an error.

        `pulled`: by table the ids whose rows come with the answer, to `rows`.
        """
        if step is None:
            self.steps += 1
        carried = {id: self.windows[id].layout.mask(names) for id, names in self._staged.items()}
        self._staged = {}
        request = m.Step(
            self._next(),
            step or self.steps,
            self.version,
            tuple(m.Carried(id, mask) for id, mask in carried.items()),
            tuple(settings),
            read,
            position=position,
            weight=weight,
        )
        pushed, self._staged_rows = self._staged_rows, {}
        return Call(request, None, tuple(carried), pushed, dict(pulled or {}))

    def pull(self, *models: int, have: int = -1) -> Call:
        """Read models, all by default."""
        return Call(m.Pull(self._next(), models or tuple(self.windows), have))

    def state(self, model: int = 0) -> Call:
        """Read a rule's state."""
        return Call(m.ReadState(self._next(), model))

    def assign(self, model: int = 0, **values: float) -> Call:
        """Set tensors of a model."""
        window = self.windows[model]
        for name, value in values.items():
            window.values[name][...] = value
        carried = m.Carried(model, window.layout.mask(values))
        return Call(m.Assign(self._next(), carried), None, (model,))

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

    def checkpoint(self) -> Call:
        """Have every server take a snapshot."""
        return Call(m.Checkpoint(self._next()))

    def lease(self, call: int, epochs: int, size: int, batch: int, pending: int) -> Question:
        """Ask for the next split of a call that all workers make."""
        self._questions += 1
        return Question(m.Lease(self._questions, call, epochs, size, False, 0, batch, pending))

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

    def push_rows(self, ids: Sequence[int], value: float, table: int = 0) -> None:
        """Stage `value` for each element of these rows."""
        rows = np.full((len(ids), self.tables[table]), value, np.float32)
        self._staged_rows[table] = np.array(ids, np.int64), rows

    def read(self, model: int = 0) -> float:
        """The one value that all elements of a model have, on every server."""
        values = {float(x) for view in self.windows[model].values.values() for x in np.unique(view)}
        assert len(values) == 1, f"client {self.rank} reads a mixture of {sorted(values)[:5]}"
        return values.pop()

    def _offer(self) -> m.WindowSpec | None:
        return m.WindowSpec(0, 0) if self._shares else None

    def _next(self) -> int:
        self.number += 1
        return self.number
