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
    Held,
    Kind,
    Late,
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
    StandingsRecord,
    Stopped,
    Sum,
    Sums,
    Ticket,
)
from headwater.messages.models import ModelSpec, Rows, RuleSpec, Run, TableSpec, TensorSpec, WindowSpec
from headwater.messages.reading import (
    Finish,
    Lease,
    Leased,
    Place,
    Position,
    Recorded,
    Span,
    Unleased,
    Unvisited,
    Visit,
    Visited,
)
from headwater.messages.replication import Advance, Agreed, Chunk, Followed, Inputs, Shipment
from headwater.messages.roster import (
    CaughtUp,
    Departed,
    Enlist,
    Finished,
    Heartbeat,
    Join,
    Locate,
    Member,
    Mislaid,
    Progress,
    Rejoin,
    Roster,
    Spare,
    Terms,
    Welcome,
    Whereabouts,
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
    Enlist
    | Spare
    | Terms
    | Join
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

__all__ = [
    "AccountRecord",
    "Acknowledged",
    "Activated",
    "Advance",
    "Agreed",
    "Answer",
    "AnyEntry",
    "AnyMessage",
    "Ask",
    "Assign",
    "Assigned",
    "Attach",
    "Carried",
    "CaughtUp",
    "Checkpoint",
    "Checkpointed",
    "Chunk",
    "ClusterStatistics",
    "Committed",
    "Compare",
    "Compared",
    "CountRows",
    "DeleteRows",
    "Departed",
    "Describe",
    "Description",
    "Digest",
    "Digested",
    "End",
    "Enlist",
    "Enrolled",
    "Entries",
    "Entry",
    "FileRecord",
    "Finish",
    "Finished",
    "Followed",
    "Heartbeat",
    "Held",
    "Hello",
    "Inputs",
    "Join",
    "Kind",
    "Late",
    "Lease",
    "Leased",
    "Leave",
    "Locate",
    "Measured",
    "Meet",
    "Member",
    "MemberRecord",
    "Message",
    "Met",
    "Mislaid",
    "ModelInfo",
    "ModelPart",
    "ModelRecord",
    "ModelSpec",
    "ModelStatistics",
    "Newcomer",
    "NodeStatistics",
    "PartRecord",
    "Phase",
    "Place",
    "Position",
    "Progress",
    "Pull",
    "PullRows",
    "ReadState",
    "Recorded",
    "Recovery",
    "Refused",
    "Register",
    "RegisterTable",
    "Registered",
    "Rejoin",
    "Renew",
    "Reports",
    "Request",
    "Retired",
    "Role",
    "Roster",
    "Rows",
    "RuleSpec",
    "Run",
    "Scalar",
    "Scratch",
    "Served",
    "ServerStatistics",
    "Setting",
    "Shipment",
    "Snapshot",
    "Span",
    "Spare",
    "Stalled",
    "StandingsRecord",
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
    "Terms",
    "Ticket",
    "Unleased",
    "Unvisited",
    "Verify",
    "Visit",
    "Visited",
    "Waiting",
    "Welcome",
    "Whereabouts",
    "WindowSpec",
]
