"""Questions of people: how the cluster is, once those that were asked have said how they are."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headwater import messages as m
from headwater.machines.actions import Conn
from headwater.machines.coordinator.hosts import Hosts
from headwater.machines.coordinator.members import Members
from headwater.machines.coordinator.newcomers import Newcomers
from headwater.machines.coordinator.overview import overview
from headwater.machines.coordinator.phases import Spare, Stranger, Survey
from headwater.machines.coordinator.state import State


class Surveys:
    """Of a cluster.

    Attributes:
        address: where its coordinator is reached.
        traffic: asks the coordinator's node what it has sent and received.
    """

    def __init__(self, state: State, hosts: Hosts, members: Members, newcomers: Newcomers) -> None:
        self.address = ""
        self.traffic: Callable[[], m.Traffic] = m.Traffic
        self._checkpoints = m.CheckpointCounts()
        self._written = 0.0
        self._began = state.now
        self._state = state
        self._hosts = hosts
        self._members = members
        self._newcomers = newcomers

    def on_ask(self, conn: Conn, phase: Stranger, ask: m.Ask) -> None:
        """Ask every server and standby, where the cluster has all servers."""
        state = self._state
        running = state.stage in ("running", "finishing") and state.book.complete()
        hosts = [*state.book.of("server"), *state.book.of("standby")] if running else []
        state.phases[conn] = Survey(len(hosts), {worker.index for worker in state.book.of("worker")})
        for host in hosts:
            self._hosts.ask(host, f"survey {conn}", state.now)

    def checkpointed(self, counts: m.CheckpointCounts) -> None:
        """A checkpoint was written, or could not be."""
        if counts.written != self._checkpoints.written:
            self._written = self._state.now
        self._checkpoints = counts

    def take(self, conn: Conn, answer: m.ServerStatistics | None) -> None:
        """One that was asked has answered, or has not in time."""
        survey = self._state.phases.get(conn)
        if isinstance(survey, Survey):
            survey.unanswered -= 1
            survey.reports += [answer] if answer is not None else []

    def answer(self) -> None:
        """Answer whoever asked, and need not wait any more."""
        for conn, phase in list(self._state.phases.items()):
            if isinstance(phase, Survey) and not phase.unanswered:
                self._state.send(conn, self._overview(phase))
                self._state.hang_up(conn)

    def _overview(self, survey: Survey) -> m.ClusterStatistics:
        state = self._state
        roster, settings, tally = state.book.view(), state.settings, self._members.tally
        return overview(
            roster=roster,
            pid=state.identity.pid,
            address=self.address,
            sync=settings.sync,
            reports=survey.reports,
            ranks=survey.ranks,
            progress=tally.last,
            silence={one.id: state.book.silence(one.id, state.now) for one in roster.members},
            absent={one.id for one in roster.members} - state.conns.keys(),
            unreplicated=state.book.unreplicated() if settings.replicas else [],
            unvisited=self._members.reading.unvisited(),
            spares=sum(isinstance(one, Spare) for one in state.phases.values()),
            servers=settings.servers,
            finished=state.book.finished(),
            joining=self._newcomers.waiting(),
            totals=tally.totals(),
            counts=tally.members(),
            checkpoints=self._checkpoints_now(),
            traffic=self.traffic(),
            uptime=state.now - self._began,
            followers=tally.followers_now(state.now),
        )

    def _checkpoints_now(self) -> m.CheckpointCounts:
        counts = self._checkpoints
        if not counts.written:
            return counts
        return msgspec.structs.replace(counts, age=self._state.now - self._written)
