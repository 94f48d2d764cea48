"""A member's reads: from all servers, outside the log, and yet of one version that is current.

Theory of operation. A `Read` is answered by each server at once with what it has applied, and the version of
that. The answers are taken where all are of one version, which is not older than any that this member has
seen. Otherwise the same exchange is asked again:

    unordered ──versions differ──▶ unordered, once more ──versions differ──▶ ordered
        └───────────a server answers UNREAD──────────────────────────────────▶ ordered

The last is an entry of the log, whose answers agree. Once that was sent it stays so, in later connection
epochs too: servers may hold it.

Why that is linearizable: an entry that changes values is answered when every server has applied it. So a
server that is asked afterwards has it, and a version that all servers agree on has it too. The server must be
the one of now: `headwater.machines.read_lease`.
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from headwater import messages as m
from headwater.machines.connections import Frame, Outgoing

READS: frozenset[type] = frozenset((m.Pull, m.PullRows, m.CountRows))
"""The classes of `Read`."""

TRIES = 2
"""How often a read is asked for before it is ordered."""

LARGE = 1 << 20
"""Bytes from each server above which a read is ordered from the start: a second copy would cost more."""


def is_large(size: int, servers: int) -> bool:
    """Whether a read of `size` bytes from all servers should be ordered from the start."""
    return servers > 1 and size > LARGE * servers


class CurrentRead:
    """How the outstanding exchange of a member is read.

    Attributes:
        unordered: it is a read whose answers may be of several versions.
    """

    __slots__ = ("_failed", "_ordered", "unordered")

    def __init__(self) -> None:
        self.unordered = self._ordered = False
        self._failed = 0

    def frames(self, frames: list[Outgoing]) -> list[Outgoing]:
        """What is to be sent, given what the call would send each server."""
        message = frames[0].message
        self.unordered = False
        if type(message) in READS:
            if self._ordered:
                return [_ordered(frame) for frame in frames]
            self.unordered = not message.ordered  # type: ignore[union-attr]
        return frames

    def agree(self, versions: Set[int] | None, seen: int) -> bool:
        """Whether these answers are one, of a version that is current; else it is to be asked again.

        `versions`: of all servers; None where one has refused, which counts. `seen`: the newest that this
        member has seen.
        """
        if versions is None or (len(versions) == 1 and min(versions) >= seen):
            return True
        self._failed += 1
        self._ordered = self._failed >= TRIES or m.UNREAD in versions
        return False

    def over(self) -> None:
        """The exchange is over."""
        self.unordered = self._ordered = False
        self._failed = 0


def _ordered(frame: Outgoing) -> Outgoing:
    return Frame(msgspec.structs.replace(frame.message, ordered=True), frame.buffers, frame.descriptors)
