"""A server's half of the log: holds exchanges, processes entries in order, answers.

A state machine without I/O: memory that members share with it arrives as arrays (`Staging`).

Invariants:
- An exchange is held before an entry can name it; an entry is processed once, in order of position.
- A member's memory is touched only to process an entry that names its outstanding exchange.
- Whatever depends on an entry alone (ids of models, sums, refusals) comes out the same on every server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, RegistrationError
from headwater.layout import Layout, describe
from headwater.positions import Positions
from headwater.rules import from_spec
from headwater.shard.ledger import Ledger
from headwater.shard.tables import StagedRows, Tables
from headwater.shard.vector import Staging, Update, Vector
from headwater.sync import Reduce

Answers: TypeAlias = list[tuple[int, m.Answer]]
"""Member and its answer."""

_KINDS: dict[type, m.Kind] = {
    m.Register: "register",
    m.RegisterTable: "table",
    m.Attach: "attach",
    m.Step: "step",
    m.Pull: "pull",
    m.PullRows: "pull",
    m.CountRows: "pull",
    m.DeleteRows: "delete",
    m.ReadState: "state",
    m.Assign: "assign",
    m.End: "end",
    m.Stop: "stop",
    m.Leave: "leave",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Outstanding:
    """A member's exchange, held here. `repeat`: a step that was applied before.

    `rows`: of each `Rows` of the request, in its order.
    """

    request: m.Request
    staging: Staging | None = None
    rows: Sequence[StagedRows] = ()
    repeat: bool = False

    def pushed(self) -> Sequence[StagedRows]:
        """Of a step: its gradients."""
        assert isinstance(self.request, m.Step)
        return self.rows[: len(self.request.pushed)]

    def pulled(self) -> Sequence[StagedRows]:
        """Of a step: the rows that its answer brings."""
        assert isinstance(self.request, m.Step)
        return self.rows[len(self.request.pushed) :]


class Shard:
    """Server `index` of `servers`.

    Attributes:
        version: of the last entry that changed values.
        position: of the last entry processed.
        positions: where the workers are in their data.
    """

    def __init__(self, index: int, servers: int, reduce: Reduce) -> None:
        self.index = index
        self.servers = servers
        self.version = 0
        self.position = 0
        self.exchanges = 0
        self.vectors: dict[int, Vector] = {}
        self.tables = Tables(index, servers)
        self._reduce = reduce
        self._ids: dict[str, int] = {}
        self.positions = Positions()
        self._ledger = Ledger()
        self._outstanding: dict[int, _Outstanding] = {}
        self._stagings: dict[int, dict[int, Staging]] = {}
        self._copies: dict[int, list[NDArray[Any]]] = {}
        self._to_stop: set[int] = set()
        self._on_entry: dict[type, Callable[[Any], Answers]] = {
            m.Registered: self._registered,
            m.Committed: self._committed,
            m.Served: self._served,
            m.Assigned: self._assigned,
            m.Activated: lambda entry: [],
            m.Retired: self._retired,
            m.Met: self._met,
            m.Stopped: self._stopped,
            m.Stalled: self._stalled,
        }

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def range_of(self, layout: Layout) -> tuple[int, int]:
        """This server's elements [start, stop) of a model."""
        return layout.cut(self.servers)[self.index]

    def hold(
        self,
        member: int,
        request: m.Request,
        staging: Staging | None = None,
        rows: Sequence[StagedRows] = (),
    ) -> m.Held:
        """Hold an exchange until an entry names it; the return is for the sequencer.

        `staging` comes with Register and Attach, `rows` with requests that have `Rows`. A member has one
        exchange outstanding at a time.

        Raises:
            UsageError: the request cannot be served; nothing is held.
            ProtocolError: the request breaks the protocol; its connection should be closed.
        """
        repeat = False
        if member in self._outstanding:
            number = self._outstanding[member].request.number
            raise ProtocolError(f"member {member} sent {request.number} before {number} was answered")
        if isinstance(request, m.Register):
            self._check_spec(request.spec)
        elif isinstance(request, m.RegisterTable):
            self.tables.check_spec(request.spec)
        elif isinstance(request, m.Attach):
            self._check_model(request.model)
        elif isinstance(request, m.Step):
            self._check_step(member, request, rows)
            repeat = self._ledger.is_repeat(member, request.step)
        elif isinstance(request, m.Assign):
            self._check_carried(member, request.carried)
        elif isinstance(request, m.Pull):
            for model in request.models:
                self.staging(member, model)
        elif isinstance(request, m.ReadState):
            self.staging(member, request.model)
        elif isinstance(request, m.CountRows):
            self.tables[request.table]
        elif isinstance(request, m.PullRows | m.DeleteRows):
            self.tables.check(rows)
        self._outstanding[member] = _Outstanding(request, staging, rows, repeat)
        self.exchanges += 1
        kind = "pull" if repeat else request.kind if isinstance(request, m.Meet) else _KINDS[type(request)]
        return m.Held(member, request.number, kind, _name_of(request))

    def staging(self, member: int, model: int) -> Staging:
        """Where the member's part of `model` is staged.

        Raises:
            ProtocolError: there is no such model, or the member has not registered it.
        """
        found = self._stagings.get(member, {}).get(model)
        if found is None:
            known = sorted(self._stagings.get(member, {}))
            raise ProtocolError(f"member {member} named model {model}, but has registered only {known}")
        return found

    def _check_model(self, model: int) -> None:
        if model not in self.vectors:
            raise ProtocolError(f"there is no model {model}, known are {sorted(self.vectors)}")

    def take_copies(self, member: int) -> list[NDArray[Any]]:
        """The arrays made for the member's last answer, which are its payload, once; the caller's then."""
        return self._copies.pop(member, [])

    def _check_spec(self, spec: m.ModelSpec) -> None:
        layout = Layout(spec.tensors)
        if not 0 <= int(layout.groups.min()) <= int(layout.groups.max()) < len(spec.rules):
            raise RegistrationError(
                f"model {spec.name!r}: tensors name parameter groups {sorted(set(layout.groups.tolist()))}, "
                f"but there are rules for {len(spec.rules)}"
            )
        for rule in map(from_spec, spec.rules):
            if rule.rows_only:
                raise RegistrationError(f"model {spec.name!r}: {rule.name} is a rule for tables' rows only")

    def _check_step(self, member: int, step: m.Step, rows: Sequence[StagedRows]) -> None:
        self.tables.check(rows[: len(step.pushed)])
        self.tables.check(rows[len(step.pushed) :])
        self.tables.check_settings(step.table_settings)
        models = [carried.model for carried in step.carried]
        if len(set(models)) < len(models):
            raise ProtocolError(f"member {member} carries a model twice in one step: {models}")
        for carried in step.carried:
            self._check_carried(member, carried)
        for model in step.read if isinstance(step.read, tuple) else ():
            self.staging(member, model)
        for setting in step.settings:
            self.staging(member, setting.model)
            rules = self.vectors[setting.model].rules
            if not -1 <= setting.group < len(rules):
                raise ProtocolError(f"parameter group {setting.group} does not exist, there are {len(rules)}")
            for rule in rules if setting.group < 0 else [rules[setting.group]]:
                rule.with_settings(**setting.values)

    def _check_carried(self, member: int, carried: m.Carried) -> None:
        self.staging(member, carried.model)
        tensors = len(self.vectors[carried.model].layout.tensors)
        if len(carried.tensors) != -(-tensors // 8):
            raise ProtocolError(
                f"a mask of {len(carried.tensors)} bytes for {tensors} tensors: expected {-(-tensors // 8)}"
            )
        if int.from_bytes(carried.tensors, "little") >> tensors:
            raise ProtocolError(f"a mask names more than the {tensors} tensors of model {carried.model}")

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def process(self, entry: m.AnyEntry) -> Answers:
        """Process the next entry of the log; blocks for the passes over memory that it asks for."""
        assert entry.position == self.position + 1, f"entry {entry.position} after {self.position}"
        self.position = entry.position
        return self._on_entry[type(entry)](entry)

    def _take(self, ticket: m.Ticket) -> _Outstanding:
        held = self._outstanding[ticket.member]
        assert held.request.number == ticket.number, f"{ticket} is not outstanding"
        return held

    def _registered(self, entry: m.Registered) -> Answers:
        held = self._take(entry.source)
        if isinstance(held.request, m.RegisterTable):
            self.tables.create(held.request.spec)
            return self._serve_table(entry.source, held.request)
        assert isinstance(held.request, m.Register)
        assert held.staging is not None
        spec = held.request.spec
        start, stop = self.range_of(Layout(spec.tensors))
        model = len(self.vectors)
        self.vectors[model] = Vector(spec, start, stop, held.staging.parameters, self.version)
        self._ids[spec.name] = model
        return self._serve_register(entry.source, held.request, held.staging)

    def _serve_register(self, ticket: m.Ticket, request: m.Register, staging: Staging) -> Answers:
        model = self._ids[request.spec.name]
        difference = _difference(self.vectors[model].spec, request.spec)
        if difference:
            return self._refuse(ticket, RegistrationError(difference))
        self._stagings.setdefault(ticket.member, {})[model] = staging
        self.vectors[model].write([staging])
        return self._answer(ticket, values=(model,), model=model)

    def _serve_table(self, ticket: m.Ticket, request: m.RegisterTable) -> Answers:
        try:
            return self._answer(ticket, table=self.tables.resolve(request.spec))
        except RegistrationError as error:
            return self._refuse(ticket, error)

    def _committed(self, entry: m.Committed) -> Answers:
        self.version = entry.version
        steps = [(ticket, self._step_of(ticket)) for ticket in entry.updates]
        contributors = sum(_contributes(step) for _, step in steps)
        self._change_settings([step for _, step in steps])
        readers = {
            ticket.member: self._read_by(ticket.member, self._step_of(ticket))
            for ticket in entry.answered
            if self._step_of(ticket).read
        }
        self._apply(steps, contributors, list(readers.values()))
        for ticket in entry.answered:
            self.tables.pull(self._take(ticket).pulled(), self.version)
        for ticket, step in steps:
            staleness = entry.version - 1 - step.seen
            result = m.StepResult(entry.version, True, contributors, staleness)
            self._ledger.record(ticket.member, step.step, result)
            if step.position is not None:
                self.positions.record(step.position)
        answers: Answers = []
        for ticket in entry.answered:
            answers += self._answer_step(ticket, tuple(readers.get(ticket.member, ())))
        return answers

    def _read_by(self, member: int, step: m.Step) -> dict[int, Staging]:
        """Where the values that a step asks for are to be written, by model."""
        stagings = self._stagings.get(member, {})
        if isinstance(step.read, tuple):
            return {model: stagings[model] for model in step.read}
        return stagings if step.read else {}

    def _step_of(self, ticket: m.Ticket) -> m.Step:
        request = self._take(ticket).request
        assert isinstance(request, m.Step)
        return request

    def _change_settings(self, steps: Sequence[m.Step]) -> None:
        """Settings of the lowest rank win, so they are applied last."""
        for step in reversed(steps):
            for setting in step.settings:
                self.vectors[setting.model].set(setting.group, setting.values)
            self.tables.set(step.table_settings)

    def _apply(
        self,
        steps: Sequence[tuple[m.Ticket, m.Step]],
        contributors: int,
        readers: Sequence[dict[int, Staging]],
    ) -> None:
        divisor = contributors if self._reduce == "mean" else 1
        for model, vector in self.vectors.items():
            updates = [
                Update(self.staging(ticket.member, model), vector.layout.unmask(carried.tensors))
                for ticket, step in steps
                for carried in step.carried
                if carried.model == model and any(carried.tensors)
            ]
            answers = [stagings[model] for stagings in readers if model in stagings]
            if updates:
                vector.apply(updates, divisor, answers, self.version)
            elif answers:
                vector.write(answers)
        self.tables.apply([self._take(ticket).pushed() for ticket, _ in steps], divisor, self.version)

    def _answer_step(self, ticket: m.Ticket, values: tuple[int, ...]) -> Answers:
        stopped = ticket.member in self._to_stop
        self._to_stop.discard(ticket.member)
        result = self._ledger.result(ticket.member)
        return self._answer(ticket, values=values, result=result, stopped=stopped)

    def _served(self, entry: m.Served) -> Answers:
        held = self._take(entry.ticket)
        request, mine = held.request, self._stagings.get(entry.ticket.member, {})
        if isinstance(request, m.Register):
            assert held.staging is not None
            return self._serve_register(entry.ticket, request, held.staging)
        if isinstance(request, m.RegisterTable):
            return self._serve_table(entry.ticket, request)
        if isinstance(request, m.Attach):
            return self._attach(entry.ticket, request, held.staging)
        if isinstance(request, m.PullRows):
            self.tables.pull(held.rows, self.version)
            return self._answer(entry.ticket)
        if isinstance(request, m.CountRows):
            return self._answer_number(entry.ticket, len(self.tables[request.table]))
        if isinstance(request, m.Step):
            self.tables.pull(held.pulled(), self.version)
            values = self._write(mine, self._read_by(entry.ticket.member, request), -1)
            return self._answer_step(entry.ticket, values)
        if isinstance(request, m.ReadState):
            vector = self.vectors[request.model]
            self._copies[entry.ticket.member] = [state.copy() for state in vector.states.values()]
            return self._answer(
                entry.ticket, states=tuple(vector.states), counts=tuple(vector.counts.tolist())
            )
        assert isinstance(request, m.Pull)
        return self._answer(entry.ticket, values=self._write(mine, request.models, request.have))

    def _attach(self, ticket: m.Ticket, request: m.Attach, staging: Staging | None) -> Answers:
        assert staging is not None
        self._stagings.setdefault(ticket.member, {})[request.model] = staging
        self.vectors[request.model].write([staging])
        return self._answer(ticket, values=(request.model,), model=request.model)

    def _write(
        self, stagings: dict[int, Staging], models: Sequence[int] | dict[int, Staging], have: int
    ) -> tuple[int, ...]:
        """Write the models that changed after version `have`; return which."""
        changed = tuple(model for model in models if self.vectors[model].changed > have)
        for model in changed:
            self.vectors[model].write([stagings[model]])
        return changed

    def _assigned(self, entry: m.Assigned) -> Answers:
        held = self._take(entry.source)
        request = held.request
        self.version = entry.version
        if isinstance(request, m.DeleteRows):
            (staged,) = held.rows
            return self._answer_number(entry.source, self.tables[staged.table].delete(staged.ids))
        assert isinstance(request, m.Assign)
        vector = self.vectors[request.carried.model]
        source = self.staging(entry.source.member, request.carried.model)
        vector.assign(source, vector.layout.unmask(request.carried.tensors), entry.version)
        return self._answer(entry.source)

    def _retired(self, entry: m.Retired) -> Answers:
        if entry.gone or entry.answered is not None:  # not one that waits in a barrier: it goes on after it
            self._to_stop.discard(entry.member)
        answers: Answers = []
        if entry.answered is not None:
            request = self._take(entry.answered).request
            if isinstance(request, m.End) and request.position is not None:
                self.positions.record(request.position)
            answers = self._answer(entry.answered)
        if entry.gone:
            self._outstanding.pop(entry.member, None)
            self._stagings.pop(entry.member, None)
            self._copies.pop(entry.member, None)
            self._ledger.forget(entry.member)
        return answers

    def _met(self, entry: m.Met) -> Answers:
        sums: dict[str, float] = {}
        for ticket in entry.tickets:
            request = self._take(ticket).request
            assert isinstance(request, m.Meet)
            for name, value in request.values.items():
                sums[name] = sums.get(name, 0.0) + value
        return [answer for ticket in entry.tickets for answer in self._answer(ticket, sums=sums)]

    def _stopped(self, entry: m.Stopped) -> Answers:
        self._to_stop.update(entry.members)
        return self._answer(entry.ticket)

    def _stalled(self, entry: m.Stalled) -> Answers:
        failure = m.Refused("StalledError", entry.reason)
        return [answer for ticket in entry.tickets for answer in self._answer(ticket, failure=failure)]

    # ── answers ─────────────────────────────────────────────────────────────────────────────────

    def _answer(self, ticket: m.Ticket, **fields: Any) -> Answers:
        del self._outstanding[ticket.member]
        return [(ticket.member, m.Answer(ticket.number, self.version, **fields))]

    def _answer_number(self, ticket: m.Ticket, number: int) -> Answers:
        """With a number that each server has its own of."""
        self._copies[ticket.member] = [np.array([number], dtype=np.int64)]
        return self._answer(ticket)

    def _refuse(self, ticket: m.Ticket, error: HeadwaterError) -> Answers:
        return self._answer(ticket, failure=m.Refused(type(error).__name__, str(error)))

    def describe(self, number: int) -> m.Description:
        """Which models and tables there are, outside the log."""
        models = tuple(m.ModelInfo(model, vector.spec) for model, vector in self.vectors.items())
        return m.Description(number, self.version, models, tuple(table.spec for table in self.tables))


def _contributes(step: m.Step) -> bool:
    """Whether it carries a gradient, on any server."""
    return bool(step.pushed) or any(any(carried.tensors) for carried in step.carried)


def _name_of(request: m.Request) -> str:
    if isinstance(request, m.Register | m.RegisterTable):
        return request.spec.name
    return str(request.step) if isinstance(request, m.Step) else ""


def _difference(old: m.ModelSpec, new: m.ModelSpec) -> str:
    """What keeps `new` from being the model `old`; "" when nothing does."""
    here, there = set(old.tensors), set(new.tensors)
    if here != there:
        return (
            f"model {old.name!r} exists with other tensors ({_only(old, there)}), "
            f"got ({_only(new, here)}): declare the same ones or use another name"
        )
    kinds = [rule.name for rule in old.rules], [rule.name for rule in new.rules]
    if kinds[0] != kinds[1]:
        return f"model {old.name!r} exists with rule {kinds[0]}, got {kinds[1]}: use the same or another name"
    return ""


def _only(spec: m.ModelSpec, known: set[m.TensorSpec]) -> str:
    """What of `spec` is not in `known`."""
    return describe([tensor for tensor in spec.tensors if tensor not in known]) or "nothing more"
