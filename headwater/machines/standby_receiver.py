"""Replication: a standby's end of the connection from its server.

Theory of operation: see `headwater.machines.standby_link`, the server's end. A receiver has two phases. First
it collects a snapshot, of which a shard is made without the lock. Then it follows entry by entry: an entry is
acknowledged when it is here, applied by the node's `LogApplier` when it is committed, and acknowledged again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.machines.actions import Action, Actions, Close, Conn, Pause, Resume, Send
from headwater.machines.applier import LogApplier
from headwater.machines.chunks import TakenChunks
from headwater.machines.memory import Bytes, Given, ServerMemory, take
from headwater.shard import Shard
from headwater.shard.digest import digests
from headwater.shard.loops_ahead import compile_for, compile_for_snapshot
from headwater.shard.replica import MaterializedEntry, arriving, own_memory
from headwater.shard.snapshot import ShardSnapshot, to_receive

Arrays = Sequence[NDArray[Any]]


class StandbyReceiver:
    """A standby's end, of the server at the other end of `conn`, into `applier`.

    `restore` makes a shard of a snapshot; `perform` has something done without the lock.

    Attributes:
        restoring: whether the shard is being made of the snapshot.
    """

    def __init__(
        self,
        conn: Conn,
        applier: LogApplier,
        memory: ServerMemory,
        restore: Callable[[ShardSnapshot], Shard],
        perform: Callable[[Callable[[], Any], Callable[[Any], Actions]], Action],
    ) -> None:
        self.conn = conn
        self.restoring = False
        self._applier = applier
        self._memory = memory
        self._restore = restore
        self._perform = perform
        self._term = 0
        self._chunks = TakenChunks()
        self._snapshot: ShardSnapshot | None = None
        self._missing: deque[Bytes] = deque()
        self._arriving: MaterializedEntry | None = None
        self._asked: deque[int] = deque()

    # ── in the connection's thread, without the lock ────────────────────────────────────────────

    def place(self, message: m.AnyMessage, length: int) -> Arrays:
        """Where the payload of `message` goes, of `length` bytes. Raises ProtocolError: it has none."""
        if isinstance(message, m.SnapshotPart):
            return take(self._missing, length)
        if isinstance(message, m.AppendEntry):
            self._arriving, inline = self._materialize(message)
            return inline
        raise ProtocolError(f"{type(message).__name__} with a payload of {length} bytes, expected none")

    def unpack(self, message: m.AnyMessage, given: Given) -> MaterializedEntry | None:
        """What came with `message`, for `received`. Raises ProtocolError, EnvironmentFailure."""
        if isinstance(message, m.Chunk):
            self._chunks.add(message.chunk, self._memory.given_chunk(given, message.size))
        elif isinstance(message, m.Snapshot):
            compile_for_snapshot(message)
            self._snapshot, arrays = to_receive(message)
            self._missing = deque(array.reshape(-1).view(np.uint8) for array in arrays if array.size)
        elif isinstance(message, m.AppendEntry):
            for _, request in message.inputs.requests:
                compile_for(request)
            resolved, self._arriving = self._arriving, None
            return resolved if resolved is not None else self._materialize(message)[0]
        return None

    def _materialize(self, message: m.AppendEntry) -> tuple[MaterializedEntry, list[NDArray[Any]]]:
        """The entry, its arrays in chunks or to be received, and the latter."""
        numbers = iter(message.chunks)
        inline: list[NDArray[Any]] = []

        def place(size: int) -> Bytes:
            number = next(numbers, -1) if size else -1
            if number >= 0:
                return self._chunks.part(number, size)
            memory = own_memory(size)
            if size:
                inline.append(memory)
            return memory

        return arriving(message.inputs, place), inline

    # ── under the lock ──────────────────────────────────────────────────────────────────────────

    def received(self, message: m.AnyMessage, resolved: MaterializedEntry | None) -> Actions:
        """The server says something.

        Raises:
            RefusedError: it was replaced by another one.
            ProtocolError: a server does not say that.
        """
        if isinstance(message, m.Snapshot | m.SnapshotPart):
            return self._begin(message)
        shard, committed = self._applier.shard, 0
        if isinstance(message, m.StartTerm):
            shard.truncate(message)
            while self._asked and self._asked[-1] > message.position:
                self._asked.pop()
        elif isinstance(message, m.CommitIndex):
            shard.admit(message.term)
            committed = message.committed
        elif isinstance(message, m.AppendEntry) and resolved is not None:
            shard.follow(resolved)
            committed = message.committed
            entry = message.inputs.entry
            if isinstance(entry, m.Served) and entry.kind == "verify":
                self._asked.append(entry.position)
        elif isinstance(message, m.Chunk):
            return []
        else:
            raise ProtocolError(f"a server sent its standby {type(message).__name__}")
        self._applier.commit(committed)
        return [self._acknowledge(shard)]

    def _begin(self, message: m.Snapshot | m.SnapshotPart) -> Actions:
        """A piece of the snapshot; with the last one the shard is made of it."""
        if isinstance(message, m.Snapshot):
            self._term = message.term
        sent: Actions = [Send(self.conn, m.Acknowledged())]
        if self._snapshot is None or self._missing:
            return sent
        whole, self._snapshot, self.restoring = self._snapshot, None, True
        return [*sent, Pause(self.conn), self._perform(partial(self._restore, whole), self._restored)]

    def _restored(self, shard: Shard | HeadwaterError) -> Actions:
        self.restoring = False
        if isinstance(shard, HeadwaterError):
            return [Close(self.conn, f"the snapshot cannot be restored: {shard}")]
        shard.admit(self._term)
        self._applier.restart(shard)
        return [self._acknowledge(shard), Resume(self.conn)]

    def applied(self) -> Actions:
        """An entry was applied: say so; where somebody asked for it, sum up what the shard is now."""
        shard = self._applier.shard
        actions: Actions = [self._acknowledge(shard)]
        if self._asked and self._asked[0] == shard.position:
            self._asked.popleft()
            snapshot = shard.snapshot()
            actions.append(self._perform(partial(digests, snapshot), partial(self._summed, shard.position)))
        return actions

    def _summed(self, position: int, parts: tuple[m.Digest, ...]) -> Actions:
        return [Send(self.conn, m.Digested(position, parts))]

    def _acknowledge(self, shard: Shard) -> Action:
        return Send(self.conn, m.AppendAck(shard.term, shard.prepared, shard.position))
