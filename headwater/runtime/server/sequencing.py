"""The sequencer beside server 0's shard, and its links to the other servers; one for each term of the log.

It begins when every server has said where it is. `lock` guards the sequencer and the order in which entries
leave; nothing is sent under it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.log.sequencer import Sequencer
from headwater.runtime.server.link import EntryLink
from headwater.spec.sync import Mode
from headwater.wire.channel import Channel

_TAIL = 1 << 16
"""Entries kept for a server whose connection is made anew; far more than there are exchanges under way."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a sequencer decides."""

    sync: Mode
    min_workers: int = 1
    replicated: bool = False


class Sequencing:
    """Of `term`, for `servers` servers.

    `agree` and `put` take what server 0 itself is told, in order and under the lock; neither may block.
    `clock` tells the time in seconds.
    """

    def __init__(
        self,
        servers: int,
        policy: Policy,
        term: int,
        *,
        agree: Callable[[m.StartTerm], None],
        put: Callable[[int, Sequence[m.AnyEntry], int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.term = term
        self._servers = servers
        self._policy = policy
        self._agree, self._put = agree, put
        self._clock = clock
        self._lock = threading.Lock()
        self._sequencer: Sequencer | None = None
        self._agreed: m.StartTerm | None = None
        self._roster: m.Roster | None = None
        self._recoveries: dict[int, m.Recovery] = {}
        self._early: list[m.Reports] = []
        self._links = {index: EntryLink(term) for index in range(1, servers)}
        self._tail: deque[m.AnyEntry] = deque(maxlen=_TAIL)
        self._spread = 0

    # ── how it begins ───────────────────────────────────────────────────────────────────────────

    def recovered(self, recovery: m.Recovery, channel: Channel | None = None) -> None:
        """A server says where it is, over `channel` unless it is this one; once more after it connected anew.

        Raises:
            RefusedError: it is of another term, or too far behind.
        """
        if recovery.term != self.term:
            raise RefusedError(f"server {recovery.server} is in term {recovery.term}, expected {self.term}")
        with self._lock:
            self._recoveries[recovery.server] = recovery
            if channel is not None:
                self._connect(recovery, channel)
            if self._sequencer is not None:
                # What it had before it was told where the log goes on may have been discarded since.
                agreed = recovery.agreed == self.term
                prepared, sums = (recovery.prepared, recovery.sums) if agreed else (0, ())
                self._report(m.Reports(recovery.server, recovery.held, self.term, prepared, sums))
            elif len(self._recoveries) == self._servers and self._roster is not None:
                self._begin(self._roster)

    def _connect(self, recovery: m.Recovery, channel: Channel) -> None:
        """Send it over a channel from now on; what it lacks first, if the sequencer has begun."""
        link, agreed = self._links[recovery.server], self._agreed
        if self._sequencer is None or agreed is None:
            link.connect(channel, None, (), 0)
            return
        if recovery.agreed == self.term:
            agreed, after = None, recovery.standings.position + len(recovery.closed)
        else:
            after = agreed.position
        missing = [entry for entry in self._tail if entry.position > after]
        if len(missing) != self._sequencer.position - after:
            raise RefusedError(f"server {recovery.server} is at {after}, too far behind")
        link.connect(channel, agreed, missing, self._spread)

    def _begin(self, roster: m.Roster) -> None:
        now = self._clock()
        self._sequencer, self._agreed, entries = Sequencer.recover(
            self._policy.sync,
            list(self._recoveries.values()),
            roster,
            term=self.term,
            min_workers=self._policy.min_workers,
            replicated=self._policy.replicated,
            now=now,
        )
        self._agree(self._agreed)
        for link in self._links.values():
            link.agree(self._agreed)
        self._extend(entries)
        for early in self._early:
            self._report(m.Reports(early.server, early.held, self.term))
        self._early.clear()

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────

    def roster(self, roster: m.Roster) -> None:
        """Take over a roster."""
        with self._lock:
            if self._roster is not None and roster.term <= self._roster.term:
                return
            self._roster = roster
            if self._sequencer is not None:
                self._extend(self._sequencer.roster(roster, self._clock()))
            elif len(self._recoveries) == self._servers:
                self._begin(roster)

    def report(self, told: m.Reports) -> None:
        """What a server holds, and what it has done of the log.

        What it did before the servers were told what stands means nothing: they say it again then.

        Raises:
            RefusedError: it reports to the sequencer of an older term.
        """
        if told.term < self.term:
            raise RefusedError(
                f"server {told.server} reports to the sequencer of term {told.term}, it is {self.term}"
            )
        with self._lock:
            if self._sequencer is None:
                self._early.append(told)
            else:
                self._report(told)

    def _report(self, told: m.Reports) -> None:
        assert self._sequencer is not None
        now = self._clock()
        self._extend(
            self._sequencer.report(told.server, told.held, now, prepared=told.prepared, sums=told.sums)
        )

    def tick(self) -> float | None:
        """Draw the consequences of time; returns seconds until it should be called again, if ever."""
        with self._lock:
            if self._sequencer is None or self._sequencer.due is None:
                return None
            left = self._sequencer.due - self._clock()
            if left <= 0:
                self._extend(self._sequencer.tick(self._clock()))
            return max(left, 0.0)

    def waits(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom."""
        with self._lock:
            if self._sequencer is None:
                return {}
            return self._sequencer.waits()

    def missing(self) -> list[int]:
        """Servers that have not said yet where they are."""
        with self._lock:
            begun = self._sequencer is not None
            return [] if begun else [i for i in range(self._servers) if i not in self._recoveries]

    # ── what leaves ─────────────────────────────────────────────────────────────────────────────

    def _extend(self, entries: Sequence[m.AnyEntry]) -> None:
        """Append entries for every server; under the lock, so that all get one order."""
        assert self._sequencer is not None
        committed = self._sequencer.committed
        if not entries and committed == self._spread:
            return
        self._spread = committed
        self._tail.extend(entries)
        self._put(self.term, entries, committed)
        for link in self._links.values():
            link.put(entries, committed)

    def flush(self) -> None:
        """Send what is pending to the other servers.

        A link whose connection is lost keeps what it has for the next one.
        """
        for link in self._links.values():
            link.flush()
