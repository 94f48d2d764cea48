"""The log: what servers report, and the entries that the sequencer makes of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from headwater.messages.base import Message
from headwater.messages.operations import Portion, PortionPlan, PortionResult, PortionsRecord
from headwater.messages.programs import Meeting

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
    "gather",
    "broadcast",
    "operate",
    "measure",
    "work",
    "portion",
    "recall",
    "end",
    "stop",
    "leave",
    "checkpoint",
    "verify",
    "publish",
    "taken",
]

Phase: TypeAlias = Literal["new", "active", "ended", "meeting", "observer"]
"""`new`: joined, not yet activated; `ended`: its batches are over; `meeting`: it waits in a meeting."""


class Pace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast a worker makes local steps, as it reports it with an outer step.

    `step_s`: seconds of one. `overlap`: how many it makes before it must have the answer. `sync_s`: what
    sending and receiving takes when nobody is waited for.
    """

    step_s: float
    overlap: int
    sync_s: float


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server holds exchange `number` of `member` completely, as it came with `connection_epoch`.

    `measured`: it is a step whose gradients cannot be applied before all servers have measured them, since a
    model is clipped or merged by lengths; or it is a meeting whose work on vectors has reductions. `weight`:
    of a step, what its gradients count in a mean. `meeting`: the place of a meeting. `pace`: of the worker,
    where its step says so. `plan`: of work that an evaluation follows. `done`: the portion that is brought.
    `current`: what is measured depends on the model too, so it is void after any other commit. `fragment`: of
    an outer step, the model whose change it sends; -1 otherwise.
    """

    member: int
    number: int
    kind: Kind
    name: str = ""
    connection_epoch: int = 0
    measured: bool = False
    weight: float = 1.0
    meeting: Meeting | None = None
    pace: Pace | None = None
    plan: PortionPlan | None = None
    done: PortionResult | None = None
    current: bool = False
    fragment: int = -1


class Sum(msgspec.Struct, frozen=True, array_like=True):
    """Of products: `value` is that of the blocks [index · 2**level, (index + 1) · 2**level) of a model.

    `tensor` -1: of the merged gradient with itself, over the whole model; where `first` and `second` are not
    0, of what is merged (1) and what was at the last commit (2). Otherwise of that tensor's part of the
    gradients of updates number `first` and `second`, `first` ≤ `second`; behind the last one, of the last
    commit's. -1 and -1: of that tensor's values, -2 and -2: of the directions in which its rule goes. Of a
    meeting's work on vectors: of its reduction number `first`, over the whole model; with
    `tensor` -2 `value` is a largest magnitude.
    """

    model: int
    level: int
    index: int
    value: float
    tensor: int = -1
    first: int = 0
    second: int = 0


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server's part of what the Measured entry at `position` asks for; the ranges of all give the whole."""

    position: int
    parts: tuple[Sum, ...]


class Reports(Message, frozen=True):
    """From a server to the sequencer of `term`.

    `prepared`: it has all entries up to this position, and so has its standby where there is one.
    """

    server: int
    held: tuple[Held, ...]
    term: int = 0
    prepared: int = 0
    sums: tuple[Sums, ...] = ()


class Explain(Message, frozen=True):
    """From a server to the sequencer: for what do members wait?"""


class Reasons(Message, frozen=True):
    """The answer: for what a member waits, by id; `otherwise`: what any other waits for."""

    waits: dict[int, str]
    otherwise: str


class Entry(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One position of the log; every server processes entries strictly in order."""

    position: int


class ExchangeId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one exchange of one member, and the newest attempt with which every server holds it."""

    member: int
    number: int
    connection_epoch: int = 0


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

    source: ExchangeId
    name: str = ""
    kind: Kind = "register"


class Measured(Entry, frozen=True):
    """Every server measures these updates, in rank order, and reports; nothing is applied.

    `weights`: as in Committed. Or they are in a meeting, and what is measured are the reductions of its work.
    """

    updates: tuple[ExchangeId, ...]
    weights: tuple[float, ...] = ()


class Scales(msgspec.Struct, frozen=True, array_like=True):
    """What the updates of a commit are multiplied by, in their order, where a tensor is merged by lengths."""

    model: int
    tensor: int
    values: tuple[float, ...]


class Ratio(msgspec.Struct, frozen=True, array_like=True):
    """What a layerwise rule's step of a tensor is multiplied by."""

    model: int
    tensor: int
    value: float


class Committed(Entry, frozen=True):
    """Updates, in rank order, applied as one; those in `answered` get their answer here.

    `norms`: (model, norm of the gradient) for each model that is clipped, or merged by lengths, and that they
    carry. `weights`: what each update counts in a mean; empty where all count the same, 1. `scales`: of each
    tensor that is merged by lengths and that they carry. `correlations`: (model, cosine) of the merged
    gradient and that of the commit before, of each model that says `outer`. `ratios`: of each tensor that
    they carry of a model whose rule is layerwise. `fragments`: of each update the model whose change it is,
    -1 for none; empty where all are -1, and in modes that leave nobody out.
    """

    version: int
    updates: tuple[ExchangeId, ...]
    answered: tuple[ExchangeId, ...]
    norms: tuple[tuple[int, float], ...] = ()
    weights: tuple[float, ...] = ()
    scales: tuple[Scales, ...] = ()
    correlations: tuple[tuple[int, float], ...] = ()
    ratios: tuple[Ratio, ...] = ()
    fragments: tuple[int, ...] = ()


class Served(Entry, frozen=True):
    """Answer this exchange with the values as of this position; the first time, or once more."""

    ticket: ExchangeId
    kind: Kind = "pull"


class Late(Entry, frozen=True):
    """This step came after its round was closed: it is answered, but its gradients are not applied.

    `reason`: of the mode, for a user. `fragment`: as of `Held`.
    """

    ticket: ExchangeId
    reason: str = ""
    fragment: int = -1


class Assigned(Entry, frozen=True):
    """Values set or rows deleted by a worker; a version of its own."""

    version: int
    source: ExchangeId


class Activated(Entry, frozen=True):
    """From here on rounds wait for these members, whose clocks are `clock` now."""

    members: tuple[int, ...]
    clock: int = 0


class Retired(Entry, frozen=True):
    """From here on rounds do not wait for this member; `gone` means for good.

    `finished`: it left having done all that it was to do.
    """

    member: int
    gone: bool
    reason: str
    answered: ExchangeId | None = None
    finished: bool = False


class Met(Entry, frozen=True):
    """Everybody is at meeting `number`: all are answered, all active again. `tickets` are in rank order.

    `version`: of what its work on vectors leaves, where it changes them; otherwise 0. `totals`: of the
    reductions of that work.
    """

    tickets: tuple[ExchangeId, ...]
    number: int = 0
    version: int = 0
    totals: tuple[float, ...] = ()


class Operated(Entry, frozen=True):
    """Work on vectors is done, and answered; `version` is of what it leaves. `totals`: as of Met.

    Where an evaluation followed the work, that is over, and its gradient comes to its vector.
    """

    version: int
    source: ExchangeId
    totals: tuple[float, ...] = ()


class Opened(Entry, frozen=True):
    """Work on vectors is done, and the evaluation that follows it begins; answered when that is over."""

    version: int
    source: ExchangeId
    plan: PortionPlan
    model: int


class Counted(Entry, frozen=True):
    """The first result of a portion counts; whoever brought it is answered by another entry."""

    source: ExchangeId
    done: PortionResult


class Handed(Entry, frozen=True):
    """A member computes this portion next; None: there is none to come."""

    ticket: ExchangeId
    portion: Portion | None


class Stopped(Entry, frozen=True):
    """The next answered step of each of these members tells it to end its batches.

    `ranks`: so does the first one of the next worker with each of these ranks, which nobody has now.
    """

    ticket: ExchangeId
    members: tuple[int, ...]
    ranks: tuple[int, ...] = ()


class Stalled(Entry, frozen=True):
    """These exchanges can never end and fail with this reason."""

    tickets: tuple[ExchangeId, ...]
    reason: str


class Checkpointed(Entry, frozen=True):
    """Every server takes a snapshot here."""

    ticket: ExchangeId


class Published(Entry, frozen=True):
    """Every server copies here what these followers asked for."""

    tickets: tuple[ExchangeId, ...]


AnyEntry: TypeAlias = (
    Enrolled
    | Registered
    | Measured
    | Committed
    | Served
    | Late
    | Assigned
    | Activated
    | Retired
    | Met
    | Operated
    | Opened
    | Counted
    | Handed
    | Stopped
    | Stalled
    | Checkpointed
    | Published
)


class Entries(Message, frozen=True):
    """From the sequencer of `term` to a server; entries up to position `committed` may be applied."""

    entries: tuple[AnyEntry, ...]
    term: int = 0
    committed: int = 0


class MemberRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member as the log has it.

    `over`: its batches are, until it is active again; `answered`, `connection_epoch`: its last answered
    exchange;
    `committed`: the exchange of its last step that was; `round`: commits before its last answer;
    `stopping`: its next step is told to end its batches. `receiving`: its publication is on its way.
    `fragments`: of each fragment the commits before its last answer that had its values.
    """

    member: int
    rank: int
    phase: Phase
    over: bool
    clock: int
    answered: int
    connection_epoch: int
    committed: int
    round: int
    stopping: bool
    receiving: bool = False
    fragments: dict[int, int] = {}


class RankRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank as the log has it: how many incarnations it had, and their steps.

    `over`: the batches of the last one were when it went.
    """

    rank: int
    incarnations: int
    steps: int
    over: bool


class LogStateRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about members that follows from the log up to `position`.

    `newest`: the largest id enrolled; `ranks`: ever taken; `finished`: ranks that left by themselves;
    `names`: (kind, name) of what was registered. `met`: meetings that have ended. `histories`: by rank, over
    all generations. `stopping`: ranks whose next worker is told to end its batches. `fragments`: commits of
    each fragment, by model, in a mode that leaves workers out.
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
    met: int = 0
    histories: tuple[RankRecord, ...] = ()
    stopping: tuple[int, ...] = ()
    portions: PortionsRecord = PortionsRecord()
    fragments: dict[int, int] = {}


LogMessage: TypeAlias = Reports | Entries | Explain | Reasons
"""What a server and the sequencer tell each other, once the server has said where it is."""
