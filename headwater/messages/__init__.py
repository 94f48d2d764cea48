"""Every message that crosses a connection, and every entry of the log, as frozen structs.

Nothing here encodes, sends or decides. A module is a conversation and ends with the closed union of what is
said in it: a decoder given one of them can produce only the structs listed. Each name of a module stands here
too. Ids:

- `member` names one incarnation of a node (a restarted worker has the same rank, another member);
- `number` counts the exchanges of one member from 1; `step` counts its steps from 1;
- `connection_epoch` counts the generations of a member's connections from 0: when it loses one of them it
  closes all, connects to every server again and repeats its outstanding exchange, with the same `number`;
- `term` of the log is the term of the roster at which its present sequencer began;
- `model` numbers the models from 0 in the order of their register entries: the same on all servers.
"""

from __future__ import annotations

from typing import TypeAlias

from headwater.messages.base import *
from headwater.messages.checkpoints import *
from headwater.messages.exchange import *
from headwater.messages.log import *
from headwater.messages.models import *
from headwater.messages.observed import *
from headwater.messages.operations import *
from headwater.messages.programs import *
from headwater.messages.publication import *
from headwater.messages.reading import *
from headwater.messages.replication import *
from headwater.messages.roster import *
from headwater.messages.snapshots import *
from headwater.messages.statistics import *
from headwater.messages.traces import *
from headwater.messages.verification import *

AnyMessage: TypeAlias = (
    Reply
    | ToServer
    | FromServer
    | LogMessage
    | ReadingMessage
    | ReplicationMessage
    | ToCoordinator
    | FromCoordinator
    | BeginningMessage
    | StatisticsMessage
    | TraceMessage
    | VerificationMessage
)
"""Whatever may cross a connection: the union of all conversations."""
