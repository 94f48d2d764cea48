"""A member's connection to a server: its exchanges, one after the other."""

from __future__ import annotations

import queue
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.checkpoint import write_part
from headwater.errors import HeadwaterError, ProtocolError, RefusedError, UsageError
from headwater.runtime.server.applier import LogApplier, Outbox
from headwater.runtime.server.comparing import compare
from headwater.runtime.server.intake import Intake
from headwater.runtime.server.reporting import Reporting
from headwater.shard.copies import found
from headwater.shard.snapshot import ShardSnapshot
from headwater.wire.channel import Channel, Received

_READING = (m.Attach, m.Pull, m.PullRows, m.CountRows, m.ReadState, m.Checkpoint, m.Verify, m.Leave)


class MemberConnection:
    """Of `member`, as its connection epoch number `connection_epoch`; takes the place of an older one."""

    def __init__(
        self,
        channel: Channel,
        member: m.Member,
        connection_epoch: int,
        course: LogApplier,
        reporting: Reporting,
        patience: float,
    ) -> None:
        self._channel = channel
        self._member = member
        self._connection_epoch = connection_epoch
        self._course = course
        self._reporting = reporting
        self._patience = patience
        self._intake = Intake(course.shard, member.id)
        self._outbox = Outbox(connection_epoch, channel)
        self._snapshot: ShardSnapshot | None = None

    def serve(self) -> None:
        """Serve it until its end; what breaks the protocol is told to the member before it is cut off.

        Raises:
            ProtocolError: it broke the protocol.
            RefusedError: it was retired meanwhile, which the coordinator tells it.
        """
        try:
            self._enter()
        except RefusedError as error:
            self._channel.send(m.Refused("RefusedError", str(error)))
            return
        try:
            while (received := self._channel.receive(self._intake.place)) is not None:
                if not self._take(received):
                    return
        except ProtocolError as error:
            self._channel.send(m.Refused("ProtocolError", str(error)), timeout=self._patience)
            raise
        finally:
            with self._course.lock:
                del self._course.outboxes[self._member.id]
            self._outbox.ended.set()

    def _enter(self) -> None:
        """Take the place of an older connection, once its thread is out of the member's memory."""
        while True:
            with self._course.lock:
                known = self._course.outboxes.get(self._member.id)
                if known is None:
                    self._course.shard.reconnected(self._member.id, self._connection_epoch)
                    self._course.outboxes[self._member.id] = self._outbox
                    return
            if known.connection_epoch >= self._connection_epoch:
                raise RefusedError(f"member {self._member.id} is connected to this server already")
            known.end()

    def _take(self, received: Received) -> bool:
        """Serve one message; False when closing, or when a newer connection has taken over."""
        message = received.message
        if isinstance(message, m.Scratch):
            self._intake.staging(message, received.descriptors)
            return True
        if isinstance(message, m.Renew):
            staging = self._intake.staging(message, received.descriptors)
            if staging is not None:
                with self._course.lock:
                    self._course.shard.replace_staging(
                        self._member.id, message.model, staging, self._connection_epoch
                    )
            return True
        if isinstance(message, m.Store):
            self._channel.send(self._store(message), request=received.request)
            return True
        if isinstance(message, m.Compare):
            self._channel.send(self._compare(message), request=received.request)
            return True
        answer = self._exchange(received)
        if answer is None:
            return False
        if isinstance(message, m.Checkpoint | m.Verify):
            with self._course.lock:
                self._snapshot = self._course.shard.take_snapshot(self._member.id)
        try:
            payload = self._intake.payload(answer)
        except RefusedError:
            why = f"member {self._member.id} was retired while it was answered: connect again as a new one"
            self._channel.send(m.Refused("RefusedError", why))
            return False
        self._channel.send(answer, request=received.request, buffers=payload)
        return True

    def _store(self, request: m.Store) -> m.Stored:
        """Write the snapshot that the member asked for; blocks until it is on disk."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None or snapshot.version != request.version:
            why = f"there is no snapshot of version {request.version} here: another server took it"
            return m.Stored(request.number, None, failure=m.Refused("CheckpointError", why))
        place = (request.directory, request.generation, request.version, snapshot.index, snapshot.servers)
        try:
            part = write_part(*place, snapshot.models, snapshot.tables, snapshot.programs)
        except HeadwaterError as error:
            return m.Stored(request.number, None, failure=m.Refused(type(error).__name__, str(error)))
        finally:
            self._provide(array for model in snapshot.models for array in model.arrays())
        return m.Stored(request.number, part, snapshot.standings, snapshot.recorded)

    def _compare(self, request: m.Compare) -> m.Compared:
        """The snapshot that the member asked for beside what the standby was then; blocks for both."""
        snapshot, self._snapshot = self._snapshot, None

        def waiting(reason: str) -> None:
            self._channel.send(m.Waiting(request.number, reason))

        return compare(request.number, snapshot, self._course.replica, self._patience, waiting)

    def _provide(self, memory: Iterable[NDArray[np.float32]]) -> None:
        """Bring memory for snapshots; what is new was found without the lock, as that takes long."""
        with self._course.lock:
            self._course.shard.provide(memory)

    def _exchange(self, received: Received) -> m.Answer | m.Description | None:
        """Hold the request, report it, and wait for the entry that answers it; None when closing."""
        message, member = received.message, self._member
        if isinstance(message, m.Describe):
            with self._course.lock:
                return self._course.shard.describe(message.number)
        if not isinstance(message, m.Request):
            raise ProtocolError(f"a member sent {type(message).__name__}")
        if member.role == "observer" and not isinstance(message, _READING):
            raise ProtocolError(f"an observer sent {type(message).__name__}, which only workers may")
        if isinstance(message, m.Checkpoint):
            with self._course.lock:
                lengths = self._course.shard.expect_snapshots()
            self._provide(found(lengths))
        try:
            staging, rows = self._intake.staging(message, received.descriptors), self._intake.rows(message)
            with self._course.lock:
                held = self._course.shard.hold(member.id, message, staging, rows, self._connection_epoch)
        except UsageError as error:
            failure = m.Refused(type(error).__name__, str(error))
            return m.Answer(message.number, self._course.shard.version, failure=failure)
        self._reporting.held((held,))
        while True:
            try:
                return self._outbox.answers.get(timeout=self._patience)
            except queue.Empty:
                self._channel.send(m.Waiting(message.number, self._reporting.reason(member.id)))
