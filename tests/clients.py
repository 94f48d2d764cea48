"""Members as the simulated clusters have them: what a worker or reader keeps, and the calls it can make.

A client is a generator: it yields the calls that its methods make and is sent (or thrown) what came of each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headwater import messages as m
from headwater.exchange import Exchange
from headwater.layout import Layout
from headwater.rules import Accumulate, Rule

Program = Callable[["Client"], Generator[Any, Any, Any]]

Rows = tuple[np.ndarray, np.ndarray]
"""int64[n] ids, each once, and float32[n, dim]."""

SHAPES = {"a": (3,), "b": (20, 75), "c": (4000,), "empty": (0, 4), "scalar": ()}
"""Six pages: five servers have some each, and no tensor but `a` starts where a range does."""


def model_spec(
    name="model", shapes=None, rule: Rule | None = None, rules=(), groups=None, clip_norm=None
) -> m.ModelSpec:
    rules = rules or (rule or Accumulate(),)
    tensors = [
        m.TensorSpec(tensor, tuple(shape), "float32", (groups or {}).get(tensor, 0))
        for tensor, shape in (shapes or SHAPES).items()
    ]
    return m.ModelSpec(name, tuple(tensors), tuple(rule.to_spec() for rule in rules), clip_norm)


@dataclass
class Mirror:
    """A model as one client sees it: its window, or its own arrays when values travel as payload."""

    spec: m.ModelSpec
    layout: Layout
    gradients: np.ndarray
    parameters: np.ndarray
    id: int = -1

    def __post_init__(self):
        self.grads = self.layout.views(self.gradients)
        self.values = self.layout.views(self.parameters)

    def renew(self):
        """A new window with the same content; the old one stays with whoever has it mapped."""
        self.gradients, self.parameters = self.gradients.copy(), self.parameters.copy()
        self.__post_init__()


@dataclass
class Call:
    """One exchange: the request, the mirror that comes into use with it, and what of others travels."""

    request: Any
    mirror: Mirror | None = None
    models: tuple[int, ...] = ()
    part: str = "gradients"
    pushed: dict[int, Rows] = field(default_factory=dict)
    pulled: dict[int, np.ndarray] = field(default_factory=dict)

    def __repr__(self):
        return f"{type(self.request).__name__} {self.request.number}"


class Client:
    """One member: its rank, its counters, and the calls it can make."""

    def __init__(self, cluster, member: m.Member, program: Program) -> None:
        self.cluster = cluster
        self.id, self.rank = member.id, member.index
        self.number = self.steps = self.version = self.attempt = 0
        self.models: dict[int, Mirror] = {}
        self.staged: dict[int, set[str]] = {}
        self.tables: dict[int, int] = {}
        self.staged_rows: dict[int, Rows] = {}
        self.rows: dict[tuple[int, int], np.ndarray] = {}
        self.call: Call | None = None
        self.exchange: Exchange | None = None
        self.outstanding = False
        self.connected: list[Any] = []
        self.program = program(self)
        self.outcome: Any = None
        self.value: Any = None
        self.ended = self.dead = False
        self.quiet: list[np.ndarray] = []

    # ── calls to yield ──────────────────────────────────────────────────────────────────────────

    def register(self, spec: m.ModelSpec | None = None, value: float = 0.0) -> Call:
        spec = spec or model_spec()
        mirror = self._mirror(spec)
        for view in mirror.values.values():
            view[...] = value
        return Call(m.Register(self._next(), spec, self._window()), mirror)

    def attach(self, info: m.ModelInfo) -> Call:
        return Call(m.Attach(self._next(), info.model, self._window()), self._mirror(info.spec))

    def register_table(self, spec: m.TableSpec) -> Call:
        return Call(m.RegisterTable(self._next(), spec))

    def step(self, *, read=True, settings=(), step=None, pulled=None) -> Call:
        """What was pushed leaves; `step` other than the next one is a repeat, or an error.

        `pulled`: by table the ids whose rows come with the answer, to `rows`.
        """
        if step is None:
            self.steps += 1
        carried = {id: self.models[id].layout.mask(names) for id, names in self.staged.items()}
        self.staged = {}
        request = m.Step(
            self._next(),
            step or self.steps,
            self.version,
            tuple(m.Carried(id, mask) for id, mask in carried.items()),
            tuple(settings),
            read,
        )
        pushed, self.staged_rows = self.staged_rows, {}
        return Call(request, None, tuple(carried), "gradients", pushed, pulled or {})

    def pull(self, *models: int, have=-1) -> Call:
        return Call(m.Pull(self._next(), models or tuple(self.models), have))

    def state(self, model: int = 0) -> Call:
        return Call(m.ReadState(self._next(), model))

    def assign(self, model: int = 0, **values: float) -> Call:
        mirror = self.models[model]
        for name, value in values.items():
            mirror.values[name][...] = value
        carried = m.Carried(model, mirror.layout.mask(values))
        return Call(m.Assign(self._next(), carried), None, (model,), "parameters")

    def barrier(self) -> Call:
        return Call(m.Meet(self._next(), "barrier", {}))

    def sum(self, **values: float) -> Call:
        return Call(m.Meet(self._next(), "sum", values))

    def end(self) -> Call:
        return Call(m.End(self._next()))

    def stop(self) -> Call:
        return Call(m.Stop(self._next()))

    def leave(self) -> Call:
        return Call(m.Leave(self._next()))

    def checkpoint(self) -> Call:
        return Call(m.Checkpoint(self._next()))

    # ── what a program does between calls ───────────────────────────────────────────────────────

    def push(self, value: float | np.ndarray, names=None, model: int = 0) -> None:
        """Stage `value` for the named tensors (all by default)."""
        mirror = self.models[model]
        for name in mirror.layout.index if names is None else names:
            mirror.grads[name][...] = value if np.isscalar(value) else value[name]
            self.staged.setdefault(model, set()).add(name)

    def push_rows(self, ids: list[int], value: float, table: int = 0) -> None:
        """Stage `value` for each element of these rows."""
        rows = np.full((len(ids), self.tables[table]), value, np.float32)
        self.staged_rows[table] = np.array(ids, np.int64), rows

    def read(self, model: int = 0) -> float:
        """The one value that all elements of a model have, on every server."""
        values = {float(x) for view in self.models[model].values.values() for x in np.unique(view)}
        assert len(values) == 1, f"client {self.rank} reads a mixture of {sorted(values)[:5]}"
        return values.pop()

    # ── for the cluster ─────────────────────────────────────────────────────────────────────────

    def mirrors(self) -> list[Mirror]:
        """Of all models, and of the one that its call is about to bring."""
        new = [self.call.mirror] if self.outstanding and self.call.mirror else []
        return [*self.models.values(), *(mirror for mirror in new if mirror.id not in self.models)]

    def memory(self) -> list[np.ndarray]:
        return [array for model in self.models.values() for array in (model.gradients, model.parameters)]

    def leaves(self) -> bool:
        """Whether its last call is its end."""
        return self.call is not None and isinstance(self.call.request, m.Leave)

    def _mirror(self, spec: m.ModelSpec) -> Mirror:
        layout = Layout(spec.tensors)
        return Mirror(spec, layout, *(np.zeros(layout.elements, np.float32) for _ in range(2)))

    def _window(self) -> m.WindowSpec | None:
        return None if self.cluster.private else m.WindowSpec(0, 0)

    def _next(self) -> int:
        self.number += 1
        return self.number
