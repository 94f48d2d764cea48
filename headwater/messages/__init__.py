"""Every message that crosses a connection, and every entry of the log, as frozen structs.

Nothing here encodes, sends or decides. Each union is closed: a decoder given one of them can
produce only the structs listed. Ids:

- `member` names one incarnation of a node (a restarted worker has the same rank, another member);
- `number` counts the exchanges of one member from 1; `step` counts its steps from 1;
- `connection_epoch` counts the generations of a member's connections from 0: when it loses one of them it
  closes
  all, connects to every server again and repeats its outstanding exchange, with the same `number`;
- `term` of the log is the term of the roster at which its present sequencer began;
- `model` numbers the models from 0 in the order of their register entries: the same on all servers.
"""

from __future__ import annotations

from typing import TypeAlias

from headwater.messages.base import Acknowledged, Message, Refused, Role, Scalar
from headwater.messages.checkpoints import FileRecord, ModelRecord, PartRecord, TableRecord
from headwater.messages.exchange import (
    Answer,
    Assign,
    Attach,
    Carried,
    Checkpoint,
    CountRows,
    DeleteRows,
    Describe,
    Description,
    End,
    Hello,
    Leave,
    Meet,
    ModelInfo,
    Pull,
    PullRows,
    ReadState,
    Register,
    RegisterTable,
    Renew,
    Request,
    Scratch,
    Setting,
    SettingValue,
    Step,
    StepResult,
    Stop,
    Store,
    Stored,
    TableSetting,
    Verify,
    Waiting,
)
from headwater.messages.log import (
    Activated,
    AnyEntry,
    Assigned,
    Checkpointed,
    Committed,
    Enrolled,
    Entries,
    Entry,
    ExchangeId,
    Held,
    Kind,
    Late,
    LogStateRecord,
    Measured,
    MemberRecord,
    Met,
    Newcomer,
    Phase,
    Registered,
    Reports,
    Retired,
    Served,
    Stalled,
    Stopped,
    Sum,
    Sums,
)
from headwater.messages.models import ModelSpec, Rows, RuleSpec, Run, TableSpec, TensorSpec, WindowSpec
from headwater.messages.reading import (
    DataProgress,
    DynamicProgress,
    Finish,
    Lease,
    Leased,
    Position,
    Span,
    StaticProgress,
    Unleased,
    Unvisited,
    Visited,
)
from headwater.messages.replication import AppendAck, AppendEntry, Chunk, CommitIndex, EntryInputs, StartTerm
from headwater.messages.roster import (
    Assignment,
    CaughtUp,
    Departed,
    Finished,
    GetServers,
    Heartbeat,
    Join,
    JoinWaits,
    Member,
    NoSlot,
    Progress,
    Rejoin,
    RequestSlot,
    Roster,
    ServerAddresses,
    StandbyLost,
    Welcome,
)
from headwater.messages.snapshots import AccountRecord, ModelPart, Recovery, Snapshot, TablePart
from headwater.messages.statistics import (
    Ask,
    ClusterStatistics,
    ModelStatistics,
    NodeStatistics,
    ServerStatistics,
    TableStatistics,
)
from headwater.messages.verification import Compare, Compared, Digest, Digested

AnyMessage: TypeAlias = (
    RequestSlot
    | NoSlot
    | Assignment
    | Join
    | JoinWaits
    | Welcome
    | Rejoin
    | Roster
    | Heartbeat
    | GetServers
    | ServerAddresses
    | CaughtUp
    | StandbyLost
    | Progress
    | Departed
    | Finished
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
    | Verify
    | Compare
    | Compared
    | Digested
    | Describe
    | Answer
    | Store
    | Stored
    | Waiting
    | Description
    | Reports
    | Entries
    | EntryInputs
    | StartTerm
    | Chunk
    | AppendEntry
    | CommitIndex
    | AppendAck
    | Snapshot
    | Recovery
    | Ask
    | ServerStatistics
    | ClusterStatistics
)

__all__ = [
    "AccountRecord",
    "Acknowledged",
    "Activated",
    "Answer",
    "AnyEntry",
    "AnyMessage",
    "AppendAck",
    "AppendEntry",
    "Ask",
    "Assign",
    "Assigned",
    "Assignment",
    "Attach",
    "Carried",
    "CaughtUp",
    "Checkpoint",
    "Checkpointed",
    "Chunk",
    "ClusterStatistics",
    "CommitIndex",
    "Committed",
    "Compare",
    "Compared",
    "CountRows",
    "DataProgress",
    "DeleteRows",
    "Departed",
    "Describe",
    "Description",
    "Digest",
    "Digested",
    "DynamicProgress",
    "End",
    "Enrolled",
    "Entries",
    "Entry",
    "EntryInputs",
    "ExchangeId",
    "FileRecord",
    "Finish",
    "Finished",
    "GetServers",
    "Heartbeat",
    "Held",
    "Hello",
    "Join",
    "JoinWaits",
    "Kind",
    "Late",
    "Lease",
    "Leased",
    "Leave",
    "LogStateRecord",
    "Measured",
    "Meet",
    "Member",
    "MemberRecord",
    "Message",
    "Met",
    "ModelInfo",
    "ModelPart",
    "ModelRecord",
    "ModelSpec",
    "ModelStatistics",
    "Newcomer",
    "NoSlot",
    "NodeStatistics",
    "PartRecord",
    "Phase",
    "Position",
    "Progress",
    "Pull",
    "PullRows",
    "ReadState",
    "Recovery",
    "Refused",
    "Register",
    "RegisterTable",
    "Registered",
    "Rejoin",
    "Renew",
    "Reports",
    "Request",
    "RequestSlot",
    "Retired",
    "Role",
    "Roster",
    "Rows",
    "RuleSpec",
    "Run",
    "Scalar",
    "Scratch",
    "Served",
    "ServerAddresses",
    "ServerStatistics",
    "Setting",
    "SettingValue",
    "Snapshot",
    "Span",
    "Stalled",
    "StandbyLost",
    "StartTerm",
    "StaticProgress",
    "Step",
    "StepResult",
    "Stop",
    "Stopped",
    "Store",
    "Stored",
    "Sum",
    "Sums",
    "TablePart",
    "TableRecord",
    "TableSetting",
    "TableSpec",
    "TableStatistics",
    "TensorSpec",
    "Unleased",
    "Unvisited",
    "Verify",
    "Visited",
    "Waiting",
    "Welcome",
    "WindowSpec",
]
