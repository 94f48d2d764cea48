"""A member's connection to a simulated server: its exchanges, one after the other.

It does what `headwater.runtime.server.serving` and `intake` do with a thread. In windows, memory comes as
arrays with the message that offers it; otherwise values are payload, received into a private buffer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError, UsageError
from headwater.runtime.server.applier import LogApplier, Outbox
from headwater.shard import Shard, StagedRows, Staging
from headwater.shard.snapshot import ShardSnapshot
from headwater.spec.layout import Layout
from headwater.testing.processes.network import End, Frame
from headwater.wire.channel import Channel


class Listener(Protocol):
    """What the connection needs of its server."""

    course: LogApplier

    def held(self, held: m.Held) -> None:
        """This is held here: report it."""

    def broke_protocol(self, member: int, connection_epoch: int, error: ProtocolError) -> None:
        """A member's connection ends with this."""

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """A checkpoint's part was taken here."""


class _Answers:
    """In the place of an outbox's queue: an answer leaves at once."""

    def __init__(self, put: Callable[[m.Answer | None], None]) -> None:
        self.put = put


class MemberLine:
    """Of `member`, as its connection epoch number `connection_epoch`; takes the place of an older one."""

    def __init__(self, host: Listener, end: End, member: int, connection_epoch: int) -> None:
        self._host = host
        self._end = end
        self._member = member
        self._connection_epoch = connection_epoch
        self._pulled: Sequence[StagedRows] = ()
        self._request: m.Request | None = None
        self._outbox = Outbox(
            connection_epoch,
            cast(Channel, end),
            cast("queue.SimpleQueue[m.Answer | None]", _Answers(self._put)),
            _SET,
        )

    @property
    def _shard(self) -> Shard:
        return self._host.course.shard

    def begin(self) -> None:
        """Take the place of an older connection, and serve."""
        outboxes = self._host.course.outboxes
        known = outboxes.get(self._member)
        if known is not None and known.connection_epoch >= self._connection_epoch:
            self._refuse(f"member {self._member} is connected to this server already")
            return
        if known is not None:
            known.end()
        try:
            self._shard.reconnected(self._member, self._connection_epoch)
        except RefusedError as error:
            self._refuse(str(error))
            return
        outboxes[self._member] = self._outbox
        self._end.listen(self._take, self._ended)

    def _refuse(self, reason: str) -> None:
        self._end.send(m.Refused("RefusedError", reason))
        self._end.close()

    def _ended(self) -> None:
        if self._host.course.outboxes.get(self._member) is self._outbox:
            del self._host.course.outboxes[self._member]

    def _take(self, frame: Frame) -> None:
        message = frame.message
        try:
            if isinstance(message, m.Renew):
                self._renew(message, frame.shared)
            elif isinstance(message, m.Describe):
                self._end.send(self._shard.describe(message.number))
            else:
                self._exchange(message, frame)
        except ProtocolError as error:
            self._host.broke_protocol(self._member, self._connection_epoch, error)
            self._end.send(m.Refused("ProtocolError", str(error)))
            self._close()
        except RefusedError:
            self._close()  # the coordinator will say why, when the member asks where to go

    def _close(self) -> None:
        self._ended()
        self._end.close()

    def _exchange(self, request: m.Request, frame: Frame) -> None:
        try:
            staging = self._staging(request, frame)
            rows = self._received(request, frame.buffers)
            held = self._shard.hold(self._member, request, staging, rows, self._connection_epoch)
        except UsageError as error:
            failure = m.Refused(type(error).__name__, str(error))
            self._end.send(m.Answer(request.number, self._shard.version, failure=failure))
            return
        self._request = request
        self._pulled = rows[len(request.pushed) :] if isinstance(request, m.Step) else rows
        self._host.held(held)

    def _put(self, answer: m.Answer | None) -> None:
        """Called under the course's lock, right after the entry that answers was processed."""
        if self._end.closed:
            return
        if answer is None:
            self._close()
            return
        shard, member = self._shard, self._member
        if isinstance(self._request, m.Checkpoint):
            snapshot = shard.take_snapshot(member)
            if snapshot is not None:
                self._host.took_snapshot(member, answer.number, snapshot)
        stagings = shard.stagings(member)
        written = [stagings[model] for model in answer.values]
        values = [one.parameters.copy() for one in written if _is_private(one)]
        rows = [StagedRows(one.table, one.ids, one.rows.copy()) for one in self._pulled]
        self._end.send(answer, buffers=[values, rows])

    # ── what comes with a message ───────────────────────────────────────────────────────────────

    def _staging(self, request: m.Request, frame: Frame) -> Staging | None:
        if not isinstance(request, m.Register | m.Attach):
            return None
        if isinstance(request, m.Register):
            layout = Layout(request.spec.tensors)
        else:
            layout = self._model(request.model)
        start, stop = self._shard.range_of(layout)
        if request.window is not None:
            gradients, parameters = frame.shared
            return Staging(gradients[start:stop], parameters[start:stop])
        private = np.zeros(stop - start, np.float32)
        if isinstance(request, m.Register):
            private[:] = frame.buffers[0]
        return Staging(private, private)

    def _renew(self, message: m.Renew, shared: Sequence[Any]) -> None:
        """What was staged in a private buffer stays there, for it may be part of an entry that is written."""
        start, stop = self._shard.range_of(self._model(message.model))
        old = self._shard.stagings(self._member).get(message.model)
        if message.window is not None:
            gradients, parameters = shared
            staging = Staging(gradients[start:stop], parameters[start:stop])
        elif old is not None and _is_private(old):
            return
        else:
            private = np.zeros(stop - start, np.float32) if old is None else old.gradients.copy()
            staging = Staging(private, private)
        self._shard.replace_staging(self._member, message.model, staging, self._connection_epoch)

    def _model(self, model: int) -> Layout:
        vector = self._shard.vectors.get(model)
        if vector is None:
            raise ProtocolError(f"there is no model {model}, known are {sorted(self._shard.vectors)}")
        return vector.layout

    def _received(self, request: m.Request, buffers: Sequence[Any]) -> list[StagedRows]:
        """Put the runs of a payload in their places; the rows that came after them."""
        if not isinstance(request, m.Step | m.Assign):
            return []
        for run, values in zip(request.payload, buffers, strict=False):
            staging = self._shard.staging(self._member, run.model)
            start = self._shard.vectors[run.model].start
            staging.gradients[run.start - start : run.stop - start] = values
        return list(buffers[len(request.payload) :])


def _is_private(staging: Staging) -> bool:
    return staging.gradients is staging.parameters


_SET = threading.Event()
_SET.set()
