"""Nodes that are not members yet: what they may ask, and whom they wait for until they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, RefusedError, UnreachableError
from headwater.machines.actions import Conn, Perform
from headwater.machines.coordinator.hosts import Hosts
from headwater.machines.coordinator.members import Members
from headwater.machines.coordinator.phases import (
    Entered,
    Invited,
    Joining,
    Spare,
    Stranger,
    Wait,
    named,
    servers_missing,
    who,
)
from headwater.machines.coordinator.state import State
from headwater.machines.slots import why_none


@dataclass(frozen=True, slots=True)
class CheckAddresses:
    """A task: dial every address that a newcomer advertises to other machines."""

    join: m.Join


@dataclass(frozen=True, slots=True)
class ChooseCheckpoint:
    """A task: choose what the servers of a generation begin with; the result is a path, "" for nothing.

    `begun`: whether training may have begun before; `first`: the cluster's first generation.
    """

    begun: bool
    first: int


class Newcomers:
    """Of a cluster. `enlists`: whether servers come by themselves and ask what they are to be."""

    def __init__(self, state: State, hosts: Hosts, members: Members, enlists: bool) -> None:
        self._state = state
        self._hosts = hosts
        self._members = members
        self._enlists = enlists
        self._chosen: tuple[int, str] | None = None
        self._choosing = -1

    # ── what they ask ───────────────────────────────────────────────────────────────────────────

    def on_request_slot(self, conn: Conn, phase: Stranger, request: m.RequestSlot) -> None:
        """Which server or standby is missing?"""

        def check() -> None:
            if not self._enlists:
                raise RefusedError("whoever started this cluster starts its servers too")
            self._state.slots.check(request)

        if self._admits(conn, request.cluster, check):
            self._state.phases[conn] = Spare(request)
            self.invite()
            if isinstance(self._state.phases[conn], Spare):
                self._state.send(conn, m.NoSlot(why_none(request)))

    def on_join(self, conn: Conn, phase: Stranger | Invited, join: m.Join) -> None:
        """It wants to be a member. Whether others reach a server is found out before it is one."""
        slot = phase.slot if isinstance(phase, Invited) else None
        if slot is not None and (join.role, join.index) != (slot.role, slot.index):
            raise ProtocolError(f"Join as {join.role} {join.index} came after Assignment, expected {slot}")
        if not self._admits(conn, join.cluster, lambda: None):
            return
        now = self._state.now
        listens = join.role in ("server", "standby")
        wait = Wait(now, now + self._state.settings.patience)
        self._state.phases[conn] = Joining(join, wait, slot, reached=not listens)
        if listens:
            self._state.emit(Perform(CheckAddresses(join), f"reach {conn}"))

    def on_rejoin(self, conn: Conn, phase: Stranger, rejoin: m.Rejoin) -> None:
        """A member connects again; of two connections of one the later one counts, the other is closed."""
        state = self._state

        def check() -> None:
            if not state.identity.is_key(rejoin.key, rejoin.member):
                raise RefusedError(
                    f"what came back as member {rejoin.member} did not show its key: "
                    f"it is of another cluster, or the journal was replaced; join again as a new one"
                )
            state.book.take_back(rejoin.member, rejoin.generation, state.now)

        if not self._admits(conn, rejoin.cluster, check):
            return
        member = state.book.member(rejoin.member)
        assert member is not None
        former = state.conns.pop(member.id, None)
        if former is not None:
            state.hang_up(former)
        self._members.welcome(conn, member)
        state.note(f"{named(member)} is back")

    def _admits(self, conn: Conn, cluster: str, check: Callable[[], None]) -> bool:
        """Whether whoever comes may; else it is told why not, or that nothing is left to do."""
        state = self._state
        try:
            state.identity.check(cluster)
            if state.stage == "ended":
                state.say_last(conn)
                return False
            check()
        except HeadwaterError as error:
            state.refuse(conn, error)
            return False
        return True

    def reached(self, conn: Conn, result: Any) -> None:
        """The addresses of a newcomer were dialled."""
        phase = self._state.phases.get(conn)
        if not isinstance(phase, Joining):
            return
        if isinstance(result, HeadwaterError):
            if isinstance(result, UnreachableError):
                self._state.warn(f"refused: {result}")
            self._state.refuse(conn, result)
        else:
            phase.reached = True

    # ── slots ───────────────────────────────────────────────────────────────────────────────────

    def invite(self) -> None:
        """Give free slots to spares, in the order in which they came, and tell them what they are to be."""
        state = self._state
        if state.stage not in ("forming", "running"):
            return
        forming = state.stage == "forming"
        for conn, phase in list(state.phases.items()):
            if isinstance(phase, Spare):
                slot = state.slots.reserve(phase.request, state.book.view().members, forming=forming)
                if slot is not None:
                    phase = state.phases[conn] = Invited(slot)
            if isinstance(phase, Invited) and phase.until is None:
                self._assign(conn, phase)

    def _assign(self, conn: Conn, invited: Invited) -> None:
        """Say what an invited node is to be, once it is known what servers begin with."""
        settings, slot = self._state.settings, invited.slot
        restore = ""
        if slot.role == "server":
            generation = self._state.book.generation
            if self._chosen is None or self._chosen[0] != generation:
                self._choose(generation)
                return
            restore = self._chosen[1]
        invited.until = self._state.now + settings.deadline
        cluster = self._state.identity.cluster
        self._state.send(conn, settings.assignment(slot.role, slot.index, restore, cluster))

    def _choose(self, generation: int) -> None:
        """Have the checkpoint chosen with which this generation begins, once."""
        if self._choosing != generation:
            self._choosing = generation
            task = ChooseCheckpoint(self._state.begun, self._state.book.first)
            self._state.emit(Perform(task, f"checkpoint {generation}"))

    def chosen(self, generation: int, result: Any) -> None:
        """What servers of a generation begin with is known; without, the cluster ends."""
        if generation != self._state.book.generation:
            return
        if isinstance(result, HeadwaterError):
            self._members.end(m.Refused(type(result).__name__, str(result)))
        else:
            self._chosen = generation, result

    # ── from joining to being there ─────────────────────────────────────────────────────────────

    def take_in(self) -> None:
        """Put those into the roster whose turn has come; welcome those that nobody has to be waited for."""
        state = self._state
        for conn, phase in list(state.phases.items()):
            if isinstance(phase, Joining) and phase.reached and (phase.join.role == "server" or self._open()):
                self._enter(conn, phase)
        if state.stage == "forming" and state.book.complete():
            self._form()
            self.take_in()  # those who waited for the servers
            return
        for conn, phase in list(state.phases.items()):
            if isinstance(phase, Entered):
                phase.known = phase.known or not self._hosts.waited_for(phase.term)
                if not self.reason(phase):
                    self._members.welcome(conn, phase.member, phase.position)

    def _open(self) -> bool:
        """Whether workers, observers and standbys are taken in."""
        return self._state.stage in ("running", "finishing")

    def _enter(self, conn: Conn, joining: Joining) -> None:
        """A newcomer is in the roster. Its lease begins with the welcome: until then it sends no
        heartbeats."""
        state = self._state
        self._let_go_of_former(joining.join)
        try:
            member = state.book.join(joining.join, math.inf)
        except RefusedError as error:
            state.refuse(conn, error)
            return
        if joining.slot is not None:
            state.slots.release(joining.slot)
        worker = member.role == "worker"
        state.met.add((member.pid, member.host))
        state.conns[member.id] = conn
        state.phases[conn] = Entered(member, joining.wait, state.book.term, placed=not worker)
        if member.role != "observer":
            self._members.tally.joined[member.role] += 1
            state.note(f"{named(member)} on {member.host} has joined")
        if worker:
            self._members.reading.newcomer(member)
            self._members.tally.frontier.joined(member.index)
        if member.role == "standby":  # it takes part in rosters once it knows who it is
            self._members.welcome(conn, member)
        if member.role != "server":
            self._members.publish()

    def _let_go_of_former(self, join: m.Join) -> None:
        """A node that was taken in when the coordinator before died, and never heard of it, comes again."""
        for member in self._state.away():
            same = (member.role, member.pid, member.host) == (join.role, join.pid, join.host)
            if same and member.role != "server":
                self._members.strike_off(member, "its process has joined again")

    def _form(self) -> None:
        """The last server has joined: all are welcomed together."""
        state = self._state
        state.stage, state.begun = "running", True
        for conn, phase in list(state.phases.items()):
            if isinstance(phase, Entered):
                self._members.welcome(conn, phase.member)
        self._members.publish()

    # ── waits ───────────────────────────────────────────────────────────────────────────────────

    def waiting(self) -> list[str]:
        """Who waits to join, and for whom; for status."""
        phases = self._state.phases.values()
        return [f"{who(one)} {self.reason(one)}" for one in phases if isinstance(one, Joining | Entered)]

    def reason(self, phase: Joining | Entered) -> str:
        """Whom a newcomer waits for; "" for nobody."""
        state = self._state
        if isinstance(phase, Joining) and not phase.reached:
            return "waits until it is known whether others reach it"
        if state.stage == "forming":
            return servers_missing(state.book.missing(), state.settings.servers)
        if isinstance(phase, Joining):
            return ""
        if not phase.known:
            late = " and ".join(map(named, self._hosts.waited_for(phase.term)))
            return f"waits until it is known to {late}"
        return "" if phase.placed else f"waits until server 0 says where rank {phase.member.index} is"

    def tell_waits(self) -> None:
        """Tell who waits for long whom it waits for, and log it each time it has for `patience`."""
        state, patience = self._state, self._state.settings.patience
        reported: dict[str, list[str]] = {}
        for conn, phase in state.phases.items():
            if not isinstance(phase, Joining | Entered):
                continue
            reason, wait = self.reason(phase), phase.wait
            if state.now >= wait.report:
                wait.report = state.now + patience
                reported.setdefault(reason, []).append(who(phase))
            elif state.stage != "forming" or (isinstance(phase, Joining) and not phase.reached):
                continue  # a matter of moments
            if reason != wait.reason:
                wait.reason = reason
                state.send(conn, m.JoinWaits(reason, patience, state.settings.deadline))
        for reason, waiting in reported.items():
            more = f" and {len(waiting) - 8} others" if len(waiting) > 8 else ""
            state.warn(f"{', '.join(waiting[:8])}{more} cannot join yet: {reason}")

    def tick(self) -> None:
        """End what has waited for too long."""
        state = self._state
        for conn, phase in list(state.phases.items()):
            if isinstance(phase, Stranger | Invited):
                if phase.until is not None and phase.until <= state.now:
                    what = "what it wants" if isinstance(phase, Stranger) else f"to become {phase.slot}"
                    state.note(f"a node that has not said {what} in time is hung up on")
                    state.hang_up(conn)
            elif (
                isinstance(phase, Joining | Entered)
                and state.now >= phase.wait.since + state.settings.deadline
            ):
                self._stalled(conn, phase)

    def _stalled(self, conn: Conn, phase: Joining | Entered) -> None:
        """A join has waited for as long as anything may."""
        state, reason = self._state, self.reason(phase)
        seconds = f"{state.settings.deadline:g} s"
        state.warn(f"{who(phase)} has not joined within {seconds}: {reason}")
        state.send(conn, m.Refused("StalledError", f"could not join within {seconds}: {reason}"))
        state.hang_up(conn)
        if isinstance(phase, Entered):
            self._members.strike_off(phase.member, f"it could not join within {seconds}: {reason}")

    def due(self) -> list[float]:
        """When `tick` or `tell_waits` has something to do."""
        phases = self._state.phases.values()
        silent = [one.until for one in phases if isinstance(one, Stranger | Invited)]
        return [*(until for until in silent if until is not None), *self.waits_due()]

    def waits_due(self) -> list[float]:
        """When something is to be done about those that wait to join."""
        phases, deadline = self._state.phases.values(), self._state.settings.deadline
        waits = [one.wait for one in phases if isinstance(one, Joining | Entered)]
        return [moment for wait in waits for moment in (wait.report, wait.since + deadline)]
