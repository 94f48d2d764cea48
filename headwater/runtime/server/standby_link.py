"""A server's link to its standby: a snapshot first, then every entry with its inputs, acknowledgements back.

Invariants:
- Entries leave in order, all after the snapshot's position.
- Once `needed` is set, what the standby has not acknowledged does not count as prepared, until the roster
  says that there is no such standby any more: only the coordinator may decide that training goes on without.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.runtime.server.snapshots import pack
from headwater.shard.replica import MaterializedEntry, own_memory
from headwater.shard.snapshot import ShardSnapshot
from headwater.wire.channel import Channel
from headwater.wire.chunks import SMALLEST, GivenChunks
from headwater.wire.shared_memory import windows_possible

_log = logging.getLogger("headwater.server")


_KEPT = 64
"""Digests kept for who asked; each asks for them at once."""


@dataclass(slots=True, eq=False)
class _Loan:
    """The chunks of an entry's arrays: number by address of the array."""

    chunks: dict[int, int] = field(default_factory=dict)


_Item: TypeAlias = tuple[m.AppendEntry, list[NDArray[Any]]] | m.CommitIndex | m.StartTerm


class StandbyLink:
    """The standby `member` at the other end of `channel`.

    Attributes:
        applied: position up to which it has applied entries.
        needed: whether an entry counts as prepared only when the standby has it.
        caught_up: whether it has all that was ever reported as prepared, and so may take over.
        began: position of the snapshot that it began with.
        over: whether its connection has ended.
    """

    def __init__(self, member: m.Member, channel: Channel) -> None:
        self.member = member
        self.applied = 0
        self.needed = self.caught_up = self.over = False
        self.began = 0
        self._digested: deque[m.Digested] = deque(maxlen=_KEPT)
        self._told = threading.Condition()
        self._channel = channel
        self._shares = channel.can_pass_descriptors and windows_possible()
        self._chunks = GivenChunks()
        self._known: set[int] = set()
        self._loan = _Loan()
        self._loans: deque[tuple[int, _Loan]] = deque()
        self._pending: deque[_Item] = deque()
        self._sending = threading.Lock()

    # ── under the shard's lock ──────────────────────────────────────────────────────────────────

    def room(self, size: int) -> NDArray[np.uint8]:
        """Memory for the arrays of the entry that is shipped next."""
        if not self._shares or size < SMALLEST:
            return own_memory(size)
        number, memory = self._chunks.take(size)
        self._loan.chunks[memory.ctypes.data] = number
        return memory

    def ship(self, resolved: MaterializedEntry, committed: int) -> None:
        """Queue an entry whose arrays `room` made."""
        loan, self._loan = self._loan, _Loan()
        arrays = resolved.payload()
        numbers = [loan.chunks.get(array.ctypes.data, -1) for array in arrays]
        inline = [array for array, number in zip(arrays, numbers, strict=True) if number < 0]
        self._loans.append((resolved.inputs.entry.position, loan))
        self._pending.append((m.AppendEntry(resolved.inputs, committed, tuple(numbers)), inline))

    def advance(self, term: int, committed: int) -> None:
        """Queue how far the log is committed."""
        self._pending.append(m.CommitIndex(term, committed))

    def agree(self, agreed: m.StartTerm) -> None:
        """Queue that what comes after a position is discarded, here as there."""
        while self._loans and self._loans[-1][0] > agreed.position:
            self._give_back(self._loans.pop()[1])
        self._pending.append(agreed)

    def acknowledged(self, message: m.AppendAck, applied: int) -> None:
        """Take an acknowledgement; this server itself has applied entries up to `applied`."""
        self.applied = max(self.applied, message.applied)
        done = min(self.applied, applied)
        while self._loans and self._loans[0][0] <= done:
            self._give_back(self._loans.popleft()[1])

    def _give_back(self, loan: _Loan) -> None:
        for number in loan.chunks.values():
            self._chunks.give_back(number)

    # ── outside of it ───────────────────────────────────────────────────────────────────────────

    def introduce(self, snapshot: ShardSnapshot, term: int) -> None:
        """Send what the standby begins with; before the first `flush`. Blocks for the transfer."""
        message, arrays = pack(snapshot, term)
        self._channel.send(message, buffers=[np.ascontiguousarray(array) for array in arrays])

    def flush(self) -> None:
        """Send what is queued, unless another thread is at it, which then sends this too."""
        while self._pending and self._sending.acquire(blocking=False):
            try:
                self._send(self._pending.popleft())
            except IndexError:
                pass  # another thread sent it between the two tests
            except HeadwaterError as error:
                _log.info("lost standby %d: %s", self.member.index, error)  # `follow` tells the coordinator
                self._pending.clear()
            finally:
                self._sending.release()

    def _send(self, item: _Item) -> None:
        if isinstance(item, m.CommitIndex | m.StartTerm):
            self._channel.send(item)
            return
        shipment, inline = item
        for number in shipment.chunks:
            if number >= 0 and number not in self._known:
                descriptor, size = self._chunks.descriptor(number)
                self._channel.send(m.Chunk(number, size), descriptors=(descriptor,))
                self._known.add(number)
        self._channel.send(shipment, buffers=inline)

    def follow(self, acknowledged: Callable[[m.AppendAck], None]) -> None:
        """Take acknowledgements, and what it says that it is, until the connection ends.

        Raises:
            ProtocolError: the standby says something else.
        """
        try:
            while (received := self._channel.receive()) is not None:
                message = received.message
                if isinstance(message, m.AppendAck):
                    acknowledged(message)
                elif isinstance(message, m.Digested):
                    with self._told:
                        self._digested.append(message)
                        self._told.notify_all()
                else:
                    raise ProtocolError(f"a standby sent {type(message).__name__}")
        finally:
            self._end()

    def digests_at(self, position: int, timeout: float) -> tuple[m.Digest, ...] | None:
        """What it was right after that entry; None where it has not said so within `timeout` seconds."""

        def found() -> m.Digested | None:
            return next((one for one in self._digested if one.position == position), None)

        with self._told:
            self._told.wait_for(lambda: found() is not None or self.over, timeout)
            told = found()
        return told.digests if told is not None else None

    def _end(self) -> None:
        with self._told:
            self.over = True
            self._told.notify_all()

    def close(self) -> None:
        """End the connection and give the memory back; idempotent."""
        self._end()
        self._channel.close()
        self._chunks.close_descriptors()
