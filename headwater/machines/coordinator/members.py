"""Members: what they may say, how a membership ends, and what follows from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from headwater import messages as m
from headwater.machines.actions import Conn, Tell
from headwater.machines.coordinator.hosts import Hosts
from headwater.machines.coordinator.phases import Entered, Present, Stranger, Survey, named
from headwater.machines.coordinator.reading import Reading
from headwater.machines.coordinator.state import State
from headwater.machines.coordinator.tally import Tally
from headwater.machines.coordinator.trace_collection import TraceCollection
from headwater.machines.splits import Replies
from headwater.spec.user_settings import pack

AGAIN_S = 0.05
"""How long after no answer server 0 is asked again, in seconds."""


@dataclass(frozen=True, slots=True)
class Ended:
    """An event: the cluster is over. `refusal`: what everybody is told; None: training has finished."""

    refusal: m.Refused | None


@dataclass(frozen=True, slots=True)
class Logged:
    """An event: what `Worker.log` was told in the worker with this rank, in order."""

    rank: int
    generation: int
    points: tuple[m.LoggedPoint, ...]


class Members:
    """Of a cluster.

    Attributes:
        tally: what the ranks have done, and who came and went.
        reading: splits and positions.
        traces: who collects them.
    """

    def __init__(self, state: State, hosts: Hosts) -> None:
        self.traces = TraceCollection(state)
        self.tally = Tally()
        self.reading = Reading(state.settings.workers)
        self._state = state
        self._hosts = hosts
        self._ask_again = 0.0

    def publish(self) -> None:
        """Tell every server and standby the roster."""
        self._hosts.tell(self._state.book.view(), self._state.now)

    def welcome(self, conn: Conn, member: m.Member, position: m.Position | None = None) -> None:
        """It is a member from now on, over this connection, and its lease begins."""
        state, settings = self._state, self._state.settings
        state.book.heard(member.id, state.now)
        state.phases[conn], state.conns[member.id] = Present(member), conn
        welcome = m.Welcome(
            member=member,
            term=state.book.term,
            servers=state.book.of("server"),
            workers=settings.workers,
            sync=settings.sync,
            settings=pack(settings.settings),
            patience=settings.patience,
            deadline=settings.deadline,
            heartbeat=settings.lease / 3,
            generation=state.book.generation,
            position=position,
            key=state.identity.key_of(member.id),
            returns=state.identity.returns,
            cluster=state.identity.cluster,
        )
        state.send(conn, welcome)
        self.traces.welcomed(member.id)

    # ── what members say ────────────────────────────────────────────────────────────────────────

    def received(self, conn: Conn, phase: Present, message: m.AnyMessage) -> None:
        """Whatever a member says shows that it lives."""
        self._state.book.heard(phase.member.id, self._state.now)
        FROM_MEMBERS[type(message)](self, conn, phase.member, message)

    def _on_heartbeat(self, conn: Conn, member: m.Member, message: m.Heartbeat) -> None:
        pass

    def _on_progress(self, conn: Conn, member: m.Member, progress: m.Progress) -> None:
        state = self._state
        self.tally.report(member, progress, state.now)
        if progress.points:
            state.emit(Tell(Logged(member.index, state.book.generation, progress.points)))

    def _on_follower(self, conn: Conn, member: m.Member, progress: m.FollowerProgress) -> None:
        told = msgspec.structs.replace(progress, member=member.id)
        self.tally.followers[member.id] = told, self._state.now

    def _on_reading(self, conn: Conn, member: m.Member, message: m.Lease | m.Finish | m.InMeeting) -> None:
        self._reply(self.reading.serve(member, message))

    def _on_get_servers(self, conn: Conn, member: m.Member, message: m.GetServers) -> None:
        book = self._state.book
        self._state.send(conn, m.ServerAddresses(book.term, book.of("server")))

    def _on_caught_up(self, conn: Conn, member: m.Member, news: m.CaughtUp) -> None:
        if self._state.book.caught_up(news.standby):
            self.publish()

    def _on_standby_lost(self, conn: Conn, member: m.Member, news: m.StandbyLost) -> None:
        """A standby that has lost its server no longer has all that the server has."""
        standby = self._state.book.member(news.standby)
        if standby is not None and standby.role == "standby":
            self.strike_off(standby, "its server lost the connection to it")

    def _on_finished(self, conn: Conn, member: m.Member, message: m.Finished) -> None:
        self._state.book.finish(member.id)
        self.tally.frontier.gone(member.index)

    def _on_departed(self, conn: Conn, member: m.Member, message: m.Departed) -> None:
        if message.finished:
            self._state.book.finish(member.id)
        self.strike_off(member, "")

    def _on_trace_events(self, conn: Conn, member: m.Member, told: m.TraceEvents) -> None:
        self.traces.on_events(member, told)

    def _reply(self, replies: Replies) -> None:
        for member, reply in replies:
            conn = self._state.conns.get(member)
            if conn is not None:
                self._state.send(conn, reply)

    # ── the end of a membership ─────────────────────────────────────────────────────────────────

    def strike_off(self, member: m.Member, why: str) -> None:
        """It is no member any more: `why` it was declared dead, "" where it left."""
        state = self._state
        if state.stage == "ended":
            return
        verdict = f"{named(member)} was declared dead: {why}"
        departure = state.book.remove(member.id, verdict if why else "")
        if departure is None:
            return
        self.traces.gone(member.id)
        self.tally.followers.pop(member.id, None)
        conn = state.conns.pop(member.id, None)
        if conn is not None and conn in state.phases:
            if why:
                state.send(conn, m.Refused("DeclaredDeadError", verdict))
            state.hang_up(conn)
        dies = bool(why) and member.role != "observer"
        if dies:
            heir = f"; its standby (pid {departure.heir.pid}) takes over" if departure.heir else ""
            state.warn(f"{named(member)} is gone without leaving: {why}{heir}")
        if state.stage == "forming":
            state.met.discard((member.pid, member.host))
            return  # it had nothing yet, and its slot is free
        if dies:
            self.tally.lost[member.role] += 1
        if departure.heir is not None:
            self.tally.failing(state.book.term, state.now)
        if member.role == "worker":
            self.tally.frontier.gone(member.index)
        if departure.loses_shard:
            self.lose(f"{named(member)} is gone, and nobody else has its shard: {why or 'it has left'}")
        else:
            self.publish()
        if dies:
            state.emit(Tell(departure))
        if member.role == "worker":
            self.reading.gone(member, died=dies)

    def expire(self) -> None:
        """Strike off those whose lease has ended."""
        state = self._state
        for member in state.book.expired(state.now):
            self.strike_off(member, f"nothing was heard of it for {state.settings.lease:g} s")

    def lose(self, reason: str) -> None:
        """A shard is lost with all its copies: begin the next generation, or end."""
        state = self._state
        if state.stage == "finishing":
            return  # what was to be done is done
        if not state.settings.rewinds:
            self.end(m.Refused("ClusterEndedError", reason))
            return
        refusal = m.Refused("RewoundError", f"{reason}; training begins anew from the last checkpoint")
        state.book.begin_anew()
        state.keep()
        state.stage = "forming"
        self.tally.rewinds += 1
        self.tally.followers.clear()
        self.tally.frontier.begin_anew()
        state.warn(refusal.reason)
        for conn in state.conns.values():
            state.send(conn, refusal)
            state.hang_up(conn)
        state.conns.clear()
        self._hosts.close()
        self.reading = Reading(state.settings.workers)

    def end(self, last_word: m.Refused | m.Finished) -> None:
        """Nothing follows. Everybody who waits for something is told."""
        state = self._state
        if state.stage == "ended":
            return
        state.keep()
        state.stage, state.last_word = "ended", last_word
        refusal = last_word if isinstance(last_word, m.Refused) else None
        state.keep_end(refusal.reason if refusal is not None else "training has finished")
        for conn, phase in list(state.phases.items()):
            if not isinstance(phase, Stranger | Survey):
                state.say_last(conn)
        state.conns.clear()
        self._hosts.close()
        state.emit(Tell(Ended(refusal)))

    def note_failovers(self) -> None:
        """A failover is over when every server that answers knows who took over."""
        over = [term for term in self.tally.unknown if not self._hosts.waited_for(term)]
        self.tally.known(over, self._state.now)

    # ── what the log has recorded of everybody's reading ────────────────────────────────────────

    def ask_recorded(self) -> None:
        """Ask server 0, where something waits for what it says."""
        state = self._state
        if not self.reading.wanted or state.now < self._ask_again:
            return
        servers = state.book.of("server")
        if servers and servers[0].index == 0:
            self.reading.asked()
            self._hosts.ask(servers[0], f"recorded {state.book.generation}", state.now)

    def take_recorded(self, generation: int, answer: m.ServerStatistics | None) -> None:
        """Server 0 has answered, or has not in time."""
        state = self._state
        if generation != state.book.generation:
            return
        # A step of a worker that is gone may be in the log and not applied yet, as where a standby is slow:
        # nobody goes on in its place before that is recorded.
        if answer is None or any(state.book.member(id) is None for id in answer.enrolled):
            self.reading.unanswered()
            self._ask_again = state.now + AGAIN_S
            return
        ranks = {worker.index for worker in state.book.of("worker")}
        follows = self.reading.answered(answer.recorded, ranks)
        self._reply(follows.replies)
        for id, position in follows.positions.items():
            phase = state.phase_of(id)
            if isinstance(phase, Entered):
                phase.placed, phase.position = True, position
        for rank, samples in follows.unread.items():
            state.warn(f"{samples} samples of worker {rank}'s part wait for the next worker with that rank")

    def due(self) -> float | None:
        """When server 0 is to be asked again."""
        return self._ask_again if self.reading.wanted and self._ask_again > self._state.now else None


FromMember: TypeAlias = Callable[[Members, Conn, m.Member, Any], None]

FROM_MEMBERS: dict[type, FromMember] = {
    m.Heartbeat: Members._on_heartbeat,
    m.Progress: Members._on_progress,
    m.FollowerProgress: Members._on_follower,
    m.Lease: Members._on_reading,
    m.Finish: Members._on_reading,
    m.InMeeting: Members._on_reading,
    m.GetServers: Members._on_get_servers,
    m.CaughtUp: Members._on_caught_up,
    m.StandbyLost: Members._on_standby_lost,
    m.Finished: Members._on_finished,
    m.Departed: Members._on_departed,
    m.TraceEvents: Members._on_trace_events,
}
"""What a member may say, and what follows."""
