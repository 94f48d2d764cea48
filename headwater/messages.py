"""Every message that crosses a connection, and every entry of the log, as frozen structs.

Nothing here encodes, sends or decides. Each union is closed: a decoder given one of them can
produce only the structs listed. Ids:

- `member` names one incarnation of a node (a restarted worker has the same rank, another member);
- `number` counts the exchanges of one member from 1; `step` counts its steps from 1;
- `attempt` counts the generations of a member's connections from 0: when it loses one of them it closes
  all, connects to every server again and repeats its outstanding exchange, with the same `number`;
- `term` of the log is the term of the roster at which its present sequencer began;
- `model` numbers the models from 0 in the order of their register entries: the same on all servers.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Scalar: TypeAlias = bool | int | float | str | None
Role: TypeAlias = Literal["worker", "server", "standby", "observer"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What all of them share: immutable, tagged with the class name, strict."""


# ── the roster ──────────────────────────────────────────────────────────────────────────────────


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One incarnation of a node. `index` is that of a server or standby, a worker's rank, or -1."""

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
    """The coordinator's answer to Join, once every server knows the new member, and to Rejoin.

    `position`: what the log last recorded of this rank's reading; None where it recorded nothing, and after
    Rejoin. `key`: what this member must show to Rejoin. `returns`: whether a coordinator that is gone may
    come back, on its journal.
    """

    member: Member
    term: int
    servers: tuple[Member, ...]
    workers: int
    sync: str
    settings: dict[str, Scalar]
    patience: float
    deadline: float
    heartbeat: float = 5.0
    generation: int = 0
    position: Position | None = None
    key: str = ""
    returns: bool = False


class Rejoin(Message, frozen=True):
    """A member comes back to a coordinator that was gone, or that it lost the connection to.

    `key` and `generation` as it was welcomed with.
    """

    member: int
    key: str
    generation: int


class Roster(Message, frozen=True):
    """Who is a member in this term; from the coordinator to every server and standby.

    `since`: the term in which the servers became those of now, and their sequencer began. `caught_up`: ids
    of standbys that have all that their servers have. `generation` counts the times that everything began
    anew from a checkpoint.
    """

    term: int
    workers: int
    members: tuple[Member, ...]
    since: int = 0
    caught_up: tuple[int, ...] = ()
    generation: int = 0


class Heartbeat(Message, frozen=True):
    """From a member to the coordinator, now and then: it lives."""


class Locate(Message, frozen=True):
    """From a member that lost a connection to the coordinator: where are the servers now?"""


class Whereabouts(Message, frozen=True):
    """The answer to Locate; `servers` by index, fewer than all while one has nobody to take over."""

    term: int
    servers: tuple[Member, ...]


class CaughtUp(Message, frozen=True):
    """From a server to the coordinator: this standby has all that it has, and will from now on."""

    standby: int


class Mislaid(Message, frozen=True):
    """From a server to the coordinator: it lost the connection to this standby."""

    standby: int


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
    """No split: the call is `over`, or another answer will follow, when what `reason` says has changed.

    `failure`: the request was impossible.
    """

    number: int
    over: bool
    reason: str
    failure: Refused | None = None


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
    attempt: int = 0


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


class Checkpoint(Message, frozen=True):
    """Have every server take a snapshot at one position of the log: the first of version `at` or later."""

    number: int
    at: int = 0


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
    | CountRows
    | ReadState
    | Assign
    | Meet
    | End
    | Stop
    | Leave
    | Checkpoint
)


class StepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a step: applied as part of `version`, or too late for it and dropped.

    `staleness`: commits between the version its gradients were computed on and this one.
    """

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


class Stored(Message, frozen=True):
    """Answer to Store: what this server wrote and the log's standings then; or why it could not."""

    number: int
    part: PartRecord | None
    standings: StandingsRecord | None = None
    recorded: Recorded | None = None
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
    "checkpoint",
]

Phase: TypeAlias = Literal["new", "active", "ended", "meeting", "observer"]
"""`new`: joined, not yet activated; `ended`: its batches are over; `meeting`: in a barrier or sum."""


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server holds exchange `number` of `member` completely, as it came with `attempt`."""

    member: int
    number: int
    kind: Kind
    name: str = ""
    attempt: int = 0


class Reports(Message, frozen=True):
    """From a server to the sequencer of `term`.

    `prepared`: it has all entries up to this position, and so has its standby where there is one.
    """

    server: int
    held: tuple[Held, ...]
    term: int = 0
    prepared: int = 0


class Entry(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One position of the log; every server processes entries strictly in order."""

    position: int


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one exchange of one member, and the newest attempt with which every server holds it."""

    member: int
    number: int
    attempt: int = 0


class Newcomer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member that joined; `rank` is -1 for observers."""

    member: int
    rank: int


class Enrolled(Entry, frozen=True):
    """These joined a cluster that declared `workers` workers; ids are larger than all before."""

    workers: int
    members: tuple[Newcomer, ...]


class Registered(Entry, frozen=True):
    """A model or table comes into being as `source` declared it, whose registration this answers."""

    source: Ticket
    name: str = ""
    kind: Kind = "register"


class Committed(Entry, frozen=True):
    """Updates, in rank order, applied as one; those in `answered` get their answer here."""

    version: int
    updates: tuple[Ticket, ...]
    answered: tuple[Ticket, ...]


class Served(Entry, frozen=True):
    """Answer this exchange with the values as of this position; the first time, or once more."""

    ticket: Ticket
    kind: Kind = "pull"


class Late(Entry, frozen=True):
    """This step came after its round was closed: it is answered, but its gradients are not applied."""

    ticket: Ticket


class Assigned(Entry, frozen=True):
    """Values set or rows deleted by a worker; a version of its own."""

    version: int
    source: Ticket


class Activated(Entry, frozen=True):
    """From here on rounds wait for these members, whose clocks are `clock` now."""

    members: tuple[int, ...]
    clock: int = 0


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


class Checkpointed(Entry, frozen=True):
    """Every server takes a snapshot here."""

    ticket: Ticket


AnyEntry: TypeAlias = (
    Enrolled
    | Registered
    | Committed
    | Served
    | Late
    | Assigned
    | Activated
    | Retired
    | Met
    | Stopped
    | Stalled
    | Checkpointed
)


class Entries(Message, frozen=True):
    """From the sequencer of `term` to a server; entries up to position `committed` may be applied."""

    entries: tuple[AnyEntry, ...]
    term: int = 0
    committed: int = 0


class Inputs(Message, frozen=True):
    """From a server to its standby: an entry, and what of its effect the log does not say.

    `requests`: those that the entry names, by member. The payload has, for each (model, elements) of
    `models`, this server's range: reduced gradients, assigned or (model -1) initial values; then, for each
    (table, count, dim) of `tables`, int64[count] ids and their reduced gradients, float32[count, dim].
    `term` is that in which it is sent, `written` that of the sequencer that wrote the entry.
    """

    term: int
    entry: AnyEntry
    requests: tuple[tuple[int, Request], ...]
    models: tuple[tuple[int, int], ...] = ()
    tables: tuple[tuple[int, int, int], ...] = ()
    written: int = 0


class Chunk(Message, frozen=True):
    """From a server to its standby: shared memory number `chunk`, of `size` bytes; with its descriptor."""

    chunk: int
    size: int


class Shipment(Message, frozen=True):
    """From a server to its standby: the next entry, and how far the log is committed.

    `chunks`: for each array of the inputs' payload the shared memory that it begins, or -1 where it is
    part of this frame's payload.
    """

    inputs: Inputs
    committed: int
    chunks: tuple[int, ...]


class Advance(Message, frozen=True):
    """From a server to its standby: the log is committed up to here."""

    term: int
    committed: int


class Followed(Message, frozen=True):
    """From a standby to its server: up to which position it has and has applied entries, as of `term`."""

    term: int
    prepared: int
    applied: int


class Agreed(Message, frozen=True):
    """A new sequencer began: entries up to `position` stand, what a server has after it is discarded.

    A promoted standby serves members only once it has applied up to there: they may have seen all of it.
    """

    term: int
    position: int


# ── what follows from the log ───────────────────────────────────────────────────────────────────


class MemberRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member as the log has it.

    `over`: its batches are, until it is active again; `answered`, `attempt`: its last answered exchange;
    `committed`: the exchange of its last step that was; `round`: commits before its last answer;
    `stopping`: its next step is told to end its batches.
    """

    member: int
    rank: int
    phase: Phase
    over: bool
    clock: int
    answered: int
    attempt: int
    committed: int
    round: int
    stopping: bool


class StandingsRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about members that follows from the log up to `position`.

    `newest`: the largest id enrolled; `ranks`: ever taken; `finished`: ranks that left by themselves;
    `names`: (kind, name) of what was registered.
    """

    version: int
    position: int
    rounds: int
    late: int
    workers: int
    newest: int
    ranks: tuple[int, ...]
    finished: tuple[int, ...]
    names: tuple[tuple[Kind, str], ...]
    members: tuple[MemberRecord, ...]


class AccountRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member in the ledger: its last step with its result, its last answer without values.

    `count`: what went with that answer as this server's own number.
    """

    member: int
    step: int
    result: StepResult | None
    answer: Answer | None
    count: int | None = None


class ModelPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `ModelSnapshot` but for its arrays: values, then each of `states`, float32; then counts, int64."""

    spec: ModelSpec
    rules: tuple[RuleSpec, ...]
    start: int
    stop: int
    states: tuple[str, ...]
    counts: int
    updates: int


class TablePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `TableSnapshot` but for its arrays, which follow in order; `states`: name, width."""

    spec: TableSpec
    rule: RuleSpec
    rows: int
    last: int
    states: tuple[tuple[str, int], ...]
    pending: int
    updates: int


class Snapshot(Message, frozen=True):
    """From a server to its standby, first: a `ShardSnapshot`, whose arrays are the payload."""

    term: int
    index: int
    servers: int
    position: int
    version: int
    models: tuple[ModelPart, ...]
    changed: tuple[int, ...]
    tables: tuple[TablePart, ...]
    ledger: tuple[AccountRecord, ...]
    standings: StandingsRecord
    recorded: Recorded


class Recovery(Message, frozen=True):
    """A server's answer to a new sequencer: what it has applied, what it could apply, what it holds.

    `written`: for each of `closed` the term of the sequencer that wrote it, for another may have written
    another entry for its position. `agreed`: the last term in which the server was told what stands;
    `prepared`: as in `Reports`.
    """

    term: int
    server: int
    standings: StandingsRecord
    closed: tuple[AnyEntry, ...]
    held: tuple[Held, ...]
    written: tuple[int, ...]
    agreed: int = 0
    prepared: int = 0


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
    """One server or standby. `waits` maps a member to whom its exchange waits for (server 0 only).

    `recorded`: where every rank is in its data, as of `position`.
    """

    member: int
    role: Role
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

    `tables` in all, over the servers; `unvisited`: samples that a worker left, and nobody took over;
    `unreplicated`: indices of servers that should have a caught-up standby and have none.
    """

    term: int
    generation: int
    version: int
    workers: int
    sync: str
    nodes: tuple[NodeStatistics, ...]
    models: tuple[ModelStatistics, ...]
    tables: tuple[TableStatistics, ...]
    progress: tuple[Progress, ...]
    unreplicated: tuple[int, ...] = ()
    unvisited: tuple[Unvisited, ...] = ()


AnyMessage: TypeAlias = (
    Join
    | Welcome
    | Rejoin
    | Roster
    | Heartbeat
    | Locate
    | Whereabouts
    | CaughtUp
    | Mislaid
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
    | Renew
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
    | Checkpoint
    | Describe
    | Answer
    | Store
    | Stored
    | Waiting
    | Description
    | Reports
    | Entries
    | Inputs
    | Agreed
    | Chunk
    | Shipment
    | Advance
    | Followed
    | Snapshot
    | Recovery
    | Ask
    | ServerStatistics
    | ClusterStatistics
)
