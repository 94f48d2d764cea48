"""One server's way through the log: entries in, in order; prepared, committed, answered.

Theory of operation. Entries arrive from the sequencer of a term and wait in a queue. While the applier is
`busy` the caller calls `advance`, which does one thing: it takes the next entry, or applies one that is
committed, which may be a pass over all parameters. Between two calls the caller sends what came of the
first.

Without standbys an entry is processed as soon as its turn comes. With standbys it is first *prepared*: its
inputs are kept here, and go to the standby if there is one. It is processed once the sequencer says that it
is *committed*, which means that every server has prepared it. `progress` says how far this server is, and
what it says is a promise: where a standby is needed, an entry counts only once the standby has it.

A new term begins with `recovery`, which tells the new sequencer where this server is. Until that sequencer
has said with `agree` which entries stand, only what is applied counts as prepared, and members are not
served: they may have seen more than is applied here.

The pieces couple like this: `StandbyLink.needed` decides whether `progress` waits for acknowledgements, and
`progress` decides, through the sequencer, what is committed. So a lost standby holds back commits until the
roster says that it is gone, and `detach` is called.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.machines.actions import Actions
from headwater.machines.standby_link import StandbyLink
from headwater.shard import Shard
from headwater.shard.replica import own_memory
from headwater.shard.state import Answers

_Step: TypeAlias = tuple[int, m.AnyEntry | None, int]
"""Term, next entry (None: only news of the commit index), and how far the log is committed."""


class Progress(NamedTuple):
    """What the sequencer of `term` is told.

    `prepared`: this server, and its standby where that counts, has the log up to here. `measured`: norms that
    were asked for and have not been reported yet.
    """

    term: int
    prepared: int
    measured: tuple[m.Sums, ...] = ()


class LogApplier:
    """For the shard of one server; `replicated`: in a cluster with standbys, entries are prepared first.

    Attributes:
        shard: of this server; a standby gets another one with every snapshot.
        serving: whether all that members may have seen is applied here, so that they can be served.
        standby: the one that follows this server, caught up or not.
        moved: whether `progress` has something to tell that the sequencer does not know.
    """

    def __init__(self, shard: Shard, *, replicated: bool) -> None:
        self.shard = shard
        self.serving = False
        self.standby: StandbyLink | None = None
        self.moved = False
        self._replicated = replicated
        self._arrived: deque[_Step] = deque()
        self._committed = 0
        self._reported = 0
        self._agreed: int | None = None

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def put(self, entries: m.Entries) -> None:
        """Append to what is to be processed."""
        term, committed = entries.term, entries.committed
        if entries.entries:
            self._arrived.extend([(term, entry, committed) for entry in entries.entries])
        else:
            self._arrived.append((term, None, committed))

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        return True if self._arrived else self._replicated and self._may_commit()

    @property
    def next_entry(self) -> m.AnyEntry | None:
        """The entry that `advance` processes next; None where it does something else."""
        if (self._replicated and self._may_commit()) or not self._arrived:
            return None
        return self._arrived[0][1]

    @property
    def waiting(self) -> int:
        """Entries and news of the commit index that wait for their turn."""
        return len(self._arrived)

    def _may_commit(self) -> bool:
        return self._committed > self.shard.position < self.shard.prepared

    def advance(self, actions: Actions) -> Answers:
        """Do the next thing; returns who is answered because of it.

        Blocks for a pass over memory. What the standby is sent is appended to `actions`.

        Raises:
            ProtocolError: what arrived does not continue the log.
        """
        if self._replicated and self._may_commit():
            answers = self.shard.commit(self.shard.position + 1)
            self.moved |= self.shard.has_measured
            self._note_serving()
            return answers
        term, entry, committed = self._arrived.popleft()
        shard = self.shard
        if term != shard.term:
            try:
                shard.admit(term)
            except RefusedError:
                return []  # from a sequencer that was replaced
        if not self._replicated:
            if entry is None:
                return []
            answers = shard.process(entry)
            self.moved |= shard.has_measured
            return answers
        self._committed = max(self._committed, committed)
        actions += self._prepare(term, entry, committed)
        return []

    def _prepare(self, term: int, entry: m.AnyEntry | None, committed: int) -> Actions:
        standby = self.standby
        if entry is None:
            return standby.commit(term, committed) if standby is not None else []
        self.moved = True
        resolved = self.shard.prepare(entry, standby.room if standby is not None else own_memory)
        return standby.ship(resolved, committed) if resolved is not None and standby is not None else []

    def _note_serving(self) -> None:
        if self._agreed is not None and self.shard.position >= self._agreed:
            self.serving = True

    # ── what the sequencer is told ──────────────────────────────────────────────────────────────

    def progress(self) -> Progress:
        """How far this server is, for the sequencer."""
        self.moved = False
        shard, standby = self.shard, self.standby
        measured = tuple(shard.take_measured()) if shard.has_measured else ()
        if not self._replicated:
            return Progress(shard.term, 0, measured)
        if not shard.agreed:
            return Progress(shard.term, shard.position)
        here = shard.safe if standby is not None and standby.needed else shard.prepared
        self._reported = max(self._reported, here)
        return Progress(shard.term, self._reported, measured)

    # ── the standby ─────────────────────────────────────────────────────────────────────────────

    def attach(self, standby: StandbyLink) -> Actions:
        """Have a standby from now on: what it is sent first. Blocks while the shard is copied."""
        snapshot, missing = self.shard.attach_standby()
        self.standby = standby
        actions = standby.introduce(snapshot, self.shard.agreed_term)
        for resolved in missing:
            actions += standby.ship(resolved, self._committed)
        return actions

    def acknowledged(self, standby: StandbyLink, message: m.AppendAck) -> bool:
        """Take an acknowledgement; whether the standby has caught up with it, from now on for good."""
        if standby is not self.standby:
            return False
        standby.acknowledged(message, self.shard.position)
        self.shard.acknowledged(message.term, message.prepared)
        # From here on nothing more is reported without the standby; what was, it must have first.
        standby.needed = True
        self.moved = True
        if standby.caught_up or self.shard.safe < self._reported:
            return False
        standby.caught_up = True
        return True

    def detach(self) -> None:
        """The roster says that there is no such standby: what it lacked counts from now on."""
        self.standby = None
        self.shard.detach_standby()
        self.moved = True

    def commit(self, position: int) -> None:
        """On a standby: entries up to `position` may be applied, once they are here."""
        self._committed = max(self._committed, position)

    def restart(self, shard: Shard) -> None:
        """Go on with another shard: a standby's, after a snapshot."""
        self.shard = shard
        self._arrived.clear()
        self._committed = shard.position
        self._reported = 0

    # ── terms ───────────────────────────────────────────────────────────────────────────────────

    def recovery(self, term: int) -> m.Recovery:
        """Follow the sequencer of this term: where this server is.

        In a term that has begun, what stands stays so: the connection to its sequencer was made anew.

        Raises:
            RefusedError: a newer term is known.
        """
        recovery = self.shard.recovery(term)
        self._arrived.clear()
        if not self.shard.agreed:
            self._agreed = None
            self._committed = self.shard.position  # the new sequencer says how far it is committed
            self.serving = False
        return recovery

    def agree(self, agreed: m.StartTerm) -> Actions:
        """Discard what a new sequencer did not find everywhere; the rest is applied as it is committed.

        Raises:
            RefusedError: a newer term is known.
            ProtocolError: entries after that position were applied here.
        """
        if agreed.term == self.shard.agreed_term:
            return []
        self.shard.truncate(agreed)
        self.moved |= self._replicated
        self._reported = min(self._reported, agreed.position)
        self._agreed = agreed.position
        self._note_serving()
        return self.standby.agree(agreed) if self.standby is not None else []
