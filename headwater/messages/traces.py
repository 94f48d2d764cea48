"""Traces: what nodes did and when, recorded while somebody asks for it."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message, Role
from headwater.messages.observed import Nanoseconds


class TraceEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One thing that one thread of a node did.

    Attributes:
        thread: its name.
        name: what it did.
        began: by the node's monotonic clock.
        lasted: -1 for what has no duration.
        flows: exchanges that it is about, each as (member, number).
        place: where in a flow it is: "begin" where the request leaves, "pass" on a server, "end" where the
            answer arrives.
        about: numbers worth showing, by name.
    """

    thread: str
    name: str
    began: Nanoseconds
    lasted: Nanoseconds
    flows: tuple[tuple[int, int], ...] = ()
    place: str = ""
    about: dict[str, int] = {}


class CollectTrace(Message, frozen=True):
    """Ask the coordinator for what all nodes do for so many seconds from now on; said again, with 0, it ends
    now. Any number of `TraceChunk` follow, each answered with `Acknowledged`; then `Acknowledged`, and
    whoever asked closes."""

    seconds: float


class RecordTrace(Message, frozen=True):
    """From the coordinator to a member: record for so many seconds, or with 0 no longer. `clock`: its own."""

    seconds: float
    clock: Nanoseconds


class TraceEvents(Message, frozen=True):
    """From a member to the coordinator: what it recorded.

    `clock`: its own as it sends this; `echo`: the coordinator's, of the RecordTrace that this answers at
    once, 0 otherwise; `dropped`: events that were too many; `last`: nothing follows.
    """

    clock: Nanoseconds
    events: tuple[TraceEvent, ...] = ()
    echo: Nanoseconds = 0
    dropped: int = 0
    last: bool = False


class TraceChunk(Message, frozen=True):
    """From the coordinator to whoever collects: events of one member; of itself with member 0.

    `ahead`: nanoseconds to add to the member's clock for the coordinator's, known to within `error`, half of
    the time that a message took there and back.
    """

    member: int
    role: Role | str
    index: int
    pid: int
    host: str
    ahead: Nanoseconds
    error: Nanoseconds
    events: tuple[TraceEvent, ...]
    dropped: int = 0


TraceMessage: TypeAlias = CollectTrace | RecordTrace | TraceEvents | TraceChunk
"""What is said of traces."""
