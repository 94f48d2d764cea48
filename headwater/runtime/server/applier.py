"""One server's way through the log: entries in, in order; prepared, committed, answered.

`lock` guards the shard and is held during its passes. Nothing is sent or received under it: what leaves is
queued and sent by `flush`, and answers go into the members' outboxes.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.runtime.server.standby_link import StandbyLink
from headwater.shard import Shard
from headwater.shard.replica import own_memory
from headwater.shard.state import Answers
from headwater.wire.channel import Channel


@dataclass(frozen=True, slots=True, eq=False)
class Outbox:
    """Where the thread of a member's connection waits for answers; None ends it."""

    connection_epoch: int
    channel: Channel
    answers: queue.SimpleQueue[m.Answer | None] = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Have the connection's thread end; blocks until it has."""
        self.answers.put(None)
        self.channel.close()
        self.ended.wait()


@dataclass(frozen=True, slots=True)
class Progress:
    """What the sequencer of `term` is told: `prepared` is up to where this server, and its standby where that
    counts, has the log; `measured` what it asked for since it was told last."""

    term: int
    prepared: int
    measured: tuple[m.Sums, ...] = ()


_Step: TypeAlias = tuple[int, m.AnyEntry | None, int]
"""Term, next entry (None: only news), and how far the log is committed."""


class LogApplier:
    """For the shard of one server; `replicated`: in a cluster with standbys, entries are prepared first.

    Attributes:
        shard: of this server; changes where a standby begins anew.
        serving: set when all that members may have seen is applied here, so that they can be served.
        outboxes: by member, of those that are connected; changed under `lock`.
        replica: its caught-up or catching-up standby.
    """

    def __init__(self, shard: Shard, *, replicated: bool) -> None:
        self.lock = threading.Lock()
        self.serving = threading.Event()
        self.shard = shard
        self.outboxes: dict[int, Outbox] = {}
        self.replica: StandbyLink | None = None
        self._replicated = replicated
        self._arrived: deque[_Step] = deque()
        self._committed = 0
        self._reported = 0
        self._agreed: int | None = None
        self._moved = False

    def put(self, term: int, entries: Sequence[m.AnyEntry], committed: int) -> None:
        """Append to what is to be processed; the caller's lock gives the order. Does not block."""
        if entries:
            self._arrived.extend([(term, entry, committed) for entry in entries])
        else:
            self._arrived.append((term, None, committed))

    def process(self) -> bool:
        """Process what has arrived, and hand out the answers; whether `prepared` may have grown.

        Raises:
            ProtocolError: what arrived is no continuation of the log.
        """
        moved = self._take_moved() if self._replicated else False
        while self._arrived:
            with self.lock:
                if not self._arrived:
                    break
                moved |= self._advance(*self._arrived.popleft())
        if self.replica is not None:
            self.replica.flush()
        for table in self.shard.tables:
            table.prepare()
        return moved

    def _take_moved(self) -> bool:
        """Whether a sequencer said what stands since the last look; under the lock, or a word is lost."""
        with self.lock:
            moved, self._moved = self._moved, False
        return moved

    def _advance(self, term: int, entry: m.AnyEntry | None, committed: int) -> bool:
        shard = self.shard
        try:
            shard.admit(term)
        except RefusedError:
            return False  # of a sequencer that is none any more
        if not self._replicated:
            if entry is not None:
                self._hand_out(shard.process(entry))
            return isinstance(entry, m.Measured)
        replica = self.replica
        if entry is not None:
            resolved = shard.prepare(entry, replica.room if replica is not None else own_memory)
            if resolved is not None and replica is not None:
                replica.ship(resolved, committed)
        self._committed = max(self._committed, committed)
        self._commit()
        if entry is None and replica is not None:
            replica.advance(term, committed)
        return entry is not None

    def _commit(self) -> None:
        shard = self.shard
        while shard.position < min(self._committed, shard.prepared):
            self._hand_out(shard.commit(shard.position + 1))
        self._note_progress()

    def _note_progress(self) -> None:
        if self._agreed is not None and self.shard.position >= self._agreed:
            self.serving.set()

    def _hand_out(self, answers: Answers) -> None:
        """Under the lock, so that an answer goes to the connection it was made for; None ends that."""
        for member, answer in answers:
            outbox = self.outboxes.get(member)
            if outbox is not None:
                outbox.answers.put(answer)

    # ── what the sequencer is told ──────────────────────────────────────────────────────────────

    def progress(self) -> Progress:
        """For the sequencer.

        While a new one has not said what stands only what is applied is prepared, for the rest may be
        discarded.
        """
        if not self._replicated and not self.shard.has_measured:
            return Progress(self.shard.term, 0)  # without waiting for the pass under way
        with self.lock:
            shard, replica = self.shard, self.replica
            measured = tuple(shard.take_measured())
            if not self._replicated:
                return Progress(shard.term, 0, measured)
            if not shard.agreed:
                return Progress(shard.term, shard.position)
            here = shard.safe if replica is not None and replica.needed else shard.prepared
            self._reported = max(self._reported, here)
            return Progress(shard.term, self._reported, measured)

    # ── the standby ─────────────────────────────────────────────────────────────────────────────

    def attach(self, replica: StandbyLink) -> None:
        """Begin to keep a standby; blocks while the snapshot is copied, and while it is sent.

        Entries that come meanwhile are queued for it.
        """
        with self.lock:
            snapshot, missing = self.shard.attach_standby()
            for resolved in missing:
                replica.ship(resolved, self._committed)
            replica.began = snapshot.position
            self.replica = replica
            term = self.shard.agreed_term
        replica.introduce(snapshot, term)
        replica.flush()

    def acknowledged(self, replica: StandbyLink, message: m.AppendAck) -> bool:
        """Take an acknowledgement; whether the standby has caught up with it, from now on for good."""
        with self.lock:
            if replica is not self.replica:
                return False
            replica.acknowledged(message, self.shard.position)
            self.shard.acknowledged(message.term, message.prepared)
            # From here on nothing more is reported without the standby; what was, it must have first.
            replica.needed = True
            if replica.caught_up or self.shard.safe < self._reported:
                return False
            replica.caught_up = True
            return True

    def detach(self) -> StandbyLink | None:
        """The roster says that there is no such standby; returns it, to be closed."""
        with self.lock:
            replica, self.replica = self.replica, None
            self.shard.detach_standby()
        return replica

    def restart(self, shard: Shard) -> None:
        """Go on with another shard: a standby's, after a snapshot, or before it is promoted."""
        with self.lock:
            self.shard = shard
            self._arrived.clear()
            self._committed = shard.position
            self._reported = 0

    def begin_term(self, term: int) -> m.Recovery:
        """Follow the sequencer of this term: where this server is. Raises RefusedError if it is over."""
        with self.lock:
            return self.recovery(term)

    def recovery(self, term: int) -> m.Recovery:
        """As `begin_term`, for who has the lock already; in a term that has begun, what stands stays so."""
        recovery = self.shard.recovery(term)
        self._arrived.clear()
        if not self.shard.agreed:
            self._agreed = None
            self.serving.clear()
        return recovery

    def agree(self, agreed: m.StartTerm) -> None:
        """Discard what a new sequencer did not find everywhere; the rest is applied as it is committed."""
        with self.lock:
            if agreed.term == self.shard.agreed_term:
                return
            self.shard.truncate(agreed)
            self._moved = True
            if self.replica is not None:
                self.replica.agree(agreed)
            self._reported = min(self._reported, agreed.position)
            self._agreed = agreed.position
            self._note_progress()
