"""The coordinator node: takes members in, tells the servers the roster, notices deaths, collects statistics.

A member's connection is its membership: closed without Departed it is a death, and a new term begins.
Every server knows a new member before the member itself is welcomed.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field

import msgspec

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, RefusedError
from headwater.nodes.leases import LeaseDesk
from headwater.nodes.threads import ConnectionThreads
from headwater.roster import RosterBook
from headwater.splits import unvisited_parts
from headwater.wire.channel import Channel
from headwater.wire.listener import Listener, dial

_log = logging.getLogger("headwater.coordinator")

_SERVER_S = 10.0
"""How long a server may take to acknowledge a roster or to answer a question, in seconds."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What every member is told. `settings`: the user's own, for `worker.settings`; times in seconds."""

    workers: int
    servers: int
    sync: str
    settings: dict[str, m.Scalar] = field(default_factory=dict)
    patience: float = 10.0
    deadline: float = 600.0


class CoordinatorNode:
    """The master node of one cluster.

    Attributes:
        address: where nodes join and `headwater status` asks.
        progress: the last statistics each rank sent, kept after it left.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.progress: dict[int, m.Progress] = {}
        self._book = RosterBook(settings.workers, settings.servers)
        self._leases = LeaseDesk(settings.workers, self._recorded)
        self._changed = threading.Condition()
        self._controls: dict[int, Channel] = {}
        self._controlling = threading.Lock()
        self._closed = False
        self._threads = ConnectionThreads("headwater-coordinator")
        listener = Listener("unix")
        self.address = listener.address
        self._threads.listen(listener, self._serve)

    def close(self) -> None:
        """End every connection and thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads.close_channels()
        self._threads.join()

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        received = channel.receive(timeout=_SERVER_S)
        first = received.message if received is not None else None
        if isinstance(first, m.Ask):
            channel.send(self.statistics())
        elif isinstance(first, m.Join):
            self._serve_member(channel, first)
        elif first is not None:
            raise ProtocolError(f"first message was {type(first).__name__}, expected Join or Ask")

    def _serve_member(self, channel: Channel, join: m.Join) -> None:
        try:
            member = self._take_in(join)
        except HeadwaterError as error:
            channel.send(m.Refused(type(error).__name__, str(error)))
            return
        departed = False
        try:
            channel.send(self._welcome(member, self._position(member)))
            while (received := channel.receive()) is not None:
                if isinstance(received.message, m.Progress):
                    self.progress[member.index] = received.message
                elif isinstance(received.message, m.Departed):
                    departed = True
                elif isinstance(received.message, m.Lease | m.Finish):
                    self._leases.serve(member, channel, received.message)
                else:
                    raise ProtocolError(f"a member sent {type(received.message).__name__}")
        finally:
            self._strike_off(member, departed)

    def _take_in(self, join: m.Join) -> m.Member:
        """Enter a node into the roster; blocks until all servers are there."""
        with self._changed:
            if join.role != "server":
                self._changed.wait_for(lambda: self._book.complete() or self._closed)
            if self._closed:
                raise RefusedError("the cluster is closing")
            member = self._book.join(join)
            self._changed.notify_all()
            if join.role == "server":
                self._changed.wait_for(lambda: self._book.complete() or self._closed)
        if join.role != "server":
            self._publish()
        return member

    def _position(self, member: m.Member) -> m.Position | None:
        """Where the log recorded a worker's rank."""
        last = self._recorded().last if member.role == "worker" else ()
        return next((position for position in last if position.rank == member.index), None)

    def _ranks(self) -> set[int]:
        """Of the living workers."""
        with self._changed:
            return {member.index for member in self._book.of("worker")}

    def _recorded(self) -> m.Recorded:
        """Everybody's positions, as server 0 has recorded them; blocks for its answer."""
        with self._changed:
            servers = self._book.of("server")[:1]
        with self._controlling:
            answers = [self._ask(server, m.Ask()) for server in servers]
        return next((a.recorded for a in answers if isinstance(a, m.ServerStatistics)), m.Recorded())

    def _welcome(self, member: m.Member, position: m.Position | None) -> m.Welcome:
        settings = self.settings
        with self._changed:
            return m.Welcome(
                member=member,
                term=self._book.term,
                servers=self._book.of("server"),
                workers=settings.workers,
                sync=settings.sync,
                settings=settings.settings,
                patience=settings.patience,
                deadline=settings.deadline,
                position=position,
            )

    def _strike_off(self, member: m.Member, departed: bool) -> None:
        with self._changed:
            gone = self._book.remove(member.id)
        if gone is None or self._closed:
            return
        if not departed and member.role != "observer":
            _log.warning("%s %d (pid %d) is gone without leaving", member.role, member.index, member.pid)
        if member.role != "server":
            self._publish()
        self._leases.gone(member.id)
        if member.role == "worker" and not departed:
            self._tell_rest(member)

    def _tell_rest(self, member: m.Member) -> None:
        rest = unvisited_parts(self._recorded(), self._ranks())
        samples = sum(one.samples for one in rest if one.rank == member.index)
        if samples:
            _log.warning(
                "%d samples of worker %d's part wait for the next worker with that rank",
                samples,
                member.index,
            )

    # ── servers ─────────────────────────────────────────────────────────────────────────────────

    def _publish(self) -> None:
        """Tell every server the roster; blocks until all have it. Rosters arrive in order of terms."""
        with self._controlling:
            with self._changed:
                roster, servers = self._book.view(), self._book.of("server")
            for server in servers:
                self._ask(server, roster)

    def _ask(self, server: m.Member, question: m.Roster | m.Ask) -> m.AnyMessage:
        """One request on the control connection to a server; under `_controlling`."""
        channel = self._controls.get(server.id)
        if channel is None:
            channel = self._threads.own(dial(server.addresses[0], timeout=_SERVER_S))
            channel.send(m.Hello(0, "coordinator", self._book.term))
            self._controls[server.id] = channel
        channel.send(question)
        received = channel.receive(timeout=_SERVER_S)
        if received is None:
            raise RefusedError(f"server {server.index} closed its connection")
        return received.message

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def statistics(self) -> m.ClusterStatistics:
        """The state of the cluster now; asks every server and blocks for their answers."""
        with self._changed:
            members, term = self._book.view().members, self._book.term
            servers = self._book.of("server") if self._book.complete() else ()
        with self._controlling:
            answers = [self._ask(server, m.Ask()) for server in servers]
        reports = {a.index: a for a in answers if isinstance(a, m.ServerStatistics)}
        version = max((report.version for report in reports.values()), default=0)
        return m.ClusterStatistics(
            term=term,
            version=version,
            workers=self.settings.workers,
            sync=self.settings.sync,
            nodes=(
                m.NodeStatistics("coordinator", os.getpid(), self.address, term, version, None, index=0),
                *(self._node(member, reports) for member in sorted(members, key=lambda x: (x.role, x.index))),
            ),
            models=reports[0].models if 0 in reports else (),
            tables=_in_all([report.tables for report in reports.values()]),
            progress=tuple(self.progress[rank] for rank in sorted(self.progress)),
            unvisited=(
                *self._leases.unvisited(),
                *(unvisited_parts(reports[0].recorded, self._ranks()) if 0 in reports else ()),
            ),
        )

    def _node(self, member: m.Member, reports: dict[int, m.ServerStatistics]) -> m.NodeStatistics:
        address = member.addresses[0] if member.addresses else member.host
        if member.role == "server" and member.index in reports:
            report = reports[member.index]
            return m.NodeStatistics(
                "server", member.pid, address, report.term, report.version, None, index=member.index
            )
        progress = self.progress.get(member.index)
        seen = progress.version if progress is not None and progress.member == member.id else 0
        waits = reports[0].waits.get(member.id) if 0 in reports else None
        return m.NodeStatistics(
            member.role, member.pid, address, self._book.term, seen, waits, rank=member.index
        )


def _in_all(parts: list[tuple[m.TableStatistics, ...]]) -> tuple[m.TableStatistics, ...]:
    """Each table over all servers; those that not every server told of yet are left out."""
    counted = ("rows", "resident", "refused", "expired", "pulled", "hits")
    return tuple(
        msgspec.structs.replace(
            tables[0], **{name: sum(getattr(table, name) for table in tables) for name in counted}
        )
        for tables in zip(*parts, strict=False)
    )
