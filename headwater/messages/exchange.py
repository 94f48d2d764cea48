"""From a worker to each server, one exchange at a time, and the answers."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from headwater.messages.base import Message, Refused, Scalar
from headwater.messages.checkpoints import PartRecord
from headwater.messages.log import LogStateRecord, Pace
from headwater.messages.models import ModelSpec, Rows, RuleSpec, Run, TableSpec, WindowSpec
from headwater.messages.operations import Portion, PortionPlan, PortionResult, VectorWork
from headwater.messages.programs import Meeting, Recalled
from headwater.messages.publication import Publication, Publish, Taken
from headwater.messages.reading import DataProgress, Position


class Hello(Message, frozen=True):
    """First message on every connection to a server. `cluster`: the sender's, as it was welcomed."""

    member: int
    role: Literal["worker", "server", "observer", "coordinator"]
    term: int
    connection_epoch: int = 0
    cluster: str = ""


class Register(Message, frozen=True):
    """Declare a model; its initial values are in the window's parameters, or are the payload.

    The window holds gradients in its first half and parameters in the second.
    """

    number: int
    spec: ModelSpec
    window: WindowSpec | None


class RegisterTable(Message, frozen=True):
    """Declare a table."""

    number: int
    spec: TableSpec


class Scratch(Message, frozen=True):
    """From now on `Rows` of this member lie in this window; not an exchange, never answered."""

    window: WindowSpec


class Attach(Message, frozen=True):
    """A reader or a repeating worker gives (another) window, or asks for answers by payload."""

    number: int
    model: int
    window: WindowSpec | None


class Renew(Message, frozen=True):
    """After a new Hello: the member's window for a model that it has registered; never answered."""

    model: int
    window: WindowSpec | None


class Carried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tensors of a model a step carries: bit i of `tensors` (little-endian) is tensor i."""

    model: int
    tensors: bytes


class Coded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Elements [start, stop) of a model's vector, all of one tensor, whose gradients are in the payload as
    `size` bytes that the model's codec made.
    """

    model: int
    start: int
    stop: int
    size: int


SettingValue: TypeAlias = Scalar | RuleSpec
"""A scalar, or a schedule."""


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New settings for the rule of one parameter group of a model (-1: all groups).

    `governs`: they are those of a program that says at each step what the settings are, changed or not. Of
    such programs that of the lowest active rank counts.
    """

    model: int
    group: int
    values: dict[str, SettingValue]
    governs: bool = False


class TableSetting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New settings for the rule of a table; `governs` as of `Setting`."""

    table: int
    values: dict[str, SettingValue]
    governs: bool = False


class Step(Message, frozen=True):
    """One turn. `seen` is the version the gradients were computed on.

    `read` asks for values: of all the member's models, of none, or of these. `pushed` are gradients of rows,
    `pulled` rows that the answer brings. The payload has runs first, then what is `coded`, then ids and
    gradients of each of `pushed`, then ids of each of `pulled`; that of the answer has values first, then
    rows. Rows of a table with a codec are its bytes, where they are no memory that is shared.
    `position`: where the worker is in its data once this is committed; None where it reads none. `weight`:
    what its gradients count in a mean over the contributors, > 0. `known`, `known_tables`: the fingerprint of
    the rules that the member knows to be in force, by model and table; the answer has those that are others.
    `kept`: what its rank keeps from then on, encoded; None where that has not changed. `pace`: of an outer
    step, how fast local ones are made. `fragment`: of an outer step, the model whose change it sends; -1 of
    any other.
    """

    number: int
    step: int
    seen: int
    carried: tuple[Carried, ...]
    settings: tuple[Setting, ...]
    read: bool | tuple[int, ...]
    payload: tuple[Run, ...] = ()
    pushed: tuple[Rows, ...] = ()
    pulled: tuple[Rows, ...] = ()
    table_settings: tuple[TableSetting, ...] = ()
    position: Position | None = None
    weight: float = 1.0
    known: tuple[tuple[int, int], ...] = ()
    known_tables: tuple[tuple[int, int], ...] = ()
    kept: bytes | None = None
    coded: tuple[Coded, ...] = ()
    pace: Pace | None = None
    fragment: int = -1


class Pull(Message, frozen=True):
    """Ask for the values of `models`, unless they have not changed since version `have`.

    A `Read`: each server answers at once with what it has applied, so the versions of the answers may differ;
    with version `UNREAD` where it cannot answer at once. `ordered`: by an entry of the log instead, so that
    all servers answer with one version.
    """

    number: int
    models: tuple[int, ...]
    have: int
    ordered: bool = False


class PullRows(Message, frozen=True):
    """Ask for rows of tables, each named once; where there is none yet, for what it would begin with.

    A `Read`; `ordered` as of `Pull`.
    """

    number: int
    rows: tuple[Rows, ...]
    ordered: bool = False


class DeleteRows(Message, frozen=True):
    """Forget ids of a table; the answer's payload counts those that had a row, int64[1]."""

    number: int
    rows: Rows


class AssignRows(Message, frozen=True):
    """Set rows of a table. Each is `width` float32: values, and with `state` each of the rule's states and
    the count of updates, whose int32 bits are there; without, these are as before a first update.
    """

    number: int
    rows: Rows
    width: int
    state: bool


class CountRows(Message, frozen=True):
    """Ask how many rows a table has; they are the answer's payload, int64[1].

    A `Read`; `ordered` as of `Pull`.
    """

    number: int
    table: int
    ordered: bool = False


Read: TypeAlias = Pull | PullRows | CountRows
"""What changes nothing, so that it may be answered outside the log."""

UNREAD = -1
"""The version of an answer that brings nothing, as this server cannot say at once what is current."""


class ReadState(Message, frozen=True):
    """Ask for the rule's state of a model, as payload."""

    number: int
    model: int


class ProgramWrite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The program wrote what is assigned to its parameters, as those of other ranks may have done too.

    `digest`: of what it wrote; `step`: how many steps this worker had made.
    """

    digest: int
    step: int


class Assign(Message, frozen=True):
    """Set the carried tensors to what lies in the window's parameters or in the payload."""

    number: int
    carried: Carried
    payload: tuple[Run, ...] = ()
    written: ProgramWrite | None = None


class LoadState(Message, frozen=True):
    """Set the rule's state of the carried tensors: the payload has this server's range of each of `states`.

    `counts`: updates of each tensor of the model, in the order of its layout; `updates`: of the model, -1 for
    those that it has had.
    """

    number: int
    carried: Carried
    states: tuple[str, ...]
    counts: tuple[int, ...]
    updates: int = -1
    written: ProgramWrite | None = None


class Meet(Message, frozen=True):
    """Wait until every other member is here too; a meeting that has ended gives its result again.

    `values` are added up in rank order, `data` is gathered or broadcast. `position` and `kept`: as of a Step,
    recorded when the meeting ends. `work`: what the servers then do with vectors, the same of all members;
    where it gathers gradients, they lie in the window or follow as `payload`, of all tensors, and `weight` is
    what they count in a mean.
    """

    number: int
    meeting: Meeting
    values: dict[str, float]
    data: bytes = b""
    position: Position | None = None
    kept: bytes | None = None
    work: VectorWork | None = None
    weight: float = 1.0
    payload: tuple[Run, ...] = ()


class Operate(Message, frozen=True):
    """Have the servers work on vectors, for this worker alone.

    `plan`: an evaluation follows, which other workers compute portion by portion; the answer comes when all
    are counted, with the sum of their losses.
    """

    number: int
    work: VectorWork
    plan: PortionPlan | None = None


class NextPortion(Message, frozen=True):
    """Bring the result of a portion, if there is one, and ask for the next; the answer brings the model's
    values, unless they have not changed since version `have`. Without a portion in it there is none to come.
    """

    number: int
    model: int
    have: int
    done: PortionResult | None = None
    payload: tuple[Run, ...] = ()


class Recall(Message, frozen=True):
    """From a worker that has joined: what does the log know of its rank?"""

    number: int


class End(Message, frozen=True):
    """The worker's batches are over: rounds no longer wait for it. `position`, `kept`: as of a Step.

    `stalled`: they can never go on, as meetings that wait for this worker cannot; why.
    """

    number: int
    position: Position | None = None
    kept: bytes | None = None
    stalled: str = ""


class Stop(Message, frozen=True):
    """End everybody's batches with their next answer."""

    number: int


class Leave(Message, frozen=True):
    """The worker goes for good. `finished`: having done all that it was to do; the others as of a Step."""

    number: int
    finished: bool = True
    position: Position | None = None
    kept: bytes | None = None


class Checkpoint(Message, frozen=True):
    """Have every server take a snapshot at one position of the log: the first of version `at` or later."""

    number: int
    at: int = 0


class Verify(Message, frozen=True):
    """Have every server, and its standby, sum up what it is at one position of the log."""

    number: int


class Store(Message, frozen=True):
    """Have every server write the snapshot it took into `directory`; answered at once, outside the log."""

    number: int
    directory: str
    generation: int
    version: int


class Describe(Message, frozen=True):
    """Which models and tables are there? Answered at once, outside the log."""

    number: int


Request: TypeAlias = (
    Register
    | RegisterTable
    | Attach
    | Step
    | Pull
    | PullRows
    | DeleteRows
    | AssignRows
    | CountRows
    | ReadState
    | Assign
    | LoadState
    | Meet
    | Operate
    | NextPortion
    | Recall
    | End
    | Stop
    | Leave
    | Checkpoint
    | Verify
    | Publish
    | Taken
)


class StepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a step.

    Attributes:
        version: of the values that came back: the number of commits.
        applied: whether the update is part of a commit; late ones are dropped, or with `late=carry` kept by
            the worker, which sends them with its next step.
        contributors: workers whose gradients are in the commit that contains this update.
        staleness: commits between the version its gradients were computed on and this one.
        norms: by name of each model that is clipped or merged by lengths, the norm of the commit's gradient,
            before it was clipped.
        reason: why it was not applied, in words; "" where it was.
        correlations: by name of each model with `outer`, the cosine between the commit's change and the one
            before it, from -1 to 1; none where one of the two is 0.
    """

    version: int
    applied: bool
    contributors: int
    staleness: int
    norms: dict[str, float] = {}
    reason: str = ""
    correlations: dict[str, float] = {}


class RulesInForce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rules of a model, by group, or of a table, and how many updates it has had.

    `first`: its rules at its first update, in the answer to a registration; () where it has had none.
    """

    model: int = -1
    table: int = -1
    rules: tuple[RuleSpec, ...] = ()
    updates: int = 0
    first: tuple[RuleSpec, ...] = ()


class Answer(Message, frozen=True):
    """The end of an exchange. `version` is that of the values now in the window or the payload.

    `values`: the models whose values were written (or follow, in this order, each this server's whole range,
    as the model's codec for values makes it); `result`: of a step; `model`, `table`: the id given to what was
    registered. `states`: names of the rule's state vectors whose range follows, in this order; `counts`:
    updates of each tensor. `notice`: what a person should know of it. `rules`: in force, where the member may
    not know them. `sums`, `data`, `ranks`: of a meeting, and who was in it; `totals`: of its reductions of
    vectors. `portion`: to be computed next.
    """

    number: int
    version: int
    values: tuple[int, ...] = ()
    result: StepResult | None = None
    model: int | None = None
    table: int | None = None
    sums: dict[str, float] | None = None
    states: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    stopped: bool = False
    failure: Refused | None = None
    notice: str = ""
    rules: tuple[RulesInForce, ...] = ()
    ranks: tuple[int, ...] = ()
    data: tuple[bytes, ...] = ()
    recalled: Recalled | None = None
    totals: tuple[float, ...] = ()
    portion: Portion | None = None


class Stored(Message, frozen=True):
    """Answer to Store: what this server wrote and the log's standings then; or why it could not."""

    number: int
    part: PartRecord | None
    standings: LogStateRecord | None = None
    recorded: DataProgress | None = None
    failure: Refused | None = None


class Waiting(Message, frozen=True):
    """Not an answer yet, and whom it waits for; sent each time another `patience` has passed."""

    number: int
    reason: str


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A registered model with its id."""

    model: int
    spec: ModelSpec


class Description(Message, frozen=True):
    """Answer to Describe. `version` was known to be the newest `age` seconds before the request came: 0 for a
    server, which knows."""

    number: int
    version: int
    models: tuple[ModelInfo, ...]
    tables: tuple[TableSpec, ...] = ()
    age: float = 0.0


ToServer: TypeAlias = Hello | Request | Scratch | Renew | Store | Describe
"""What a member says on its connection to a server."""

FromServer: TypeAlias = Answer | Waiting | Stored | Description | Publication
"""What a server says on a member's connection."""
