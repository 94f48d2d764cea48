"""What a request must be to be held: checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwater import messages as m
from headwater.errors import ProtocolError, RegistrationError
from headwater.kernels import dense
from headwater.kernels.ahead import compile_for_model
from headwater.log.meetings import describe as describe_meeting
from headwater.log.state import UNFINISHED
from headwater.shard.outstanding import Members
from headwater.shard.runnable import check_runs
from headwater.shard.tables import StagedRows, Tables, check_table
from headwater.shard.vector import Vector
from headwater.spec.codecs import parse_codec, parse_values_codec
from headwater.spec.layout import Layout
from headwater.spec.merges import parse_merge
from headwater.spec.rules import from_spec

_KINDS: dict[type, m.Kind] = {
    m.Register: "register",
    m.RegisterTable: "table",
    m.Attach: "attach",
    m.Step: "step",
    m.Pull: "pull",
    m.PullRows: "pull",
    m.CountRows: "pull",
    m.DeleteRows: "delete",
    m.AssignRows: "assign",
    m.ReadState: "state",
    m.Assign: "assign",
    m.LoadState: "assign",
    m.Operate: "work",
    m.NextPortion: "portion",
    m.Recall: "recall",
    m.End: "end",
    m.Stop: "stop",
    m.Leave: "leave",
    m.Checkpoint: "checkpoint",
    m.Verify: "verify",
    m.Publish: "publish",
    m.Taken: "taken",
}


def kind_of(request: m.Request) -> m.Kind:
    """What the sequencer is told that it is."""
    return request.meeting.kind if isinstance(request, m.Meet) else _KINDS[type(request)]


def name_of(request: m.Request) -> str:
    """What of it the sequencer and users need to know besides."""
    if isinstance(request, m.Step):
        return str(request.step)
    if isinstance(request, m.Register | m.RegisterTable):
        return request.spec.name
    if isinstance(request, m.Checkpoint | m.Publish):
        return str(request.at)
    if isinstance(request, m.Meet):
        return describe_meeting(request.meeting)
    if isinstance(request, m.Operate):
        return str(request.work.model)
    if isinstance(request, m.End):
        return request.stalled
    if isinstance(request, m.Leave):
        return "" if request.finished else UNFINISHED
    return ""


class Checks:
    """Checks requests against the models and tables of one server."""

    def __init__(self, vectors: Mapping[int, Vector], tables: Tables, members: Members) -> None:
        self._vectors = vectors
        self._tables = tables
        self._members = members

    def check(self, member: int, request: m.Request, rows: Sequence[StagedRows]) -> None:
        """Refuse what cannot be served.

        Raises:
            UsageError: the caller's fault; its connection goes on.
            ProtocolError: the request breaks the protocol; its connection should be closed.
        """
        check = _CHECKS.get(type(request))
        if check is not None:
            check(self, member, request, rows)

    def _check_declaration(
        self, member: int, request: m.Register | m.RegisterTable, rows: Sequence[StagedRows]
    ) -> None:
        check_declared(request.spec)

    def _check_attach(self, member: int, request: m.Attach, rows: Sequence[StagedRows]) -> None:
        self.check_model(request.model)

    def _check_portion(self, member: int, request: m.NextPortion, rows: Sequence[StagedRows]) -> None:
        self._members.staging(member, request.model)
        if request.done is not None and request.done.portion.model != request.model:
            raise ProtocolError(f"member {member} brings {request.done} as one of model {request.model}")

    def _check_assign(self, member: int, request: m.Assign, rows: Sequence[StagedRows]) -> None:
        self._check_carried(member, request.carried)

    def _check_pull(self, member: int, request: m.Pull, rows: Sequence[StagedRows]) -> None:
        for model in request.models:
            self._members.staging(member, model)

    def _check_read_state(self, member: int, request: m.ReadState, rows: Sequence[StagedRows]) -> None:
        self._members.staging(member, request.model)

    def _check_table(self, member: int, request: m.CountRows, rows: Sequence[StagedRows]) -> None:
        self._tables[request.table]

    def _check_publish(self, member: int, request: m.Publish, rows: Sequence[StagedRows]) -> None:
        for wanted in request.models:
            self.check_model(wanted.id)
        for wanted in request.tables:
            self._tables[wanted.id]

    def _check_rows(
        self, member: int, request: m.PullRows | m.DeleteRows, rows: Sequence[StagedRows]
    ) -> None:
        self._tables.check(rows)

    def _check_assigned_rows(self, member: int, request: m.AssignRows, rows: Sequence[StagedRows]) -> None:
        self._tables.check(rows)
        if request.state:
            self._tables[request.rows.table].check_state(rows[0].rows)

    def check_model(self, model: int) -> None:
        """Refuse a model that does not exist.

        Raises:
            ProtocolError: it does not.
        """
        if model not in self._vectors:
            raise ProtocolError(f"there is no model {model}, known are {sorted(self._vectors)}")

    def _check_step(self, member: int, step: m.Step, rows: Sequence[StagedRows]) -> None:
        if not 0 < step.weight < math.inf:
            raise ProtocolError(f"member {member} sent a step of weight {step.weight}, expected a number > 0")
        if step.pace is not None:
            _check_pace(member, step.pace)
        if step.fragment != -1:
            self._members.staging(member, step.fragment)
        if rows:
            self._tables.check(rows[: len(step.pushed)])
            self._tables.check(rows[len(step.pushed) :])
        if step.table_settings:
            self._tables.check_settings(step.table_settings)
        if len(step.carried) > 1:
            models = [carried.model for carried in step.carried]
            if len(set(models)) < len(models):
                raise ProtocolError(f"member {member} carries a model twice in one step: {models}")
        for carried in step.carried:
            self._check_carried(member, carried)
        mine = self._members.stagings(member)
        for model in step.read if isinstance(step.read, tuple) else ():
            if model not in mine:
                self._members.staging(member, model)  # which says what is there
        for model, _ in step.known:
            if model not in mine:
                self._members.staging(member, model)
        for table, _ in step.known_tables:
            self._tables[table]
        for setting in step.settings:
            self._members.staging(member, setting.model)
            rules = self._vectors[setting.model].rules
            if not -1 <= setting.group < len(rules):
                raise ProtocolError(f"parameter group {setting.group} does not exist, there are {len(rules)}")
            for rule in rules if setting.group < 0 else [rules[setting.group]]:
                rule.with_settings(**setting.values)

    def _check_operate(self, member: int, request: m.Operate, rows: Sequence[StagedRows]) -> None:
        work, plan = request.work, request.plan
        self._members.staging(member, work.model)
        if work.gathers:
            raise ProtocolError(f"member {member} gathers gradients alone")
        strange = [one for one in work.operations if not isinstance(one, m.CombineVectors)]
        if plan is not None and (plan.count < 1 or strange or work.reductions):
            raise ProtocolError(f"member {member} asks for an evaluation with {plan} and {work}")

    def _check_meeting(self, member: int, request: m.Meet, rows: Sequence[StagedRows]) -> None:
        """Names are checked where the work is done: a repeated meeting's vectors may be gone since."""
        work, kind = request.work, request.meeting.kind
        if (work is not None) != (kind in ("operate", "measure")):
            raise ProtocolError(f"member {member} sent a {kind} with work {work}")
        if work is None:
            return
        self._members.staging(member, work.model)
        if kind == "measure" and work.operations:
            raise ProtocolError(f"member {member} sent a measure that operates: {work.operations}")
        if sum(isinstance(one, m.GatherGradients) for one in work.operations) > 1:
            raise ProtocolError(f"member {member} sent work that gathers gradients twice")
        if not 0 < request.weight < math.inf:
            raise ProtocolError(f"member {member} sent work of weight {request.weight}, expected > 0")

    def _check_carried(self, member: int, carried: m.Carried) -> None:
        self._members.staging(member, carried.model)
        tensors = len(self._vectors[carried.model].layout.tensors)
        if len(carried.tensors) != -(-tensors // 8):
            raise ProtocolError(
                f"a mask of {len(carried.tensors)} bytes for {tensors} tensors: expected {-(-tensors // 8)}"
            )
        if int.from_bytes(carried.tensors, "little") >> tensors:
            raise ProtocolError(f"a mask names more than the {tensors} tensors of model {carried.model}")

    def _check_state(self, member: int, request: m.LoadState, rows: Sequence[StagedRows]) -> None:
        self._check_carried(member, request.carried)
        vector = self._vectors[request.carried.model]
        if request.states != tuple(vector.states) or len(request.counts) != len(vector.layout.tensors):
            raise ProtocolError(
                f"states {request.states} and {len(request.counts)} counts for model {vector.spec.name!r}: "
                f"expected {tuple(vector.states)} and {len(vector.layout.tensors)}"
            )
        if min(request.counts) < 0 or request.updates < -1:
            raise ProtocolError(f"{min(request.counts)} updates of a tensor, {request.updates} of the model")


_CHECKS: dict[type, Callable[[Checks, int, Any, Sequence[StagedRows]], None]] = {
    m.Step: Checks._check_step,
    m.Register: Checks._check_declaration,
    m.RegisterTable: Checks._check_declaration,
    m.Attach: Checks._check_attach,
    m.Meet: Checks._check_meeting,
    m.Operate: Checks._check_operate,
    m.NextPortion: Checks._check_portion,
    m.Assign: Checks._check_assign,
    m.LoadState: Checks._check_state,
    m.Pull: Checks._check_pull,
    m.ReadState: Checks._check_read_state,
    m.CountRows: Checks._check_table,
    m.Publish: Checks._check_publish,
    m.PullRows: Checks._check_rows,
    m.DeleteRows: Checks._check_rows,
    m.AssignRows: Checks._check_assigned_rows,
}
"""By the class of a request; others need no check."""


def check_declared(spec: m.ModelSpec | m.TableSpec) -> None:
    """Refuse a model or table that cannot be; blocks while the loops of its rules are compiled.

    Raises:
        RegistrationError: an impossible layout, merge or dim.
        ConfigurationError: a rule, initialiser, admission or expiry that is unknown, or cannot be run.
    """
    if isinstance(spec, m.TableSpec):
        check_table(spec)
    else:
        _check_model(spec)


def _check_pace(member: int, pace: m.Pace) -> None:
    """Raise ProtocolError unless times can be these."""
    if not (0 <= pace.step_s < math.inf and 0 <= pace.sync_s < math.inf and 0 <= pace.overlap < 2**31):
        raise ProtocolError(f"member {member} says that its pace is {pace}, expected numbers from 0")


def _check_model(spec: m.ModelSpec) -> None:
    layout = Layout(spec.tensors)
    if not 0 <= int(layout.groups.min()) <= int(layout.groups.max()) < len(spec.rules):
        raise RegistrationError(
            f"model {spec.name!r}: tensors name parameter groups {sorted(set(layout.groups.tolist()))}, "
            f"but there are rules for {len(spec.rules)}"
        )
    if spec.clip_norm is not None and not 0 < spec.clip_norm < math.inf:
        raise RegistrationError(f"model {spec.name!r}: clip_norm={spec.clip_norm}, expected a number > 0")
    parse_codec(spec.codec), parse_values_codec(spec.values_codec)
    if spec.merge is not None:
        parse_merge(spec.merge)
    for rule in map(from_spec, spec.rules):
        if rule.always_sum and spec.merge not in (None, "sum"):
            raise RegistrationError(
                f"model {spec.name!r}: {rule.name} adds up what is pushed, got merge={spec.merge!r}"
            )
        if rule.rows_only:
            raise RegistrationError(f"model {spec.name!r}: {rule.name} is a rule for tables' rows only")
        if rule.layerwise and (spec.clip_norm is not None or spec.merge == "rda"):
            raise RegistrationError(
                f"model {spec.name!r}: {rule.name} with clip_norm={spec.clip_norm}, merge={spec.merge!r}: "
                f"each needs norms before the other"
            )
        check_runs(rule, dense)
    layerwise = any(from_spec(rule).layerwise for rule in spec.rules)
    compile_for_model(
        measured=spec.clip_norm is not None or spec.outer or spec.merge == "rda" or layerwise,
        merged=spec.merge not in (None, "mean", "sum"),
        coded=spec.codec is not None or spec.values_codec is not None,
    )
