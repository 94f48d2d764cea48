"""Every message that crosses a connection, and every entry of the log, as frozen structs.

Nothing here encodes, sends or decides. Each union is closed: a decoder given one of them can
produce only the structs listed. Ids:

- `member` names one incarnation of a node (a restarted worker has the same rank, another member);
- `number` counts the exchanges of one member from 1; `step` counts its steps from 1;
- `model` numbers the models from 0 in the order of their register entries: the same on all servers.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Scalar: TypeAlias = bool | int | float | str | None
Role: TypeAlias = Literal["worker", "server", "observer"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What all of them share: immutable, tagged with the class name, strict."""


# ── the roster ──────────────────────────────────────────────────────────────────────────────────


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One incarnation of a node. `index` is a server's index or a worker's rank; -1 for observers."""

    id: int
    role: Role
    index: int
    pid: int
    host: str
    addresses: tuple[str, ...] = ()


class Join(Message, frozen=True):
    """A node asks the coordinator to become a member; `index` None takes the next free one."""

    role: Role
    index: int | None
    pid: int
    host: str
    addresses: tuple[str, ...] = ()


class Welcome(Message, frozen=True):
    """The coordinator's answer to Join, once every server knows the new member.

    `position`: what the log last recorded of this rank's reading; None where it recorded nothing.
    """

    member: Member
    term: int
    servers: tuple[Member, ...]
    workers: int
    sync: str
    settings: dict[str, Scalar]
    patience: float
    deadline: float
    position: Position | None = None


class Roster(Message, frozen=True):
    """Who is a member in this term; from the coordinator to every server."""

    term: int
    workers: int
    members: tuple[Member, ...]


class Progress(Message, frozen=True):
    """A worker's own statistics, to the coordinator. `waiting` and `elapsed` in seconds.

    `planned`: samples that the `batches` begun so far have for this worker, 0 where there were none; an
    estimate while it reads dynamic splits: its share so far of all that there is.
    """

    member: int
    rank: int
    steps: int
    version: int
    samples: int
    planned: int
    waiting: float
    elapsed: float
    staleness: dict[int, int]
    metrics: dict[str, float]


class Departed(Message, frozen=True):
    """A member has left the log and will close; its connection's end is not a death."""

    member: int


class Acknowledged(Message, frozen=True):
    """Done."""


class Refused(Message, frozen=True):
    """Not done, and why; `error` is the name of a class in `headwater.errors`."""

    error: str
    reason: str


# ── models ──────────────────────────────────────────────────────────────────────────────────────


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor of a model and the parameter group it belongs to."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0


class RuleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule by name, with its settings; the receiver looks the name up among its loaded rules.

    A setting that is itself a named object (a schedule) is a RuleSpec of its own.
    """

    name: str
    settings: dict[str, Scalar | RuleSpec]


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is: tensors in order, and one rule per parameter group."""

    name: str
    tensors: tuple[TensorSpec, ...]
    rules: tuple[RuleSpec, ...]


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a table is: `dim` float32 a row, its rule, how its rows begin and end (None: at once, never)."""

    name: str
    dim: int
    rule: RuleSpec
    initializer: RuleSpec
    seed: int
    admission: RuleSpec | None
    expiry: RuleSpec | None


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A descriptor that travels with the message: a window of `size` bytes, laid out as the message says."""

    generation: int
    size: int


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Elements [start, stop) of a model's flat vector whose float32 values are in the payload."""

    model: int
    start: int
    stop: int


class Rows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` ids of a table that one server holds, each once, and a row for each.

    `ids` and `rows`: byte offsets of int64[count] and float32[count, dim] in the member's scratch window.
    Without one the ids are in the payload of the request, and rows in that of whoever writes them.
    """

    table: int
    count: int
    ids: int
    rows: int


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of `size` bytes: elements [start, stop) of a model, or slots [start, stop) of a table."""

    name: str
    sha256: str
    size: int
    start: int
    stop: int


class ModelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as of a checkpoint; `files` by server, only the sender's own where a server reports it."""

    spec: ModelSpec
    rules: tuple[RuleSpec, ...]
    counts: tuple[int, ...]
    updates: int
    states: tuple[str, ...]
    files: tuple[FileRecord, ...]


class TableRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table as of a checkpoint; `states`: name → floats a row; `rows` and `pending` ids in `files`."""

    spec: TableSpec
    rule: RuleSpec
    updates: int
    states: dict[str, int]
    rows: int
    pending: int
    files: tuple[FileRecord, ...]


class PartRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one server wrote for a checkpoint."""

    server: int
    models: tuple[ModelRecord, ...]
    tables: tuple[TableRecord, ...]


# ── who reads which samples ─────────────────────────────────────────────────────────────────────


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Positions [start, stop) in the order of an epoch."""

    epoch: int
    start: int
    stop: int


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a worker's static part in one call of `batches` is: `done` of `size` samples of `epoch`."""

    call: int
    epochs: int
    size: int
    epoch: int
    done: int


class Visit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a step adds to the done part of a data set of `size` samples that all workers read together."""

    call: int
    epochs: int
    size: int
    spans: tuple[Span, ...]


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a worker is in its data: what is done once the step that carries this is committed.

    `call` numbers the calls of `batches` and `splits` of one incarnation from 0, in the order in which
    they were begun. Calls before `over` are over; `places` and `visits` are of calls that are not.
    """

    rank: int
    over: int
    places: tuple[Place, ...] = ()
    visits: tuple[Visit, ...] = ()


class Visited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is done of a call with dynamic splits: `complete` epochs, and `spans` of those after them."""

    call: int
    epochs: int
    size: int
    complete: int
    spans: tuple[Span, ...]


class Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All positions at one position of the log. `last`: by rank; calls before `first` are over for all."""

    last: tuple[Position, ...] = ()
    visited: tuple[Visited, ...] = ()
    first: int = 0


class Lease(Message, frozen=True):
    """From a worker to the coordinator: the next split, please; what was leased before is handed out.

    The same call is made by all workers, so `call`, `epochs`, `size`, `shuffle` and `seed` must agree.
    `pending`: of the samples handed out, how many are not part of a committed step yet, the last ones.
    """

    number: int
    call: int
    epochs: int
    size: int
    shuffle: bool
    seed: int
    batch: int
    pending: int


class Leased(Message, frozen=True):
    """A split for one worker alone. `handed` of the `total` samples still to do are leased or done by now."""

    number: int
    span: Span
    handed: int
    total: int


class Unleased(Message, frozen=True):
    """No split: the call is `over`, or another answer will follow, when what `reason` says has changed."""

    number: int
    over: bool
    reason: str


class Finish(Message, frozen=True):
    """From a worker to the coordinator: it reads no more of this call.

    The last `left` samples of its split go back; with `stopped` nobody is leased more of the call.
    """

    call: int
    left: int
    stopped: bool


class Unvisited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples of a call that nobody reads any more: of a rank's part, or (`rank` None) of what all shared."""

    call: int
    rank: int | None
    samples: int


# ── from a worker to each server: one exchange at a time ────────────────────────────────────────


class Hello(Message, frozen=True):
    """First message on every connection to a server."""

    member: int
    role: Literal["worker", "server", "observer", "coordinator"]
    term: int


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


class Carried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tensors of a model a step carries: bit i of `tensors` (little-endian) is tensor i."""

    model: int
    tensors: bytes


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New scalars for the rule of one parameter group of a model (-1: all groups)."""

    model: int
    group: int
    values: dict[str, float]


class TableSetting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New scalars for the rule of a table."""

    table: int
    values: dict[str, float]


class Step(Message, frozen=True):
    """One turn. `seen` is the version the gradients were computed on.

    `read` asks for values: of all the member's models, of none, or of these. `pushed` are gradients of rows,
    `pulled` rows that the answer brings. The payload has runs first, then ids and gradients of each of
    `pushed`, then ids of each of `pulled`; that of the answer has values first, then rows. `position`: where
    the worker is in its data once this is committed; None where it reads none.
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


class Pull(Message, frozen=True):
    """Ask for the values of `models`, unless they have not changed since version `have`."""

    number: int
    models: tuple[int, ...]
    have: int


class PullRows(Message, frozen=True):
    """Ask for rows of a table; where there is none yet, for what it would begin with."""

    number: int
    rows: Rows


class DeleteRows(Message, frozen=True):
    """Forget ids of a table; the answer's payload counts those that had a row, int64[1]."""

    number: int
    rows: Rows


class CountRows(Message, frozen=True):
    """Ask how many rows a table has; they are the answer's payload, int64[1]."""

    number: int
    table: int


class ReadState(Message, frozen=True):
    """Ask for the rule's state of a model, as payload."""

    number: int
    model: int


class Assign(Message, frozen=True):
    """Set the carried tensors to what lies in the window's parameters or in the payload."""

    number: int
    carried: Carried
    payload: tuple[Run, ...] = ()


class Meet(Message, frozen=True):
    """Wait until every other member is here too; `values` are added up in rank order."""

    number: int
    kind: Literal["barrier", "sum"]
    values: dict[str, float]


class End(Message, frozen=True):
    """The worker's batches are over: rounds no longer wait for it."""

    number: int
    position: Position | None = None


class Stop(Message, frozen=True):
    """End everybody's batches with their next answer."""

    number: int


class Leave(Message, frozen=True):
    """The worker goes for good."""

    number: int


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
    | CountRows
    | ReadState
    | Assign
    | Meet
    | End
    | Stop
    | Leave
)


class StepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a step."""

    version: int
    applied: bool
    contributors: int
    staleness: int


class Answer(Message, frozen=True):
    """The end of an exchange. `version` is that of the values now in the window or the payload.

    `values`: the models whose values were written (or follow, in this order, each this server's
    whole range); `result`: of a step; `model`, `table`: the id given to what was registered. `states`: names
    of the rule's state vectors whose range follows, in this order; `counts`: updates of each tensor.
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


class Waiting(Message, frozen=True):
    """Not an answer yet, and whom it waits for; sent each time another `patience` has passed."""

    number: int
    reason: str


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A registered model with its id."""

    model: int
    spec: ModelSpec


class Description(Message, frozen=True):
    """Answer to Describe."""

    number: int
    version: int
    models: tuple[ModelInfo, ...]
    tables: tuple[TableSpec, ...] = ()


# ── the log ─────────────────────────────────────────────────────────────────────────────────────


Kind: TypeAlias = Literal[
    "register",
    "table",
    "attach",
    "step",
    "pull",
    "state",
    "assign",
    "delete",
    "barrier",
    "sum",
    "end",
    "stop",
    "leave",
]


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server holds exchange `number` of `member` completely."""

    member: int
    number: int
    kind: Kind
    name: str = ""


class Reports(Message, frozen=True):
    """From a server to the sequencer."""

    server: int
    held: tuple[Held, ...]


class Entry(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One position of the log; every server processes entries strictly in order."""

    position: int


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one exchange of one member."""

    member: int
    number: int


class Registered(Entry, frozen=True):
    """A model or table comes into being as `source` declared it, whose registration this answers."""

    source: Ticket


class Committed(Entry, frozen=True):
    """Updates, in rank order, applied as one; those in `answered` get their answer here."""

    version: int
    updates: tuple[Ticket, ...]
    answered: tuple[Ticket, ...]


class Served(Entry, frozen=True):
    """Answer this exchange with the values as of this position."""

    ticket: Ticket


class Assigned(Entry, frozen=True):
    """Values set or rows deleted by a worker; a version of its own."""

    version: int
    source: Ticket


class Activated(Entry, frozen=True):
    """From here on rounds wait for these members."""

    members: tuple[int, ...]


class Retired(Entry, frozen=True):
    """From here on rounds do not wait for this member; `gone` means for good."""

    member: int
    gone: bool
    reason: str
    answered: Ticket | None = None


class Met(Entry, frozen=True):
    """Everybody is at the same barrier or sum: all are answered, all active again."""

    tickets: tuple[Ticket, ...]


class Stopped(Entry, frozen=True):
    """The next answered step of each of these members tells it to end its batches."""

    ticket: Ticket
    members: tuple[int, ...]


class Stalled(Entry, frozen=True):
    """These exchanges wait for each other and fail with this reason."""

    tickets: tuple[Ticket, ...]
    reason: str


AnyEntry: TypeAlias = (
    Registered | Committed | Served | Assigned | Activated | Retired | Met | Stopped | Stalled
)


class Entries(Message, frozen=True):
    """From the sequencer to a server."""

    entries: tuple[AnyEntry, ...]


# ── what a person sees ──────────────────────────────────────────────────────────────────────────


class Ask(Message, frozen=True):
    """Ask the coordinator or a server for its statistics."""


class ModelStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one server; sizes in bytes."""

    name: str
    rule: str
    tensors: int
    elements: int
    updates: int
    resident: int


class TableStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table on one server, since it exists.

    `rows`: that exist now, expired ones that were not swept yet included. `resident`: bytes. `refused`: ids
    whose gradient admission dropped; `expired`: rows that expiry ended; `pulled`: ids that were pulled,
    `hits` of them had a row.
    """

    name: str
    dim: int
    rule: str
    rows: int
    resident: int
    updates: int
    refused: int
    expired: int
    pulled: int
    hits: int

    @property
    def hit_ratio(self) -> float:
        """Share of pulled ids that had a row; 1 before the first pull."""
        return self.hits / self.pulled if self.pulled else 1.0


class ServerStatistics(Message, frozen=True):
    """One server. `waits` maps a member to whom its exchange waits for (server 0 only).

    `recorded`: where every rank is in its data, as of `position`.
    """

    index: int
    version: int
    position: int
    term: int
    exchanges: int
    models: tuple[ModelStatistics, ...]
    tables: tuple[TableStatistics, ...]
    waits: dict[int, str]
    recorded: Recorded = Recorded()


class NodeStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One node in the coordinator's answer; exactly one of `index` and `rank` is set."""

    role: str
    pid: int
    address: str
    term: int
    version: int
    waits_for: str | None
    index: int | msgspec.UnsetType = msgspec.UNSET
    rank: int | msgspec.UnsetType = msgspec.UNSET


class ClusterStatistics(Message, frozen=True):
    """The coordinator's answer to Ask.

    `tables` in all, over the servers; `unvisited`: samples that a worker left, and nobody took over.
    """

    term: int
    version: int
    workers: int
    sync: str
    nodes: tuple[NodeStatistics, ...]
    models: tuple[ModelStatistics, ...]
    tables: tuple[TableStatistics, ...]
    progress: tuple[Progress, ...]
    unvisited: tuple[Unvisited, ...] = ()


AnyMessage: TypeAlias = (
    Join
    | Welcome
    | Roster
    | Progress
    | Departed
    | Acknowledged
    | Refused
    | Lease
    | Leased
    | Unleased
    | Finish
    | Hello
    | Register
    | RegisterTable
    | Scratch
    | Attach
    | Step
    | Pull
    | PullRows
    | DeleteRows
    | CountRows
    | ReadState
    | Assign
    | Meet
    | End
    | Stop
    | Leave
    | Describe
    | Answer
    | Waiting
    | Description
    | Reports
    | Entries
    | Ask
    | ServerStatistics
    | ClusterStatistics
)
