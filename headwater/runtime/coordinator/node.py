"""The coordinator node: takes members in, tells the servers the roster, notices deaths, collects statistics.

A member's connection is its membership: closed without Departed it is a death, and so is the end of its
lease. Every change of the roster is a new term. Every server knows a new member before the member itself is
welcomed, and the journal before them.

With a journal a file the node may die: the next one on it grants every member a full lease, in which the
member comes back.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from headwater import messages as m
from headwater.errors import (
    HeadwaterError,
    JournalError,
    ProtocolError,
    RefusedError,
    UnreachableError,
    named,
)
from headwater.machines.roster import Departure
from headwater.runtime.coordinator.controls import Controls
from headwater.runtime.coordinator.enlisting import SlotRequests
from headwater.runtime.coordinator.journal import Journal
from headwater.runtime.coordinator.journaled import JournaledBook
from headwater.runtime.coordinator.leases import LeaseDesk
from headwater.runtime.coordinator.overview import overview
from headwater.runtime.coordinator.recorded import ProgressRecorder
from headwater.runtime.coordinator.registry import MemberRegistry
from headwater.runtime.coordinator.settings import ClusterSettings
from headwater.runtime.dialling import check_reachable
from headwater.runtime.threads import ConnectionThreads
from headwater.wire.channel import Channel
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logging.getLogger("headwater.coordinator")

_FIRST_S = 10.0
"""How long a stranger may take to say what it wants, in seconds."""

_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Serving:
    """What a coordinator needs whose servers come by themselves, and ask it what they are to be.

    `restore`: returns the path of the checkpoint with which a generation begins; called once in each, in a
    thread of its own, with whether training may have begun before, and the first generation. `over`: told of
    the end, with the error that everybody is refused with; None where every declared worker has finished.
    """

    restore: Callable[[bool, int], str]
    over: Callable[[HeadwaterError | None], None]


class CoordinatorNode:
    """The master node of one cluster.

    Args:
        on_departure: told of every server, standby and worker that ended without leaving; called from a
            thread of the coordinator, which it may not block for long.
        journal: a file in which the roster survives this process; "" keeps it in memory, and members take
            the end of this process for the end of the cluster.
        reach: where nodes join. With a journal it must lead to the same address at every start: a fixed
            port, or the path of a Unix socket.
        serving: for servers that enlist; without, they were started for it and know what they are.

    Attributes:
        addresses: where nodes join and `headwater status` asks, the nearest first; address: the last of
            them, which leads here from the farthest.
        progress: the last statistics each rank sent, kept after it left.

    Raises:
        ConfigurationError: the journal is in use or of another cluster, or the address cannot be had.
        JournalError: the journal is damaged, or cannot be read or written.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        on_departure: Callable[[Departure], None] = lambda departure: None,
        *,
        journal: str | os.PathLike[str] = "",
        reach: Endpoint = LOCAL,
        serving: Serving | None = None,
    ) -> None:
        self.settings = settings
        self.progress: dict[int, m.Progress] = {}
        self._on_departure = on_departure
        self._journal = Journal(journal, settings.kept())
        book = JournaledBook(
            self._journal,
            self._fail,
            settings.workers,
            settings.servers,
            lease_s=settings.lease,
            generation=settings.generation,
            now=time.monotonic(),
        )
        self._company = MemberRegistry(book)
        self._why = ""
        self._threads = ConnectionThreads("headwater-coordinator")
        self._security = reach.security
        self._controls = Controls(self._threads, reach.security)
        self._recording = ProgressRecorder(self._controls, lambda: self._company.of("server"), self._waits)
        self._leases = self._new_leases()
        self._serving = serving
        self._desk = SlotRequests(settings, self._company, self._beginning)
        try:
            self.addresses = self._threads.listen(reach, self._serve)
        except BaseException:
            self._journal.close()
            raise
        self.address = self.addresses[-1]
        self._threads.start(self._watch_leases, "leases")
        if self._journal.found is not None:
            self._threads.start(self._resume, "resume")

    # ── its own life ────────────────────────────────────────────────────────────────────────────

    def _resume(self) -> None:
        """Go on where the journal ends: with the deaths since then that can be told at once, and by telling
        the servers what they may not have been told."""
        roster = self._company.view()
        _log.warning("the coordinator is back, with %d members in term %d", len(roster.members), roster.term)
        for member in self._controls.refusing(roster):
            self._strike_off(member, False, "nobody listens at its address any more")
        if self._company.view().members and not self._company.complete():
            # the one before was killed between noting that death and its consequence
            self._lose("a server is gone, and nobody else has its shard")
        self._publish()
        self._tell_if_finished()

    def wait(self) -> None:
        """Block until this node has ended. Raises JournalError if that is why."""
        self._company.closing.wait()
        if self._why:
            raise JournalError(self._why)

    def finished(self) -> bool:
        """Whether every declared worker has done its work, and the cluster has not ended yet."""
        return self._company.finished()

    def wait_for_absent(self) -> None:
        """Block until every member has come back after this node was started on its journal, or is dead."""
        self._company.wait_for_absent(2 * self.settings.lease)

    def complete(self) -> bool:
        """Whether there is a server of every index now."""
        return self._company.complete()

    def has_met(self, process: tuple[int, str]) -> bool:
        """Whether a process (pid and host name) was ever a member: then its end is told as a departure."""
        return self._company.has_met(process)

    def close(self) -> None:
        """End the cluster: every connection and thread; idempotent. Members are told that it is closed."""
        try:
            self.end("ClusterEndedError", "the cluster is closed")
        finally:
            self.halt()

    def halt(self) -> None:
        """End this node alone, as a kill would: with a journal the next one on it goes on. Idempotent."""
        self._stop()
        self._threads.join()
        with self._company.changed:
            self._journal.close()

    def _stop(self) -> None:
        self._company.close()
        self._threads.close_channels()

    def _fail(self, error: JournalError) -> None:
        """What cannot be kept may not be seen: members go on without a coordinator until the next one."""
        _log.error("the coordinator ends: %s", error)
        self._why = str(error)
        self._stop()
        if self._serving is not None:
            self._serving.over(error)

    def end(self, error: str, reason: str) -> None:
        """Refuse everybody from now on, with an error of this name: those who ask, and those who wait."""
        refusal = m.Refused(error, reason)
        channels = self._company.end(refusal)
        if channels is None:
            return
        for channel in channels:
            _say_goodbye(channel, refusal)
        if self._serving is not None:
            self._serving.over(named(error, reason, default=RefusedError))

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        received = channel.receive(timeout=_FIRST_S)
        first = received.message if received is not None else None
        if isinstance(first, m.Ask):
            channel.send(self.statistics())
        elif isinstance(first, m.Join | m.Rejoin):
            self._serve_member(channel, first)
        elif isinstance(first, m.RequestSlot):
            self._serve_enlisted(channel, first)
        elif first is not None:
            raise ProtocolError(
                f"first message was {type(first).__name__}, expected Enlist, Join, Rejoin or Ask"
            )

    def _serve_enlisted(self, channel: Channel, enlist: m.RequestSlot) -> None:
        """A node asks which server or standby it is to be, and becomes it."""
        try:
            if self._serving is None:
                raise RefusedError("whoever started this cluster starts its servers too")
            with self._desk.promised(enlist, channel) as promise:
                join = self._desk.invite(promise, channel) if promise is not None else None
                if promise is not None and join is not None:
                    self._serve_member(channel, join, lambda: self._desk.release(promise))
        except HeadwaterError as error:
            if not self._company.closing.is_set():  # else it is this node that is gone
                channel.send(m.Refused(type(error).__name__, str(error)))

    def _beginning(self, begun: bool, first: int) -> str:
        """The checkpoint with which servers begin; without, the cluster ends."""
        assert self._serving is not None
        try:
            return self._serving.restore(begun, first)
        except HeadwaterError as error:
            self.end(type(error).__name__, str(error))
            raise

    def _serve_member(
        self, channel: Channel, first: m.Join | m.Rejoin, entered: Callable[[], None] = lambda: None
    ) -> None:
        """Have a member, until it is none any more. `entered` is called once the roster has it."""
        new = isinstance(first, m.Join)
        try:
            if isinstance(first, m.Join):
                member = self._take_in(first, channel, entered)
            else:
                member = self._take_back(first, channel)
        except HeadwaterError as error:
            if isinstance(error, UnreachableError):
                _log.warning("refused: %s", error)
            if not self._company.closing.is_set():  # else it is this node that is gone
                channel.send(m.Refused(type(error).__name__, str(error)))
            return
        departed = False
        channel.keep_alive(2 * self.settings.lease)  # until then its lease decides
        try:
            channel.send(self._welcome(member, self._recording.position(member) if new else None))
            if new and member.role == "standby":
                self._publish()  # it takes part in rosters once it knows who it is
            while not departed and (received := channel.receive()) is not None:
                self._company.heard(member)
                departed = isinstance(received.message, m.Departed)
                if member in self._company:
                    self._take(member, channel, received.message)
        finally:
            self._strike_off(member, departed, "its connection to the coordinator ended", channel)

    def _take(self, member: m.Member, channel: Channel, message: m.AnyMessage) -> None:
        """Whatever a member says after Welcome."""
        if isinstance(message, m.Progress):
            self.progress[member.index] = message
        elif isinstance(message, m.Lease | m.Finish):
            self._leases.serve(member, channel, message)
        elif isinstance(message, m.GetServers):
            channel.send(self._whereabouts())
        elif isinstance(message, m.CaughtUp):
            if self._company.caught_up(message.standby):
                self._publish()
        elif isinstance(message, m.StandbyLost):
            self._dismiss(message.standby)
        elif isinstance(message, m.Finished) or (isinstance(message, m.Departed) and message.finished):
            self._company.finish(member)
            self._tell_if_finished()
        elif not isinstance(message, m.Heartbeat | m.Departed):
            raise ProtocolError(f"a member sent {type(message).__name__}")

    def _take_in(self, join: m.Join, channel: Channel, entered: Callable[[], None]) -> m.Member:
        """Enter a node into the roster; blocks until all servers are there."""
        if join.role in ("server", "standby"):
            check_reachable(join, self._security)
        member = self._company.enter(join, channel, entered=entered)
        if join.role in ("worker", "observer"):
            self._publish()
        if join.role != "observer":
            _log.info("%s on %s has joined", _named(member), member.host)
        return member

    def _take_back(self, rejoin: m.Rejoin, channel: Channel) -> m.Member:
        if not self._journal.is_key(rejoin.key, rejoin.member):
            raise RefusedError(
                f"what came back as member {rejoin.member} did not show its key: "
                f"it is of another cluster, or the journal was replaced; join again as a new one"
            )
        member = self._company.take_back(rejoin, channel)
        _log.info("%s is back", _named(member))
        return member

    def _waits(self, member: m.Member) -> bool:
        """Pause in the thread of a member, which nobody reads from meanwhile; whether it is one still."""
        self._company.heard(member)
        return not self._company.closing.wait(_AGAIN_S) and member in self._company

    def _new_leases(self) -> LeaseDesk:
        recording = self._recording
        return LeaseDesk(self.settings.workers, recording.surely, lambda: recording.now() or m.DataProgress())

    def _welcome(self, member: m.Member, position: m.Position | None) -> m.Welcome:
        settings = self.settings
        self._company.heard(member)
        roster = self._company.view()
        return m.Welcome(
            member=member,
            term=roster.term,
            servers=servers_of(roster),
            workers=settings.workers,
            sync=settings.sync,
            settings=settings.settings,
            patience=settings.patience,
            deadline=settings.deadline,
            heartbeat=settings.lease / 3,
            generation=roster.generation,
            position=position,
            key=self._journal.key_of(member.id),
            returns=bool(self._journal.path),
        )

    def _whereabouts(self) -> m.ServerAddresses:
        roster = self._company.view()
        return m.ServerAddresses(roster.term, servers_of(roster))

    # ── the end of a membership ─────────────────────────────────────────────────────────────────

    def _watch_leases(self) -> None:
        """Declare dead who was not heard of for a lease, and tell servers again that were left behind."""
        while not self._company.closing.wait(self.settings.lease / 10):
            for member in self._company.expired():
                self._strike_off(member, False, f"nothing was heard of it for {self.settings.lease:g} s")
            if self._controls.behind:
                self._publish()

    def _strike_off(self, member: m.Member, departed: bool, why: str, through: Channel | None = None) -> None:
        """It is no member any more. `through`: nor is this so where it has another connection than that."""
        verdict = f"{_named(member)} was declared dead: {why}"
        removed = self._company.remove(member, "" if departed else verdict, through)
        if removed is None:
            return
        departure, channel = removed
        if channel is not None and not departed:
            _say_goodbye(channel, m.Refused("DeclaredDeadError", verdict))
        if not departed and member.role != "observer":
            heir = f"; its standby (pid {departure.heir.pid}) takes over" if departure.heir else ""
            _log.warning("%s is gone without leaving: %s%s", _named(member), why, heir)
        if departure.loses_shard:
            self._lose(f"{_named(member)} is gone, and nobody else has its shard: {why}")
        else:
            self._publish()
        if not departed and member.role != "observer":
            self._on_departure(departure)
        self._leases.gone(member.id)
        if member.role == "worker" and not departed:
            self._recording.tell_rest(member, {worker.index for worker in self._company.of("worker")})
        self._tell_if_finished()

    def _tell_if_finished(self) -> None:
        if self._serving is not None and self._company.finished():
            self._serving.over(None)

    def _lose(self, reason: str) -> None:
        """A shard is lost with all its copies."""
        if not self.settings.rewinds:
            self.end("ClusterEndedError", reason)
            return
        refusal = m.Refused("RewoundError", f"{reason}; training begins anew from the last checkpoint")
        with self._company.changed:
            channels = self._company.begin_anew()
            self._leases = self._new_leases()
        _log.warning("%s", refusal.reason)
        for channel in channels:
            _say_goodbye(channel, refusal)
        self._controls.close()

    def _dismiss(self, standby: int) -> None:
        """A server lost the connection to its standby, which therefore no longer has all it has."""
        member = next((one for one in self._company.of("standby") if one.id == standby), None)
        if member is not None:
            self._strike_off(member, False, "its server lost the connection to it")

    def _publish(self) -> None:
        """Tell every server the roster; blocks until all that live have it."""
        self._controls.publish(self._company.view)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    @property
    def generation(self) -> int:
        """Of the log."""
        return self._company.view().generation

    def statistics(self) -> m.ClusterStatistics:
        """The state of the cluster now; asks every server and blocks for their answers."""
        company = self._company
        with company.changed:
            roster, complete = company.view(), company.complete()
            silence, absent = company.silence(), company.absent()
            unreplicated = company.unreplicated() if self.settings.replicas else []
        hosts = [one for one in roster.members if one.role in ("server", "standby")] if complete else []
        return overview(
            roster=roster,
            address=self.address,
            sync=self.settings.sync,
            reports=self._controls.ask(hosts),
            progress=dict(self.progress),
            silence=silence,
            absent=absent,
            unreplicated=unreplicated,
            unvisited=self._leases.unvisited(),
            spares=self._desk.spares,
        )


def servers_of(roster: m.Roster) -> tuple[m.Member, ...]:
    """Its servers, by index."""
    servers = (member for member in roster.members if member.role == "server")
    return tuple(sorted(servers, key=lambda server: server.index))


def _named(member: m.Member) -> str:
    return f"{member.role} {member.index} (pid {member.pid})"


def _say_goodbye(channel: Channel, refusal: m.Refused) -> None:
    """Tell a member why, as the last thing it hears; it hangs up, or this might be lost."""
    try:
        channel.send(refusal, timeout=1.0)
        channel.finish()
    except HeadwaterError:
        channel.close()  # it is gone already, or takes nothing
