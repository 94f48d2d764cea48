"""A standby at work: it follows its server entry by entry, and says what it is where somebody asks."""

from __future__ import annotations

from collections import deque
from functools import partial

from headwater import messages as m
from headwater.runtime.server.applier import LogApplier
from headwater.runtime.server.mirror import Mirror
from headwater.runtime.threads import ConnectionThreads
from headwater.shard import Shard
from headwater.shard.digest import digests
from headwater.shard.replica import MaterializedEntry
from headwater.shard.snapshot import ShardSnapshot
from headwater.spec.sync import Reduce
from headwater.wire.channel import Channel


class Following:
    """Over one connection from a server, into `course`."""

    def __init__(
        self, channel: Channel, course: LogApplier, reduce: Reduce, threads: ConnectionThreads
    ) -> None:
        self._channel = channel
        self._course = course
        self._reduce = reduce
        self._threads = threads
        self._asked: deque[int] = deque()

    def run(self) -> None:
        """Until the connection ends, or this node takes over.

        Raises:
            ProtocolError: the server says something else.
            RefusedError: it is a former one.
        """
        mirror = Mirror(self._channel)
        snapshot, term = mirror.begin()
        shard = Shard.restore(snapshot, self._reduce)
        shard.admit(term)
        self._course.restart(shard)
        self._acknowledge(shard)
        while (news := mirror.next()) is not None:
            with self._course.lock:
                self._take(shard, *news)
            self._acknowledge(shard)

    def _acknowledge(self, shard: Shard) -> None:
        self._channel.send(m.AppendAck(shard.term, shard.prepared, shard.position))

    def _take(
        self, shard: Shard, news: MaterializedEntry | m.StartTerm | None, term: int, committed: int
    ) -> None:
        if isinstance(news, m.StartTerm):
            shard.truncate(news)
            while self._asked and self._asked[-1] > news.position:
                self._asked.pop()
        elif news is not None:
            shard.follow(news)
            entry = news.inputs.entry
            if isinstance(entry, m.Served) and entry.kind == "verify":
                self._asked.append(entry.position)
        else:
            shard.admit(term)
        self._commit(shard, max(shard.position, min(committed, shard.prepared)))

    def _commit(self, shard: Shard, position: int) -> None:
        """What was asked at an entry is what the shard is right after it; summed up while it goes on."""
        while self._asked and self._asked[0] <= position:
            shard.commit(self._asked.popleft())
            snapshot = shard.snapshot()
            self._threads.start(partial(self._tell, snapshot), "digest")
        shard.commit(position)

    def _tell(self, snapshot: ShardSnapshot) -> None:
        self._channel.send(m.Digested(snapshot.position, digests(snapshot)))
