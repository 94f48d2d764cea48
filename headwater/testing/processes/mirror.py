"""A simulated standby's side of the link to its server: a snapshot first, then entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.snapshots import room
from headwater.shard.replica import arriving
from headwater.spec.sync import Reduce
from headwater.testing.processes.network import End, Frame
from headwater.testing.processes.shard import WatchedShard


class MirrorLine:
    """What comes over one connection; `watched` makes a new shard known, whose gradients `reduce` combines.

    It does what `headwater.runtime.server` and its `mirror` do with a thread.
    """

    def __init__(
        self, course: LogApplier, end: End, reduce: Reduce, watched: Callable[[WatchedShard], WatchedShard]
    ) -> None:
        self._course = course
        self._end = end
        self._reduce: Reduce = reduce
        self._watched = watched
        self._shard: WatchedShard | None = None

    def begin(self) -> None:
        """Follow until the connection ends, or its sender has lost its place."""
        self._end.listen(self._take, lambda: None)

    def _take(self, frame: Frame) -> None:
        message, shard = frame.message, self._shard
        try:
            if isinstance(message, m.Snapshot):
                shard = self._shard = self._restored(message, frame)
            elif shard is not None:
                self._follow(shard, message, frame)
        except RefusedError:
            self._end.close()  # a former primary's
            return
        if shard is not None and not self._end.closed:
            self._end.send(m.AppendAck(shard.term, shard.prepared, shard.position))

    def _follow(self, shard: WatchedShard, message: m.AnyMessage, frame: Frame) -> None:
        committed = 0
        if isinstance(message, m.StartTerm):
            shard.truncate(message)
        elif isinstance(message, m.CommitIndex):
            shard.admit(message.term)
            committed = message.committed
        elif isinstance(message, m.AppendEntry):
            resolved = arriving(message.inputs)
            for there, here in zip(resolved.payload(), frame.buffers, strict=True):
                there[...] = here
            shard.follow(resolved)
            committed = message.committed
        shard.commit(max(shard.position, min(committed, shard.prepared)))

    def _restored(self, message: m.Snapshot, frame: Frame) -> WatchedShard:
        snapshot, arrays = room(message)
        for there, here in zip(arrays, frame.buffers, strict=True):
            there[...] = here
        shard = self._watched(WatchedShard.restore(snapshot, self._reduce))
        shard.admit(message.term)
        self._course.restart(shard)
        return shard
