"""A server's half of the log: holds exchanges, takes entries in order, answers.

A state machine without I/O: memory that members share with it arrives as arrays (`Staging`). Primary and
standby are the same machine; a standby holds nothing, so it answers nobody.

Invariants:
- An exchange is held before an entry can name it; an entry is processed once, in order of position.
- With standbys an entry is processed only when it is committed; until then it can be discarded.
- What comes from a sequencer or a primary of an older term is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError
from headwater.log.positions import Positions
from headwater.log.state import LogState
from headwater.shard.checks import Checks, kind_of, name_of
from headwater.shard.cuts import ShardCut
from headwater.shard.measures import Measures
from headwater.shard.outstanding import Members, Outstanding
from headwater.shard.reads import read
from headwater.shard.replica import (
    EntryInputs,
    InputCollector,
    LiveInputs,
    MaterializedEntry,
    ReplicationProgress,
    Room,
    Uncommitted,
    own_memory,
    owned,
    restamped,
)
from headwater.shard.snapshot import ShardSnapshot
from headwater.shard.staging import Array, Staging
from headwater.shard.state import Answers, State
from headwater.shard.tables import StagedRows
from headwater.spec.layout import Layout
from headwater.spec.sync import Reduce


class Shard:
    """Server `index` of `servers`.

    Attributes:
        term: of the sequencer it follows; what comes from an older one is refused.
        agreed_term: of the last sequencer that has said which entries stand.
        exchanges: held or read so far.
        vectors, tables: as of `position`.
    """

    def __init__(self, index: int, servers: int, reduce: Reduce) -> None:
        self.index = index
        self.servers = servers
        self.term = 0
        self.agreed_term = 0
        self.exchanges = 0
        self._members = Members()
        self._state = State(index, servers, reduce, self._members)
        self.vectors, self.tables = self._state.vectors, self._state.tables
        self._checks = Checks(self.vectors, self.tables, self._members)
        self._live = LiveInputs(self._members)
        self._collector = InputCollector(self.vectors, self.tables, self._live, reduce)
        self._measures = Measures(self.vectors, self._members, self._live, reduce)
        self._closed: deque[Uncommitted] = deque()
        self._shipped: ReplicationProgress | None = None

    @property
    def agreed(self) -> bool:
        """Whether the sequencer that it follows has said which entries stand."""
        return self.agreed_term == self.term

    @property
    def version(self) -> int:
        """Of the last entry processed that changed values."""
        return self._state.version

    @property
    def position(self) -> int:
        """Of the last entry processed."""
        return self._state.position

    @property
    def standings(self) -> LogState:
        """As of the last entry processed."""
        return self._state.standings

    @property
    def positions(self) -> Positions:
        """Where the workers are in their data, as of the last entry processed."""
        return self._state.positions

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def range_of(self, layout: Layout) -> tuple[int, int]:
        """This server's elements [start, stop) of a model."""
        return self._state.range_of(layout)

    def reconnected(self, member: int, connection_epoch: int) -> None:
        """The member has connected anew: from now on no older epoch is taken or answered.

        Raises:
            RefusedError: it is gone for good, or a newer connection epoch is known.
        """
        self._check_present(member)
        self._members.reconnected(member, connection_epoch)

    def _check_present(self, member: int) -> None:
        if self._state.standings.is_gone(member):
            raise RefusedError(f"member {member} has left or was retired: connect again as a new one")

    def replace_staging(self, member: int, model: int, staging: Staging, connection_epoch: int) -> None:
        """Take over other memory for a member's part of a model, outside the log, in a new connection epoch.

        Where an exchange of it is outstanding, what `staged` gives must be there already.

        Raises:
            RefusedError: the member is gone, or the connection epoch is over.
            ProtocolError: there is no such model.
        """
        self.reconnected(member, connection_epoch)
        self._checks.check_model(model)
        self._members.stage(member, model, staging)

    def hold(
        self,
        member: int,
        request: m.Request,
        staging: Staging | None = None,
        rows: Sequence[StagedRows] = (),
        connection_epoch: int = 0,
    ) -> m.Held:
        """Hold an exchange until an entry names it; the return is for the sequencer.

        `staging` comes with Register and Attach, `rows` with requests that have `Rows`. A member has one
        exchange outstanding at a time; in a newer connection epoch the same one may come again, answered or
        not.

        Raises:
            UsageError: the request cannot be served; nothing is held.
            RefusedError: the member is gone, or its connection epoch is over.
            ProtocolError: the request breaks the protocol; its connection should be closed.
        """
        self.reconnected(member, connection_epoch)
        self._members.check(member, request.number, connection_epoch)
        standing = self._state.standings.members.get(member)
        if standing is not None and (request.number, connection_epoch) <= (
            standing.answered,
            standing.connection_epoch,
        ):
            last = standing.answered
            raise ProtocolError(f"member {member} sent exchange {request.number}, but {last} was answered")
        self._checks.check(member, request, rows)
        kind = self._kind(member, request)
        measured, weight, meeting, pace, current, fragment = False, 1.0, None, None, False, -1
        if isinstance(request, m.Step):
            measured = kind == "step" and self._measures.needed(request)
            current = measured and self._measures.depends_on_models(request)
            weight, pace, fragment = request.weight, request.pace, request.fragment
        elif isinstance(request, m.Meet):
            meeting = request.meeting
            measured = request.work is not None and bool(request.work.reductions)
        elif isinstance(request, m.Operate):
            measured = bool(request.work.reductions)
        held = m.Held(
            member,
            request.number,
            kind,
            name_of(request),
            connection_epoch,
            measured,
            weight,
            meeting,
            pace,
            plan=request.plan if isinstance(request, m.Operate) else None,
            done=request.done if isinstance(request, m.NextPortion) else None,
            current=current,
            fragment=fragment,
        )
        self._members.hold(Outstanding(held, request, staging, rows))
        self.exchanges += 1
        return held

    def read(
        self, member: int, request: m.Read, rows: Sequence[StagedRows] = (), connection_epoch: int = 0
    ) -> m.Answer:
        """Answer a read with what is applied here, outside the log; `rows` as of `hold`.

        Blocks for a pass over what is read. Raises as `hold`.
        """
        self.reconnected(member, connection_epoch)
        self._members.check(member, request.number, connection_epoch)
        self._checks.check(member, request, rows)
        self.exchanges += 1
        return read(self._state, self._members, member, request, rows)

    def _kind(self, member: int, request: m.Request) -> m.Kind:
        """What the sequencer is to make of it; a step that was decided in another exchange is a pull."""
        if isinstance(request, m.Step):
            standing = self.standings.members.get(member)
            known = standing is not None and request.number in (standing.answered, standing.committed)
            return "pull" if not known and self._state.ledger.is_repeat(member, request.step) else "step"
        return kind_of(request)

    def held(self) -> tuple[m.Held, ...]:
        """Every exchange outstanding, for a sequencer that may have lost reports."""
        return self._members.all_held()

    def staging(self, member: int, model: int) -> Staging:
        """Where the member's part of `model` is staged.

        Raises:
            RefusedError: the member is gone.
            ProtocolError: there is no such model, or the member has not registered it.
        """
        self._check_present(member)
        return self._members.staging(member, model)

    def stagings(self, member: int) -> dict[int, Staging]:
        """The member's, by model; empty where it has none."""
        return self._members.stagings(member)

    def staged(self, member: int, model: int) -> Array:
        """What an outstanding exchange of the member may still need of its part of a model."""
        return self._members.staged(member, model)

    def take_copies(self, member: int) -> list[NDArray[Any]]:
        """The arrays made for the member's last answer, which are its payload, once; the caller's then."""
        return self._members.take_copies(member)

    def take_snapshot(self, member: int) -> ShardSnapshot | None:
        """What the member's answered Checkpoint asked for, once; the caller's until it is given back."""
        return self._members.take_snapshot(member)

    def take_cut(self, member: int) -> ShardCut | None:
        """What the member's answered Publish asked for, once; it stays as it is until its Taken."""
        return self._state.publications.take(member)

    def expect_snapshots(self) -> list[int]:
        """A member will ask for one after the other: of which lengths `provide` should bring memory first."""
        if self._state.copies.begun:
            return []
        return self._state.copies.expect(array for one in self.vectors.values() for array in one.arrays())

    def provide(self, memory: Iterable[NDArray[np.float32]]) -> None:
        """Memory for snapshots: new, or of one that was taken and that nobody reads any more."""
        self._state.copies.take_back(memory)

    def describe(self, number: int) -> m.Description:
        """Which models and tables there are, outside the log."""
        models = tuple(m.ModelInfo(model, vector.spec) for model, vector in self.vectors.items())
        return m.Description(number, self.version, models, tuple(table.spec for table in self.tables))

    # ── the log, without a standby: written is committed ────────────────────────────────────────

    def process(self, entry: m.AnyEntry) -> Answers:
        """Process the next entry of the log; blocks for the passes over memory that it asks for.

        Raises:
            ProtocolError: it is not the next one.
        """
        self._check_next(entry)
        if isinstance(entry, m.Measured) and not self._measures.follows(entry):
            self._measures.measure(entry)
        return self._processed(entry, self._live)

    def _processed(self, entry: m.AnyEntry, inputs: EntryInputs) -> Answers:
        """Measures of values are taken when all entries before are applied, and where members are served."""
        if isinstance(entry, m.Measured) and self._measures.follows(entry):
            self._measures.measure(entry)
        return self._state.process(entry, inputs)

    @property
    def has_measured(self) -> bool:
        """Whether there is something to take."""
        return self._measures.has_new

    def take_measured(self) -> list[m.Sums]:
        """For the sequencer: what its Measured entries asked for since the last call."""
        return self._measures.take_new() if self.agreed else []

    def _check_next(self, entry: m.AnyEntry) -> None:
        if entry.position != self.prepared + 1:
            raise ProtocolError(f"entry {entry.position} after {self.prepared}")

    # ── the log, in a cluster with standbys: prepared, then committed ───────────────────────────

    @property
    def prepared(self) -> int:
        """Position of the last entry that is here, applied or not."""
        return self.position + len(self._closed)

    @property
    def safe(self) -> int:
        """What to report as prepared: entries up to here are on this server and on its standby, if any.

        Until a new sequencer has said what stands, that is only what is applied: it may say that an entry
        which is here was not found everywhere, and give its position to another.
        """
        here = self.prepared if self._shipped is None else self._shipped.acknowledged
        return here if self.agreed else min(here, self.position)

    def attach_standby(self, room: Room = own_memory) -> tuple[ShardSnapshot, list[MaterializedEntry]]:
        """Have a standby from now on: what it begins with, and what it must follow before anything else.

        It begins in `agreed_term`, and has caught up once `safe` is what was reported before it came.
        Blocks for a pass over memory, and one over the gradients of each commit that is not applied yet.
        """
        self._shipped = ReplicationProgress(self.position)
        resolved = [self._resolve_anew(closed, room) for closed in self._closed]
        self._closed = deque(Uncommitted(one.inputs.entry, one.inputs.written, one) for one in resolved)
        for one in resolved:
            self._shipped.add(one)
        return self.snapshot(), resolved

    def _resolve_anew(self, closed: Uncommitted, room: Room) -> MaterializedEntry:
        if closed.resolved is not None:
            return restamped(closed.resolved, self.agreed_term)
        return self._collector.collect(closed.entry, self.agreed_term, closed.written, room)

    def detach_standby(self) -> None:
        """Go on without one."""
        self._shipped = None

    def prepare(self, entry: m.AnyEntry, room: Room = own_memory) -> MaterializedEntry | None:
        """Keep the next entry until it is committed; with a standby, return what that must follow.

        Gradients that it asks to be measured are measured at once, and need not be committed to be reported;
        but where that depends on values too.

        `room` gives memory for gradients and values, which stays until the entry is applied. Blocks, with a
        standby, for a pass over the gradients of a commit.

        Raises:
            ProtocolError: it is not the next one.
        """
        self._check_next(entry)
        if isinstance(entry, m.Measured) and not self._measures.follows(entry):
            self._measures.measure(entry)
        resolved = None
        if self._shipped is not None:
            resolved = self._collector.collect(entry, self.term, self.term, room)
            self._shipped.add(resolved)
        self._closed.append(Uncommitted(entry, self.term, resolved))
        return resolved

    def acknowledged(self, term: int, position: int) -> None:
        """The standby has everything up to `position` that was sent in `term` or before."""
        if self._shipped is not None:
            self._shipped.acknowledge(term, position)

    def follow(self, resolved: MaterializedEntry) -> None:
        """On a standby: keep the next entry until it is committed.

        Raises:
            RefusedError: it comes from a former primary.
            ProtocolError: it is not the next one.
        """
        self.admit(resolved.inputs.term)
        self._check_next(resolved.inputs.entry)
        self._closed.append(Uncommitted(resolved.inputs.entry, resolved.inputs.written, resolved))

    def commit(self, position: int) -> Answers:
        """Process all entries up to `position`; blocks for the passes over memory that they ask for.

        Raises:
            ProtocolError: they are not all here.
        """
        if position > self.prepared:
            raise ProtocolError(f"committed up to {position}, but the last entry here is {self.prepared}")
        answers: Answers = []
        while self.position < position:
            closed = self._closed.popleft()
            answers += self._processed(closed.entry, closed.resolved or self._live)
        return answers

    # ── terms ───────────────────────────────────────────────────────────────────────────────────

    def admit(self, term: int) -> None:
        """Follow the sequencer of this term from now on.

        Raises:
            RefusedError: a newer one is known; nothing of this one may be taken.
        """
        if term < self.term:
            raise RefusedError(
                f"server {self.index} follows the sequencer of term {self.term}, this is of term {term}"
            )
        self.term = term

    def promote(self, term: int) -> None:
        """This standby is the primary from `term` on; what its former primary sends is refused.

        Entries that are not applied yet are copied: a former primary may still write to what it shared.

        Raises:
            RefusedError: the term is not newer.
        """
        if term <= self.term:
            raise RefusedError(f"promoted in term {term}, but this server follows term {self.term} already")
        self.term = term
        self._closed = deque(
            Uncommitted(one.entry, one.written, one.resolved and owned(one.resolved)) for one in self._closed
        )

    def recovery(self, term: int) -> m.Recovery:
        """Where this server is, for the new sequencer of `term`; nothing of an older one is taken any more.

        Raises:
            RefusedError: a newer one is known.
        """
        self.admit(term)
        return m.Recovery(
            term,
            self.index,
            self.standings.record(),
            closed=tuple(one.entry for one in self._closed),
            held=self.held(),
            written=tuple(one.written for one in self._closed),
            agreed=self.agreed_term,
            prepared=self.safe,
            sums=self._measures.all(),
        )

    def truncate(self, agreed: m.StartTerm) -> None:
        """Discard entries that a new sequencer did not find everywhere; none of them was applied.

        The second time it changes nothing: what has come since is of that sequencer.

        Raises:
            RefusedError: a newer sequencer is known.
            ProtocolError: entries after that position were applied here.
        """
        self.admit(agreed.term)
        if agreed.term == self.agreed_term:
            return
        if agreed.position < self.position:
            raise ProtocolError(f"agreed on {agreed.position}, but entry {self.position} is applied here")
        while self._closed and self._closed[-1].entry.position > agreed.position:
            self._closed.pop()
        self._measures.clear()
        if self._shipped is not None:
            self._shipped.truncate(agreed.position)
        self.agreed_term = agreed.term

    # ── snapshots ───────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> ShardSnapshot:
        """A copy of all that follows from the log up to `position`; blocks for one pass over memory."""
        return self._state.snapshot()

    @classmethod
    def restore(cls, snapshot: ShardSnapshot, reduce: Reduce) -> Shard:
        """The shard that `snapshot` was made of, without what members share with it; copies the arrays."""
        shard = cls(snapshot.index, snapshot.servers, reduce)
        shard._state.restore(snapshot)
        return shard
