"""Replication: a server's link to its standby; `headwater.machines.standby_receiver` is the other end.

Theory of operation. A link goes through three phases, and never back:

1. *Catching up.* The standby gets a snapshot, in parts, and then every entry after it with its inputs.
   Nothing waits for it: the server reports entries as prepared without it.
2. *Needed.* With its first acknowledgement the standby is needed: from now on the server reports only what
   the standby has. It has caught up, and may take over, once it has all that was ever reported before.
3. *Over.* The connection has ended, or the standby was silent for too long. Until the roster says that
   there is no such standby any more, what it lacks still does not count: only the coordinator may decide
   that training goes on without it.

The receiver mirrors that: it collects the parts, has the shard restored from them, and then keeps entries.
They are applied once they are committed, one by one, by the `LogApplier` of the node. The receiver
acknowledges an entry when it is here, before anything is applied, and again when it is applied. A part is
acknowledged too, so a standby that hangs can be told from one that has much to receive.

Arrays of an entry lie in chunks (`headwater.machines.chunks`) where memory can travel over the connection.

Neither end blocks. What is sent waits in the connection's queue, never in a member's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.machines.actions import Actions, Conn, Send
from headwater.machines.chunks import GivenChunks
from headwater.machines.memory import Bytes, ServerMemory, take
from headwater.machines.read_lease import ReadLease
from headwater.shard.replica import MaterializedEntry, own_memory
from headwater.shard.snapshot import ShardSnapshot, pack

PART_BYTES = 4 << 20
"""Of a snapshot in one message: little enough that each is acknowledged in time over a slow network."""

_KEPT = 64
"""Digests kept for who asked; each asks for them at once."""


class StandbyLink:
    """A server's end, to the standby `member` over `conn`.

    Attributes:
        began: position of the snapshot that it began with.
        applied: position up to which the standby has applied entries.
        needed: whether an entry counts as prepared only when the standby has it.
        caught_up: whether it has all that was ever reported as prepared, and so may take over.
        over: whether the connection has ended.
        lease: until when the standby has said that it has not taken over.
    """

    def __init__(self, member: m.Member, conn: Conn, memory: ServerMemory) -> None:
        self.member = member
        self.conn = conn
        self.began = self.applied = 0
        self.needed = self.caught_up = self.over = False
        self._shares = memory.shares(conn)
        self._smallest = memory.smallest_chunk
        self._chunks = GivenChunks(memory)
        self._lent: dict[int, int] = {}
        self._loans: deque[tuple[int, dict[int, int]]] = deque()
        self._shipped = self._prepared = 0
        self._heard = self._awaited = False
        self._digested: deque[m.Digested] = deque(maxlen=_KEPT)
        self._unnoted: tuple[int, int] | None = None  # term and position of what was shipped last
        self.lease = ReadLease()

    # ── what it is sent ─────────────────────────────────────────────────────────────────────────

    def introduce(self, snapshot: ShardSnapshot, term: int) -> Actions:
        """What the standby begins with."""
        self.began = self._shipped = snapshot.position
        message, arrays = pack(snapshot, term)
        parts = _parts([np.ascontiguousarray(array) for array in arrays])
        sent: Actions = [Send(self.conn, message)]
        return sent + [Send(self.conn, m.SnapshotPart(), buffers) for buffers in parts]

    def room(self, size: int) -> Bytes:
        """Memory for the arrays of the entry that is shipped next."""
        if not self._shares or self.over or size < self._smallest:
            return own_memory(size)
        number, memory = self._chunks.take(size)
        self._lent[memory.ctypes.data] = number
        return memory

    def ship(self, resolved: MaterializedEntry, committed: int) -> Actions:
        """Send an entry whose arrays `room` made."""
        lent, self._lent = self._lent, {}
        position = self._shipped = resolved.inputs.entry.position
        self._unnoted = resolved.inputs.term, position
        self._loans.append((position, lent))
        if self.over:
            return []
        arrays = resolved.payload()
        numbers = [lent.get(array.ctypes.data, -1) for array in arrays]
        inline = [array for array, number in zip(arrays, numbers, strict=True) if number < 0]
        entry = m.AppendEntry(resolved.inputs, committed, tuple(numbers))
        return [*self._chunks.introduce(self.conn), Send(self.conn, entry, inline)]

    def commit(self, term: int, committed: int) -> Actions:
        """Send how far the log is committed."""
        return self._send(m.CommitIndex(term, committed))

    def agree(self, agreed: m.StartTerm) -> Actions:
        """Send that what comes after a position is discarded, here as there."""
        while self._loans and self._loans[-1][0] > agreed.position:
            self._give_back(self._loans.pop()[1])
        self._shipped = min(self._shipped, agreed.position)
        self._prepared = min(self._prepared, agreed.position)
        return self._send(agreed)

    def _send(self, message: m.AnyMessage) -> Actions:
        return [] if self.over else [Send(self.conn, message)]

    def note_shipped(self, now: float) -> None:
        """What was shipped since the last call leaves at `now` or later."""
        if self._unnoted is not None:
            self.lease.asked(*self._unnoted, now)
            self._unnoted = None

    # ── what it says ────────────────────────────────────────────────────────────────────────────

    def acknowledged(self, message: m.AppendAck, applied: int) -> None:
        """Take how far the standby is; this server itself has applied entries up to `applied`."""
        self._prepared = max(self._prepared, min(message.prepared, self._shipped))
        self.lease.answered(message.term, message.prepared)
        self.applied = max(self.applied, message.applied)
        done = min(self.applied, applied)
        while self._loans and self._loans[0][0] <= done:
            self._give_back(self._loans.popleft()[1])

    def _give_back(self, lent: dict[int, int]) -> None:
        for number in lent.values():
            self._chunks.give_back(number)

    def digested(self, message: m.Digested) -> None:
        """Keep what the standby says that it was at some position."""
        self._digested.append(message)

    def digests_at(self, position: int) -> tuple[m.Digest, ...] | None:
        """What it was right after that entry; None where it has not said so."""
        told = next((one for one in self._digested if one.position == position), None)
        return told.digests if told is not None else None

    # ── whether it lives ────────────────────────────────────────────────────────────────────────

    def heard(self) -> None:
        """The standby has said something."""
        self._heard = True

    @property
    def awaits(self) -> bool:
        """Whether the standby owes an acknowledgement."""
        return not self.over and (not self.caught_up or self._prepared < self._shipped)

    def is_silent(self) -> bool:
        """Whether the standby owed something at the last call, still does, and said nothing in between."""
        silent = self._awaited and self.awaits and not self._heard
        self._awaited, self._heard = self.awaits, False
        return silent

    def end(self) -> None:
        """The connection has ended, or ends; idempotent."""
        self.over = True
        self._chunks.release()


def _parts(arrays: Sequence[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
    """The same bytes in order, in lists of at most `PART_BYTES`."""
    waiting = deque(array.reshape(-1).view(np.uint8) for array in arrays if array.size)
    left = sum(array.nbytes for array in arrays)
    while left:
        part = min(PART_BYTES, left)
        yield take(waiting, part)
        left -= part
