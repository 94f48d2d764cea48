"""The coordinator: who is a member, which server is which, who reads what, and when all of it is over.

Theory of operation
-------------------

Two kinds of state machine are coupled here.

**The cluster** is in one stage:

    forming ──every server has joined──▶ running ──`finish`──▶ finishing ──nobody is away──▶ ended
       ▲                                    │
       └──── a shard is lost, rewinds ──────┤
                                            └──── a shard is lost, `end` ──▶ ended

While it forms nobody holds anything: no node has been welcomed, nothing is persisted, a server that goes
leaves its slot to the next. It runs from the moment at which the last server joins. From then on the loss
of a shard with all its copies begins the next generation, or the end.

**Each connection** is in one phase (`phases`):

    Stranger ──Ask─────────▶ Survey ──all asked have answered──▶ (closed)
       ├──EndCluster───────▶ (closed), and the owner is told
       ├──TakeCheckpoint───▶ Asking ──it is written, or cannot be──▶ (closed)
       ├──RequestSlot──────▶ Spare ──a slot is free──▶ Invited ──Join──▶ Joining
       ├──Join─────────────▶ Joining ──others reach it, and its turn has come──▶ Entered ──▶ Present
       └──Rejoin───────────▶ Present ──Departed, closed, silent for a lease, struck off──▶ (closed)

How they couple:

- *Joining → Entered* puts a node into the roster: a server's turn comes at once, all others' once the cluster
  runs. *Entered → Present* is the welcome: servers are welcomed together when the last has joined; a standby
  at once; workers and observers when every server that answers knows the roster with them, and a worker when
  server 0 has said where its rank is in its data. A lease begins with the welcome, since heartbeats do.
- Every change of the roster is a term. It is persisted before any message that could show it (`state` sees to
  that), and told to all servers and standbys (`hosts`). Those that do not answer are told again, not waited
  for.
- The end of a member's connection is its death unless it said Departed. Only the connection that counts as
  its own counts, so a member that came back over another is not struck off by the end of its first.
- Everything that waits is an entry with a deadline: `_settle`, after every event, moves on whatever can;
  `tick` ends what has waited for too long. So nothing depends on the order in which conditions come true.
- Time is the coordinator's own (`own_time`): it does not pass while the coordinator stands still, so silence
  is judged only when what was said has had the time to be heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, RefusedError
from headwater.machines.actions import Actions, Conn, Perform, Tell
from headwater.machines.coordinator.hosts import ANSWER_S, TAG, Hosts
from headwater.machines.coordinator.identity import Identity
from headwater.machines.coordinator.members import FROM_MEMBERS, Members
from headwater.machines.coordinator.newcomers import Newcomers
from headwater.machines.coordinator.phases import (
    Asking,
    Collecting,
    Entered,
    Invited,
    Joining,
    Phase,
    Present,
    Stranger,
    named,
)
from headwater.machines.coordinator.state import CoordinatorRecord, Stage, State
from headwater.machines.coordinator.surveys import Surveys
from headwater.spec.cluster import ClusterConfig

FIRST_S = 10.0
"""How long a stranger may take to say what it wants, in seconds."""


_Transitions: TypeAlias = dict[type[Phase], dict[type, Callable[[Conn, Any, Any], None]]]
"""What a connection may send in each phase, and who takes it. Everything else breaks the protocol."""


@dataclass(frozen=True, slots=True)
class AllFinished:
    """An event: every declared worker has done its work, and nobody else is at work."""


@dataclass(frozen=True, slots=True)
class EndAsked:
    """An event: somebody wants the cluster to end in order."""

    by: str


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """A task: write a checkpoint of now; its result is the path."""


class CoordinatorMachine:
    """The decisions of one coordinator.

    Args:
        settings: what every member is told.
        identity: of the cluster.
        now: the driver's clock.
        generation: of the log, to begin with.
        record: what a former coordinator persisted, to go on with.
        enlists: whether servers come by themselves and ask what they are to be.
        answer_s: how long a host may take to answer, in seconds.

    Attributes:
        due: when `tick` should come.
        state, members, newcomers, surveys, traces: the parts of the decisions.
    """

    def __init__(
        self,
        settings: ClusterConfig,
        identity: Identity,
        now: float,
        *,
        generation: int = 0,
        record: CoordinatorRecord | None = None,
        enlists: bool = False,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.due: float | None = now
        self.state = State(settings, identity, now, record, generation)
        self._hosts = Hosts(self.state.emit, identity.cluster, answer_s)
        self.members = Members(self.state, self._hosts)
        self.newcomers = Newcomers(self.state, self._hosts, self.members, enlists)
        self.surveys = Surveys(self.state, self._hosts, self.members, self.newcomers)
        self.traces = self.members.traces
        self._transitions: _Transitions = {
            Stranger: {
                m.Ask: self.surveys.on_ask,
                m.RequestSlot: self.newcomers.on_request_slot,
                m.Join: self.newcomers.on_join,
                m.Rejoin: self.newcomers.on_rejoin,
                m.EndCluster: self._end_asked,
                m.TakeCheckpoint: self._checkpoint_asked,
                m.CollectTrace: self.traces.on_collect,
            },
            Collecting: {m.CollectTrace: self.traces.on_end, m.Acknowledged: self.traces.on_taken},
            Invited: {m.Join: self.newcomers.on_join},
            Present: dict.fromkeys(FROM_MEMBERS, self.members.received),
        }
        self._look = self._back_by = 0.0
        self._told_finished = False

    # ── what the owner wants ────────────────────────────────────────────────────────────────────

    def begin(self, now: float) -> Actions:
        """Go on where the record ends: by telling the hosts what they may not have been told."""
        self._turn(now)
        state = self.state
        if state.stage == "running":
            roster = state.book.view()
            state.warn(f"the coordinator is back, with {len(roster.members)} members in term {roster.term}")
            if state.book.complete():
                self.members.publish()
            else:  # the one before was killed between noting that death and its consequence
                self.members.lose("a server is gone, and nobody else has its shard")
        return self._done()

    def end(self, error: str, reason: str, now: float) -> Actions:
        """Refuse everybody from now on, with an error of this name: those who ask, and those who wait."""
        self._turn(now)
        self.members.end(m.Refused(error, reason))
        return self._done()

    def finish(self, last_word: m.Refused | m.Finished, now: float) -> Actions:
        """End with this, once every member has come back to a coordinator that was started again, or is dead:
        whoever called back later would find nobody."""
        self._turn(now)
        state = self.state
        if state.stage != "ended":
            state.stage, state.last_word = "finishing", last_word
            self._back_by = state.now + 2 * state.settings.lease
        return self._done()

    def reserve(self, ranks: Iterable[int]) -> Actions:
        """Give these ranks only to workers that ask for them by number."""
        self.state.book.reserved = frozenset(ranks)
        return []

    def checkpointed(self, counts: m.CheckpointCounts, now: float) -> Actions:
        """A checkpoint was written, or could not be: for statistics."""
        self._turn(now)
        self.surveys.checkpointed(counts)
        return self._done()

    # ── what the owner sees ─────────────────────────────────────────────────────────────────────

    @property
    def stage(self) -> Stage:
        """Of the cluster."""
        return self.state.stage

    @property
    def generation(self) -> int:
        """Of the log."""
        return self.state.book.generation

    @property
    def complete(self) -> bool:
        """Whether there is a server of every index now."""
        return self.state.book.complete()

    @property
    def all_finished(self) -> bool:
        """Whether every declared worker has done its work, and the cluster has not ended yet."""
        return self.state.book.all_finished() and self.state.stage != "ended"

    def is_waited_for(self) -> bool:
        """Whether somebody waits for something that ends by itself: an answer of a host, or a join."""
        moments = [self._hosts.due(), self.members.due(), *self.newcomers.waits_due()]
        return self.stage == "finishing" or any(moment is not None for moment in moments)

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """A connection exists."""
        self._turn(now)
        if dialled is None:
            self.state.phases[conn] = Stranger(self.state.now + FIRST_S)
        else:
            self._hosts.opened(conn, int(dialled.removeprefix(TAG)), self.state.now)
        return self._done()

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """A message came. Raises ProtocolError where it is none that this connection may send now."""
        self._turn(now)
        phase = self.state.phases.get(conn)
        if conn in self._hosts:
            self._hosts.received(conn, message)
        elif phase is not None:
            transitions = self._transitions.get(type(phase), {})
            take = transitions.get(type(message))
            if take is None:
                expected = ", ".join(kind.__name__ for kind in transitions) or "nothing"
                what = type(message).__name__
                raise ProtocolError(f"a {type(phase).__name__} sent {what}, expected {expected}")
            take(conn, phase, message)
        return self._done()

    def unreachable(
        self, dialled: str, why: str, now: float, *, nobody: bool = False, refused: bool = False
    ) -> Actions:
        """A host cannot be dialled. If it has not come back to a restarted coordinator either, and nobody
        listens at its address, its process has ended."""
        self._turn(now)
        state, id = self.state, int(dialled.removeprefix(TAG))
        self._hosts.unreachable(id)
        member = state.book.member(id)
        if member is not None:
            state.note(f"{named(member)} does not answer: {why}")
            if nobody and id not in state.conns:
                self.members.strike_off(member, "nobody listens at its address any more")
        return self._done()

    def performed(self, tag: str, result: Any, now: float) -> Actions:
        """A task is done: a newcomer's addresses were dialled, a checkpoint was chosen, or written."""
        self._turn(now)
        what, _, number = tag.partition(" ")
        if what == "reach":
            self.newcomers.reached(int(number), result)
        elif what == "write":
            self._written(int(number), result)
        else:
            self.newcomers.chosen(int(number), result)
        return self._done()

    def closed(self, conn: Conn, now: float) -> Actions:
        """A connection has ended."""
        self._turn(now)
        state = self.state
        if conn in self._hosts:
            self._hosts.closed(conn)
        phase = state.forget(conn)
        if isinstance(phase, Entered | Present):
            self.members.strike_off(phase.member, "its connection to the coordinator ended")
        elif isinstance(phase, Invited | Joining) and phase.slot is not None:
            state.note(f"{phase.slot} was kept for a node that is gone")
        return self._done()

    def tick(self, now: float) -> Actions:
        """Time has passed: end what has waited for too long."""
        self._turn(now)
        self._hosts.tick(self.state.now)
        if self.state.now >= self._look:
            self._look = self.state.now + self.state.settings.lease / 10
            self.members.expire()
            self._hosts.again(self.state.now)
        self.newcomers.tick()
        return self._done()

    def _end_asked(self, conn: Conn, stranger: Stranger, message: m.EndCluster) -> None:
        """Have the owner end the cluster: there is a last checkpoint to take first."""
        self.state.warn(f"the cluster is ended, as {message.by} asks")
        self.state.send(conn, m.Acknowledged())
        self.state.hang_up(conn)
        self.state.emit(Tell(EndAsked(message.by)))

    def _checkpoint_asked(self, conn: Conn, stranger: Stranger, message: m.TakeCheckpoint) -> None:
        """Have the owner write one; whoever asked hears when it is on disk."""
        state = self.state
        if state.stage != "running":
            missing = "its servers have not all joined" if state.stage == "forming" else "it ends"
            state.refuse(conn, RefusedError(f"no checkpoint of this cluster can be written now: {missing}"))
            return
        state.note(f"a checkpoint is written, as {message.by} asks")
        state.phases[conn] = Asking()
        state.emit(Perform(WriteCheckpoint(), f"write {conn}"))

    def _written(self, conn: Conn, result: str | HeadwaterError) -> None:
        state = self.state
        if not isinstance(state.phases.get(conn), Asking):
            return  # it has gone, or was told that the cluster has ended
        if isinstance(result, HeadwaterError):
            state.refuse(conn, result)
        else:
            state.send(conn, m.CheckpointTaken(result))
            state.hang_up(conn)

    # ── what follows from every event ───────────────────────────────────────────────────────────

    def _turn(self, now: float) -> None:
        still = self.state.own.advance(now)
        self.traces.clock = round(now * 1e9)
        if still > self.state.settings.lease / 2:
            self.state.warn(
                f"this coordinator stood still for {still:.1f} s, in which nobody's silence counts"
            )

    def _done(self) -> Actions:
        """Move on whatever can; what is to be done, and when time must pass."""
        comes = self._settle()
        moments = [self._look, *(self.newcomers.due() if comes else ()), *self.traces.due()]
        moments += [one for one in (self._hosts.due(), self.members.due()) if one is not None]
        if self.stage == "finishing":
            moments.append(self._back_by)
        self.due = self.state.own.clock_at(min(moments))
        actions = self.state.taken()
        return actions + self.traces.noted(actions)

    def _somebody_comes(self) -> bool:
        """Whether there is a connection of anybody who is no member; most events are of members."""
        return any(type(phase) is not Present for phase in self.state.phases.values())

    def _settle(self) -> bool:
        """Whether there is anybody left who is no member."""
        state = self.state
        for tag, answer in self._hosts.answers():
            what, _, number = tag.partition(" ")
            take = self.surveys.take if what == "survey" else self.members.take_recorded
            take(int(number), answer)
        if state.stage == "finishing" and (state.now >= self._back_by or not state.away()):
            self.members.end(state.last_word)
        comes = self._somebody_comes()
        if state.stage != "ended":
            if comes:
                self.newcomers.take_in()
                self.newcomers.invite()
                self.newcomers.tell_waits()
            self.members.ask_recorded()
        self.members.note_failovers()
        self.traces.settle()
        if comes:
            self.surveys.answer()
            comes = self._somebody_comes()
        if self.all_finished != self._told_finished:
            self._told_finished = self.all_finished
            if self._told_finished:
                state.emit(Tell(AllFinished()))
        return comes
