"""A server's part of the shared state, and what each entry of the log does to it.

Invariants:
- Whatever depends on an entry alone (ids of models, sums, refusals) comes out the same on every server.
- An exchange that was answered is never applied again; a repeat gets the same result and current values.
- A member's memory is touched only for an entry that names its outstanding exchange, and written only if the
  member can be answered here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConfigurationError, HeadwaterError, RegistrationError, UsageError
from headwater.log.positions import Positions
from headwater.log.programs import Programs
from headwater.log.state import LogState
from headwater.shard.copies import Copies, found
from headwater.shard.governed import GovernedRules
from headwater.shard.ledger import Ledger
from headwater.shard.merges import CommitMerges
from headwater.shard.outstanding import Members, Outstanding
from headwater.shard.program_entries import ProgramEntries
from headwater.shard.publications import Publications
from headwater.shard.replica import EntryInputs
from headwater.shard.snapshot import ShardSnapshot
from headwater.shard.staging import Staging
from headwater.shard.tables import Tables
from headwater.shard.vector import Vector
from headwater.spec.declaration import model_difference
from headwater.spec.layout import Layout
from headwater.spec.rules import evaluated
from headwater.spec.sync import Reduce

Answers: TypeAlias = list[tuple[int, m.Answer | None]]
"""Member and its answer; None where there will be none, because it was retired meanwhile."""

Copy: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class State:
    """Of server `index` of `servers`, whose members are `members`.

    Attributes:
        version: of the last entry that changed values.
        position: of the last entry processed.
        standings: as of `position`; positions: where the workers are in their data; programs: what their
            programs keep, and what their meetings came to.
        copies: memory for what members ask snapshots for. publications: copies for followers.
        inputs: what comes with the entry that is processed.
    """

    def __init__(self, index: int, servers: int, reduce: Reduce, members: Members) -> None:
        self.index = index
        self.servers = servers
        self.version = 0
        self.position = 0
        self.vectors: dict[int, Vector] = {}
        self.tables = Tables(index, servers)
        self.standings = LogState()
        self.ledger = Ledger()
        self.positions = Positions()
        self.programs = Programs()
        self.copies = Copies()
        self.publications = Publications(self.vectors, self.tables)
        self._of_programs = ProgramEntries(self, members)
        self._reduce = reduce
        self._members = members
        self._ids: dict[str, int] = {}
        self.inputs: EntryInputs
        self._on_entry: dict[type, Callable[[Any], Answers]] = {
            m.Enrolled: self._enrolled,
            m.Registered: self._registered,
            m.Measured: lambda entry: [],
            m.Committed: self._committed,
            m.Served: self._served,
            m.Late: self._late,
            m.Assigned: self._assigned,
            m.Activated: lambda entry: [],
            m.Retired: self._retired,
            m.Met: self._of_programs.met,
            m.Operated: self._of_programs.operated,
            m.Opened: self._of_programs.opened,
            m.Counted: self._of_programs.counted,
            m.Handed: self._of_programs.handed,
            m.Stopped: lambda entry: self.answer(entry.ticket),
            m.Stalled: self._stalled,
            m.Checkpointed: lambda entry: self.answer(entry.ticket),
            m.Published: self._published,
        }

    def range_of(self, layout: Layout) -> tuple[int, int]:
        """This server's elements [start, stop) of a model."""
        return layout.cut(self.servers)[self.index]

    def process(self, entry: m.AnyEntry, inputs: EntryInputs) -> Answers:
        """Do what the next entry says, with what `inputs` say besides; blocks for passes over memory."""
        self.inputs = inputs
        self.position = entry.position
        answers = self._on_entry[type(entry)](entry)
        self.standings.apply(entry)
        if type(entry) is m.Committed:
            return answers
        if isinstance(entry, m.Retired) and entry.gone:
            answers += self._forget(entry.member)
        kind = entry.kind if isinstance(entry, m.Served) else ""
        if isinstance(entry, m.Checkpointed) or kind == "checkpoint":
            self._keep_snapshot(answers, self.copies.copy)
        elif kind == "verify":
            self._keep_snapshot(answers, np.copy)  # asked for once: no memory is kept for it
        return answers

    def _keep_snapshot(self, answers: Answers, copy: Copy) -> None:
        for member, _ in answers:
            self._members.keep_snapshot(member, self.snapshot(copy))

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def _enrolled(self, entry: m.Enrolled) -> Answers:
        self.positions.cut_for(entry.workers)
        return []

    def _registered(self, entry: m.Registered) -> Answers:
        request = self.inputs.request(entry.source)
        if isinstance(request, m.RegisterTable):
            self.tables.create(request.spec)
        elif isinstance(request, m.Register):
            start, stop = self.range_of(Layout(request.spec.tensors))
            initial = self.inputs.initial(entry.source)
            self._add(Vector(request.spec, start, stop, initial, self.version))
        return self.answer(entry.source, **self._bring(entry.source, request))

    def _committed(self, entry: m.Committed) -> Answers:
        self.version = entry.version
        steps = [(ticket, self._step_of(ticket)) for ticket in entry.updates]
        merges = CommitMerges([step for _, step in steps], entry.weights, self._reduce, entry.scales)
        count = len(merges.contributors)
        self._change_settings(steps)
        asked = {ticket.member: self._read_by(ticket.member, step) for ticket, step in steps}
        present = self._members.readers(entry.answered)
        norms = dict(entry.norms)
        ratios = {(one.model, one.tensor): one.value for one in entry.ratios}
        try:
            self._check_rules(steps)
        except ConfigurationError as error:
            return self._failed(entry, steps, error)
        self._apply(steps, merges, [asked[reader.held.member] for reader in present], norms, ratios)
        if len(self.tables):
            for reader in present:
                self.tables.pull(reader.pulled(), self.version)
        named = {self.vectors[model].spec.name: norm for model, norm in norms.items()} if norms else {}
        alike = {self.vectors[model].spec.name: cosine for model, cosine in entry.correlations}
        for ticket, step in steps:
            staleness = entry.version - 1 - step.seen
            result = m.StepResult(entry.version, True, count, staleness, named, correlations=alike)
            self.ledger.record(ticket.member, step.step, result)
            self._of_programs.note(ticket, step)
        answers: Answers = []
        for ticket in entry.answered:
            answers += self._answer_step(ticket, tuple(asked[ticket.member]))
        return answers

    def _check_rules(self, steps: Sequence[tuple[m.ExchangeId, m.Step]]) -> None:
        """Refuse a commit that a user's rule cannot be run for; raises ConfigurationError."""
        for _, step in steps:
            for carried in step.carried:
                vector = self.vectors[carried.model]
                if vector.governed.of_users:
                    vector.check(vector.layout.unmask(carried.tensors))
            for rows in step.pushed:
                table = self.tables[rows.table]
                if table.governed.of_users:
                    evaluated(table.rule, table.updates, 1)

    def _failed(
        self, entry: m.Committed, steps: Sequence[tuple[m.ExchangeId, m.Step]], error: ConfigurationError
    ) -> Answers:
        """Nothing is applied. A worker that is answered here is told so and has not taken its turn."""
        result = m.StepResult(entry.version, False, 0, 0, reason=str(error))
        for ticket, step in steps:
            if ticket not in entry.answered:
                self.ledger.record(ticket.member, step.step, result)
        return [one for ticket in entry.answered for one in self.answer(ticket, failure=_refused(error))]

    def _late(self, entry: m.Late) -> Answers:
        """Settings take effect all the same: they are orders to the rule, not part of the gradient."""
        step = self._step_of(entry.ticket)
        self._change_settings([(entry.ticket, step)])
        result = m.StepResult(self.version, False, 0, self.version - step.seen, reason=entry.reason)
        self.ledger.record(entry.ticket.member, step.step, result)
        return self._answer_step(entry.ticket, **self._bring(entry.ticket, step))

    def _read_by(self, member: int, step: m.Step) -> dict[int, Staging]:
        """Where the values that a step asks for are to be written, by model."""
        stagings = self._members.stagings(member)
        if isinstance(step.read, tuple):
            return {model: stagings[model] for model in step.read if model in stagings}
        return stagings if step.read else {}

    def _step_of(self, ticket: m.ExchangeId) -> m.Step:
        request = self.inputs.request(ticket)
        assert isinstance(request, m.Step)
        return request

    def _change_settings(self, steps: Sequence[tuple[m.ExchangeId, m.Step]]) -> None:
        """Of orders for one setting the last one wins, so the lowest rank's comes last."""
        steps = [(ticket, step) for ticket, step in steps if step.settings or step.table_settings]
        for ticket, step in steps:
            said: Sequence[m.Setting | m.TableSetting] = (*step.settings, *step.table_settings)
            for one in said:
                if one.governs:
                    self._governed(one).claim(ticket.member, self.standings)
        for ticket, step in reversed(steps):
            for setting in step.settings:
                if self._governed(setting).obeys(ticket.member, setting.governs):
                    self.vectors[setting.model].governed.set(setting.group, setting.values)
            for row in step.table_settings:
                if self._governed(row).obeys(ticket.member, row.governs):
                    self.tables[row.table].set(row.values)

    def _governed(self, setting: m.Setting | m.TableSetting) -> GovernedRules:
        if isinstance(setting, m.Setting):
            return self.vectors[setting.model].governed
        return self.tables[setting.table].governed

    def _news(self, step: m.Step) -> tuple[m.RulesInForce, ...]:
        """The rules in force that the member does not know, as its step says."""
        news = []
        for model, known in step.known:
            vector = self.vectors[model]
            if vector.governed.differ(known):
                news.append(vector.governed.in_force(vector.updates, model=model))
        for id, known in step.known_tables:
            table = self.tables[id]
            if table.governed.differ(known):
                news.append(table.governed.in_force(table.updates, table=id))
        return tuple(news)

    def _apply(
        self,
        steps: Sequence[tuple[m.ExchangeId, m.Step]],
        merges: CommitMerges,
        readers: Sequence[dict[int, Staging]],
        norms: dict[int, float],
        ratios: dict[tuple[int, int], float],
    ) -> None:
        summed = self.inputs.summed
        for model, vector in self.vectors.items():
            updates = self.inputs.updates(model, vector, steps)
            answers = [stagings[model] for stagings in readers if model in stagings]
            if updates:
                merge = merges.of(model, vector.spec)
                done = merge.summed() if summed else merge
                own = {tensor: ratio for (of, tensor), ratio in ratios.items() if of == model}
                vector.apply(updates, done, answers, self.version, norms.get(model), own)
            elif answers:
                vector.write(answers)
        if pushed := self.inputs.pushed(steps):
            rows = merges.rows.summed() if summed else merges.rows
            self.tables.apply(pushed, rows, self.version)

    def _served(self, entry: m.Served) -> Answers:
        ticket = entry.ticket
        request = self.inputs.request(ticket)
        if ticket.number == self.ledger.last_number(ticket.member):
            return self._serve_again(ticket, request)
        try:
            brought = self._bring(ticket, request)
        except UsageError as error:
            return self.answer(ticket, failure=_refused(error))
        if not isinstance(request, m.Step):
            return self.answer(ticket, **brought)
        return self._answer_step(ticket, **brought, may_stop=entry.kind == "step")

    def _serve_again(self, ticket: m.ExchangeId, request: m.Request) -> Answers:
        """The answer was lost on its way: the same result, with the values of now."""
        answer = self.ledger.answer(ticket.member)
        try:
            brought = {} if answer.failure is not None else self._bring(ticket, request, again=True)
        except UsageError as error:
            brought = {"failure": _refused(error)}
        if isinstance(request, m.Step):
            brought["rules"] = self._news(request)
        brought.pop("notice", None)
        answer = msgspec.structs.replace(answer, version=self.version, **brought)
        return self._emit(ticket, answer, self.ledger.count(ticket.member))

    def _bring(self, ticket: m.ExchangeId, request: m.Request, again: bool = False) -> dict[str, Any]:
        """Give a member that can be answered here what its request asks for; the fields that say so."""
        reader = self._members.reader(ticket)
        if reader is not None:
            self.tables.pull(reader.pulled(), self.version)
        if isinstance(request, m.Step):
            return {"values": self.write(ticket, reader, self._read_by(ticket.member, request))}
        if isinstance(request, m.Pull):
            have = -1 if again else request.have
            return {"values": self.write(ticket, reader, request.models, have)}
        if isinstance(request, m.Register):
            model = self._ids[request.spec.name]
            vector = self.vectors[model]
            if unlike := model_difference(vector.spec, request.spec, vector.governed.resumed):
                raise RegistrationError(unlike)
            notice = vector.declared(request.spec)
            rules = vector.governed.in_force(vector.updates, model=model, joins=True)
            return self._join(ticket, reader, model) | {"notice": notice, "rules": (rules,)}
        if isinstance(request, m.Meet):
            met = self._of_programs.met_before(ticket, request.meeting)
            return met | self._of_programs.read_after(ticket, request)
        if isinstance(request, m.Operate):
            return self._of_programs.read_after(ticket, request)
        if isinstance(request, m.NextPortion):
            return {"values": self.write(ticket, reader, (request.model,))}
        if isinstance(request, m.Recall):
            return {"recalled": self._of_programs.recalled(ticket)}
        if isinstance(request, m.Attach):
            return self._join(ticket, reader, request.model)
        if isinstance(request, m.RegisterTable):
            id, notice = self.tables.resolve(request.spec)
            table = self.tables[id]
            rules = table.governed.in_force(table.updates, table=id, joins=True)
            return {"table": id, "notice": notice, "rules": (rules,)}
        if isinstance(request, m.ReadState):
            return self._read_state(ticket, reader, request.model)
        if isinstance(request, m.Publish):
            self.publications.follow(ticket.member, request, self.version)
            if reader is not None:
                place = self.version, self.position, self.positions.recorded()
                self.publications.cut(ticket.member, request, *place)
        if isinstance(request, m.Taken):
            self.publications.taken(ticket.member)
        if isinstance(request, m.CountRows) and reader is not None:
            self._keep_count(ticket, self.tables[request.table].count(self.version))
        return {}

    def _published(self, entry: m.Published) -> Answers:
        answers: Answers = []
        for ticket in entry.tickets:
            answers += self.answer(ticket, **self._bring(ticket, self.inputs.request(ticket)))
        return answers

    def _join(self, ticket: m.ExchangeId, reader: Outstanding | None, model: int) -> dict[str, Any]:
        """The member takes part in a model from now on, with the memory that came with its request."""
        if reader is not None:
            assert reader.staging is not None
            self._members.stage(ticket.member, model, reader.staging)
            self.vectors[model].write([reader.staging])
        return {"values": (model,), "model": model}

    def _read_state(self, ticket: m.ExchangeId, reader: Outstanding | None, model: int) -> dict[str, Any]:
        vector = self.vectors[model]
        if reader is not None:
            copies: list[NDArray[Any]] = [state.copy() for state in vector.states.values()]
            self._members.keep_copies(ticket.member, copies)
        rules = vector.governed.in_force(vector.updates, model=model)
        return {"states": tuple(vector.states), "counts": tuple(vector.counts.tolist()), "rules": (rules,)}

    def write(
        self, ticket: m.ExchangeId, reader: Outstanding | None, models: Iterable[int], have: int = -1
    ) -> tuple[int, ...]:
        """Write the models that changed after version `have`; return which."""
        changed = tuple(model for model in models if self.vectors[model].changed > have)
        if reader is not None:
            for model in changed:
                self.vectors[model].write([self._members.staging(ticket.member, model)])
        return changed

    def _assigned(self, entry: m.Assigned) -> Answers:
        request = self.inputs.request(entry.source)
        self.version = entry.version
        if isinstance(request, m.DeleteRows):
            staged = self.inputs.named_rows(entry.source)
            return self.answer(
                entry.source, count=self.tables[staged.table].delete(staged.ids, entry.version)
            )
        if isinstance(request, m.AssignRows):
            staged = self.inputs.named_rows(entry.source)
            self.tables[staged.table].assign(staged.ids, staged.rows, request.state, entry.version)
            return self.answer(entry.source)
        assert isinstance(request, m.Assign | m.LoadState)
        vector = self.vectors[request.carried.model]
        kind = "values" if isinstance(request, m.Assign) else "states"
        try:
            if request.written is not None and not vector.admits(kind, request.written, entry.source.member):
                return self.answer(entry.source)
        except UsageError as error:
            return self.answer(entry.source, failure=_refused(error))
        source = self.inputs.assigned(entry.source, request.carried.model)
        tensors = vector.layout.unmask(request.carried.tensors)
        if isinstance(request, m.Assign):
            vector.assign(source, tensors, entry.version)
        else:
            vector.load_state(source.parameters, tensors, request.counts, request.updates, entry.version)
        return self.answer(entry.source)

    def _retired(self, entry: m.Retired) -> Answers:
        answers: Answers = []
        if entry.answered is not None:
            request = self.inputs.request(entry.answered)
            if isinstance(request, m.End | m.Leave):
                self._of_programs.note(entry.answered, request)
            answers = self.answer(entry.answered)
        return answers

    def _forget(self, member: int) -> Answers:
        """It is gone for good; whoever receives for it meanwhile finds that out first, so this comes last."""
        self.ledger.forget(member)
        self.publications.forget(member)
        return [(member, None)] if self._members.forget(member) else []

    def _stalled(self, entry: m.Stalled) -> Answers:
        failure = m.Refused("StalledError", entry.reason)
        return [answer for ticket in entry.tickets for answer in self.answer(ticket, failure=failure)]

    # ── as plain arrays ─────────────────────────────────────────────────────────────────────────

    def snapshot(self, copy: Copy = np.copy) -> ShardSnapshot:
        """A copy of all of it; blocks for one pass over memory. `copy` makes those of models' arrays."""
        return ShardSnapshot(
            index=self.index,
            servers=self.servers,
            position=self.position,
            version=self.version,
            models=tuple(vector.snapshot(copy) for vector in self.vectors.values()),
            changed=tuple(vector.changed for vector in self.vectors.values()),
            tables=self.tables.snapshot(self.version),
            ledger=self.ledger.records(),
            standings=self.standings.record(),
            recorded=self.positions.recorded(),
            programs=np.frombuffer(self.programs.to_bytes(), np.uint8),
        )

    def restore(self, snapshot: ShardSnapshot) -> None:
        """Become what `snapshot` was made of; copies the arrays."""
        self.position, self.version = snapshot.position, snapshot.version
        self.standings = LogState.of(snapshot.standings)
        self.ledger = Ledger.of(snapshot.ledger)
        self.positions = Positions(snapshot.recorded)
        self.programs = Programs(snapshot.programs.tobytes())
        for model, changed in zip(snapshot.models, snapshot.changed, strict=True):
            self._add(Vector.restore(model, changed))
        self.tables.restore(snapshot.tables)

    def _add(self, vector: Vector) -> None:
        self._ids[vector.spec.name] = len(self.vectors)
        self.vectors[len(self.vectors)] = vector
        if self.copies.begun:
            self.copies.take_back(found(self.copies.expect(vector.arrays())))

    # ── answers ─────────────────────────────────────────────────────────────────────────────────

    def _answer_step(self, ticket: m.ExchangeId, values: tuple[int, ...], may_stop: bool = True) -> Answers:
        stopped = may_stop and self.standings.standing(ticket.member).stopping
        rules = self._news(self._step_of(ticket))
        result = self.ledger.result(ticket.member)
        return self.answer(ticket, values=values, result=result, stopped=stopped, rules=rules)

    def answer(self, ticket: m.ExchangeId, count: int | None = None, **fields: Any) -> Answers:
        """Answer an exchange of the version of now, with these fields; as `_emit`."""
        return self._emit(ticket, m.Answer(ticket.number, self.version, **fields), count)

    def _emit(self, ticket: m.ExchangeId, answer: m.Answer, count: int | None) -> Answers:
        """Note an answer, and give it out where the member can be told; `count`: this server's own."""
        self.ledger.answered(ticket.member, answer, count)
        if not self._members.end(ticket):
            return []
        if count is not None:
            self._keep_count(ticket, count)
        return [(ticket.member, answer)]

    def _keep_count(self, ticket: m.ExchangeId, count: int) -> None:
        self._members.keep_copies(ticket.member, [np.array([count], dtype=np.int64)])


def _refused(error: HeadwaterError) -> m.Refused:
    return m.Refused(type(error).__name__, str(error))
