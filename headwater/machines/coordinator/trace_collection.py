"""Traces: who collects one, which members record for it, and how far their clocks are behind.

Members record while anybody collects, and tell what they recorded twice a second; it is passed on and not
kept. Each answers at once when it is asked to record, and the time that this took there and back bounds the
error of the offset between the two clocks. Members of one machine have one clock, so the best answer of all
of them counts for each; what was used first stays, since slices must not move. On the coordinator's own
machine there is no offset.

    Stranger ──CollectTrace──▶ Collecting ──its seconds are over, or CollectTrace(0)──▶ ending
             ──every member has told its last, or `LAST_S` have passed──▶ over ──it closes

Whoever collects acknowledges each chunk. With `UNREAD` chunks on their way to it, further events are dropped
and counted: a slow disk costs this node no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from headwater import messages as m
from headwater.machines.actions import Action, Actions, Conn, Note, Send
from headwater.machines.coordinator.phases import Collecting, Present, Stranger
from headwater.machines.coordinator.state import State

UNREAD = 200
"""Chunks that may be on their way to whoever collects."""

LAST_S = 2.0
"""How long a member may take to tell what it recorded last, in seconds."""


@dataclass(slots=True)
class _Clocks:
    """Offset and error by machine: the best answer so far, and what was used first and stays."""

    best: dict[str, tuple[int, int]] = field(default_factory=dict)
    used: dict[str, tuple[int, int]] = field(default_factory=dict)

    def heard(self, machine: str, clock: int, echo: int, now: int) -> None:
        error = (now - echo + 1) // 2
        if machine not in self.best or error < self.best[machine][1]:
            self.best[machine] = (echo + now) // 2 - clock, error

    def of(self, machine: str) -> tuple[int, int]:
        return self.used.setdefault(machine, self.best.get(machine, (0, 0)))


class TraceCollection:
    """Of one coordinator.

    Attributes:
        clock: the driver's, in nanoseconds, as of this event.
        unheard: members that were asked to record, and have not answered yet.
        machine: that this coordinator runs on, whose clock is its own; "" where that is not known.
    """

    def __init__(self, state: State) -> None:
        self.clock = 0
        self.unheard: set[int] = set()
        self.machine = ""
        self._state = state
        self._clocks = _Clocks()
        self._recording: set[int] = set()
        self._asked: set[Conn] = set()

    @property
    def _collecting(self) -> dict[Conn, Collecting]:
        if not self._asked:  # as after nearly every event
            return {}
        phases = self._state.phases
        self._asked &= phases.keys()
        found = ((conn, phases[conn]) for conn in sorted(self._asked))
        return {conn: phase for conn, phase in found if isinstance(phase, Collecting) and not phase.over}

    # ── whoever collects ────────────────────────────────────────────────────────────────────────

    def on_collect(self, conn: Conn, phase: Stranger, asked: m.CollectTrace) -> None:
        """Somebody begins to collect."""
        state = self._state
        state.phases[conn] = Collecting(state.now + max(0.0, asked.seconds))
        self._asked.add(conn)
        for one in list(state.phases.values()):
            if isinstance(one, Present):  # others are asked once they are welcomed
                self._ask(one.member.id)

    def on_end(self, conn: Conn, phase: Collecting, asked: m.CollectTrace) -> None:
        """It has enough."""
        phase.until = min(phase.until, self._state.now)

    def on_taken(self, conn: Conn, phase: Collecting, taken: m.Acknowledged) -> None:
        """It has written a chunk."""
        phase.unread = max(0, phase.unread - 1)

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def welcomed(self, id: int) -> None:
        """A member may have come while somebody collects."""
        if any(not phase.ending for phase in self._collecting.values()):
            self._ask(id)

    def _ask(self, id: int) -> None:
        """Have a member record for as long as anybody collects; it is told when that ends."""
        self._recording.add(id)
        self.unheard.add(id)
        longest = max((one.until for one in self._collecting.values()), default=self._state.now)
        seconds = longest - self._state.now + LAST_S
        self._state.send(self._state.conns[id], m.RecordTrace(seconds, self.clock))

    def on_events(self, member: m.Member, told: m.TraceEvents) -> None:
        """A member tells what it recorded."""
        if told.echo:
            self.unheard.discard(member.id)
            self._clocks.heard(member.machine, told.clock, told.echo, self.clock)
        if told.last:
            self._recording.discard(member.id)
        if told.events or told.dropped:
            here = self.machine != "" and member.machine == self.machine
            ahead, error = (0, 0) if here else self._clocks.of(member.machine)
            place = (member.id, member.role, member.index, member.pid, member.host)
            self._pass_on(m.TraceChunk(*place, ahead, error, told.events, told.dropped))

    def gone(self, id: int) -> None:
        """A member tells nothing any more."""
        self._recording.discard(id)
        self.unheard.discard(id)

    def _pass_on(self, chunk: m.TraceChunk) -> None:
        for conn, phase in self._collecting.items():
            if phase.unread >= UNREAD:
                phase.dropped += len(chunk.events) + chunk.dropped
                continue
            phase.unread += 1
            dropped, phase.dropped = chunk.dropped + phase.dropped, 0
            self._state.send(conn, msgspec.structs.replace(chunk, dropped=dropped))

    # ── what follows from every event ───────────────────────────────────────────────────────────

    def settle(self) -> None:
        """End what is over."""
        state = self._state
        for phase in self._collecting.values():
            if not phase.ending and phase.until <= state.now:
                phase.ending, phase.until = True, state.now + LAST_S
                if all(one.ending for one in self._collecting.values()):
                    self._stop_recording()
        for conn, phase in self._collecting.items():
            if phase.ending and (not self._recording or phase.until <= state.now):
                state.send(conn, m.Acknowledged())
                phase.over = True  # it closes once it has read all that

    def _stop_recording(self) -> None:
        for id in list(self._recording):
            if id in self._state.conns:
                self._state.send(self._state.conns[id], m.RecordTrace(0.0, self.clock))
            else:
                self._recording.discard(id)

    def noted(self, actions: Actions) -> list[Action]:
        """What the coordinator notes for its log is in its own line of a trace: who came, left and died."""
        texts = [action.text for action in actions if isinstance(action, Note)]
        if not texts or not self._collecting:
            return []
        events = tuple(m.TraceEvent("coordinator", text, self.clock, -1) for text in texts)
        pid = self._state.identity.pid
        chunk = m.TraceChunk(0, "coordinator", 0, pid, "", 0, 0, events)
        for phase in self._collecting.values():
            phase.unread += 1
        return [Send(conn, chunk) for conn in self._collecting]

    def due(self) -> list[float]:
        """When `settle` has something to do."""
        return [phase.until for phase in self._collecting.values()]
