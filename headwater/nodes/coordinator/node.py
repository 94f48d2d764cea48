"""The coordinator node: takes members in, tells the servers the roster, notices deaths, collects statistics.

A member's connection is its membership: closed without Departed it is a death, and so is the end of its
lease. Every change of the roster is a new term. Every server knows a new member before the member itself is
welcomed, and the journal before them.

With a journal a file the node may die: the next one on it grants every member a full lease, in which the
member comes back.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable

from headwater import messages as m
from headwater.errors import (
    ConnectionLostError,
    HeadwaterError,
    JournalError,
    ProtocolError,
    RefusedError,
    named,
)
from headwater.nodes.coordinator.controls import Controls
from headwater.nodes.coordinator.journal import Journal
from headwater.nodes.coordinator.journaled import JournaledBook
from headwater.nodes.coordinator.leases import LeaseDesk
from headwater.nodes.coordinator.overview import overview
from headwater.nodes.coordinator.settings import ClusterSettings
from headwater.nodes.threads import ConnectionThreads
from headwater.roster import Departure
from headwater.splits import unvisited_parts
from headwater.wire.channel import Channel
from headwater.wire.listener import Listener

_log = logging.getLogger("headwater.coordinator")

_FIRST_S = 10.0
"""How long a stranger may take to say what it wants, in seconds."""

_AGAIN_S = 0.05


class CoordinatorNode:
    """The master node of one cluster.

    Args:
        on_departure: told of every server, standby and worker that ended without leaving; called from a
            thread of the coordinator, which it may not block for long.
        journal: a file in which the roster survives this process; "" keeps it in memory, and members take
            the end of this process for the end of the cluster.
        listen: makes what nodes join at; called once the journal is held. With a journal every start must
            make the same address.

    Attributes:
        address: where nodes join and `headwater status` asks.
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
        listen: Callable[[], Listener] = lambda: Listener("unix"),
    ) -> None:
        self.settings = settings
        self.progress: dict[int, m.Progress] = {}
        self._on_departure = on_departure
        self._journal = Journal(journal, settings.kept())
        self._book = JournaledBook(
            self._journal,
            self._fail,
            settings.workers,
            settings.servers,
            lease_s=settings.lease,
            generation=settings.generation,
            now=time.monotonic(),
        )
        self._leases = self._new_leases()
        self._changed = threading.Condition()
        self._members: dict[int, Channel] = {}
        self._ended: m.Refused | None = None
        self._closing = threading.Event()
        self._why = ""
        self._threads = ConnectionThreads("headwater-coordinator")
        self._controls = Controls(self._threads)
        try:
            listener = listen()
        except BaseException:
            self._journal.close()
            raise
        self.address = listener.address
        self._threads.listen(listener, self._serve)
        self._threads.start(self._watch_leases, "leases")
        if self._journal.found is not None:
            self._threads.start(self._resume, "resume")

    # ── its own life ────────────────────────────────────────────────────────────────────────────

    def _resume(self) -> None:
        """Go on where the journal ends: with the deaths since then that can be told at once, and by telling
        the servers what they may not have been told."""
        roster = self._view()
        _log.warning("the coordinator is back, with %d members in term %d", len(roster.members), roster.term)
        for member in self._controls.refusing(roster):
            self._strike_off(member, False, "nobody listens at its address any more")
        with self._changed:
            lost = self._book.view().members and not self._book.complete()
        if lost:  # the one before was killed between noting that death and its consequence
            self._lose("a server is gone, and nobody else has its shard")
        self._publish()

    def wait(self) -> None:
        """Block until this node has ended. Raises JournalError if that is why."""
        self._closing.wait()
        if self._why:
            raise JournalError(self._why)

    def close(self) -> None:
        """End the cluster: every connection and thread; idempotent. Members are told that it is closed."""
        try:
            self.end("ConnectionLostError", "the cluster is closed")
        finally:
            self.halt()

    def halt(self) -> None:
        """End this node alone, as a kill would: with a journal the next one on it goes on. Idempotent."""
        self._stop()
        self._threads.join()
        with self._changed:
            self._journal.close()

    def _stop(self) -> None:
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._threads.close_channels()

    def _fail(self, error: JournalError) -> None:
        """What cannot be kept may not be seen: members go on without a coordinator until the next one."""
        _log.error("the coordinator ends: %s", error)
        self._why = str(error)
        self._stop()

    def end(self, error: str, reason: str) -> None:
        """Refuse everybody from now on, with an error of this name: those who ask, and those who wait."""
        refusal = m.Refused(error, reason)
        with self._changed:
            if self._ended is not None or self._closing.is_set():
                return
            self._ended = refusal
            channels, self._members = list(self._members.values()), {}
            self._book.end(refusal)
            self._changed.notify_all()
        for channel in channels:
            _say_goodbye(channel, refusal)

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _serve(self, channel: Channel) -> None:
        received = channel.receive(timeout=_FIRST_S)
        first = received.message if received is not None else None
        if isinstance(first, m.Ask):
            channel.send(self.statistics())
        elif isinstance(first, m.Join | m.Rejoin):
            self._serve_member(channel, first)
        elif first is not None:
            raise ProtocolError(f"first message was {type(first).__name__}, expected Join, Rejoin or Ask")

    def _serve_member(self, channel: Channel, first: m.Join | m.Rejoin) -> None:
        new = isinstance(first, m.Join)
        try:
            if isinstance(first, m.Join):
                member = self._take_in(first, channel)
            else:
                member = self._take_back(first, channel)
        except HeadwaterError as error:
            if not self._closing.is_set():  # else it is this node that is gone
                channel.send(m.Refused(type(error).__name__, str(error)))
            return
        departed = False
        try:
            channel.send(self._welcome(member, self._position(member) if new else None))
            if new and member.role == "standby":
                self._publish()  # it takes part in rosters once it knows who it is
            while not departed and (received := channel.receive()) is not None:
                self._heard(member)
                departed = isinstance(received.message, m.Departed)
                if not departed and self._is_member(member):
                    self._take(member, channel, received.message)
        finally:
            self._strike_off(member, departed, "its connection to the coordinator ended", channel)

    def _take(self, member: m.Member, channel: Channel, message: m.AnyMessage) -> None:
        """Whatever a member says between Welcome and Departed."""
        if isinstance(message, m.Progress):
            self.progress[member.index] = message
        elif isinstance(message, m.Lease | m.Finish):
            self._leases.serve(member, channel, message)
        elif isinstance(message, m.Locate):
            channel.send(self._whereabouts())
        elif isinstance(message, m.CaughtUp):
            self._caught_up(message.standby)
        elif isinstance(message, m.Mislaid):
            self._dismiss(message.standby)
        elif not isinstance(message, m.Heartbeat):
            raise ProtocolError(f"a member sent {type(message).__name__}")

    def _take_in(self, join: m.Join, channel: Channel) -> m.Member:
        """Enter a node into the roster; blocks until all servers are there."""
        with self._changed:
            if join.role != "server":
                self._wait_for_servers()
            self._check_not_ended()
            # It sends heartbeats only once it is welcomed, so its lease begins then.
            member = self._book.join(join, math.inf)
            self._members[member.id] = channel
            self._changed.notify_all()
            if join.role == "server":
                self._wait_for_servers()
        if join.role in ("worker", "observer"):
            self._publish()
        return member

    def _take_back(self, rejoin: m.Rejoin, channel: Channel) -> m.Member:
        """A member connects again; of two connections of one the later one counts."""
        if not self._journal.is_key(rejoin.key, rejoin.member):
            raise RefusedError(
                f"what came back as member {rejoin.member} did not show its key: "
                f"it is of another cluster, or the journal was replaced; join again as a new one"
            )
        with self._changed:
            self._check_not_ended()
            member = self._book.take_back(rejoin.member, rejoin.generation, time.monotonic())
            former = self._members.get(member.id)
            self._members[member.id] = channel
        if former is not None:
            former.close()
        _log.info("%s is back", _named(member))
        return member

    def _wait_for_servers(self) -> None:
        self._changed.wait_for(lambda: self._book.complete() or self._ended or self._closing.is_set())
        self._check_not_ended()

    def _check_not_ended(self) -> None:
        if self._closing.is_set() and self._ended is None:
            raise ConnectionLostError("this coordinator is gone")
        if self._ended is not None:
            raise named(self._ended.error, self._ended.reason, default=RefusedError)

    def _position(self, member: m.Member) -> m.Position | None:
        """Where the log recorded a worker's rank."""
        last = self._surely_recorded(member).last if member.role == "worker" else ()
        return next((position for position in last if position.rank == member.index), None)

    def _ranks(self) -> set[int]:
        """Of the living workers."""
        with self._changed:
            return {member.index for member in self._book.of("worker")}

    def _recorded(self) -> m.Recorded | None:
        """Everybody's positions, as server 0 has recorded them; blocks for its answer, None without one."""
        with self._changed:
            servers = self._book.of("server")[:1]
        return next((answer.recorded for answer in self._controls.ask(servers)), None)

    def _surely_recorded(self, member: m.Member) -> m.Recorded:
        """As `_recorded`, until there is an answer, for a member whose own thread this is.

        Without one everything would count as not read yet, and be read twice.
        """
        while (recorded := self._recorded()) is None:
            self._heard(member)  # nobody reads meanwhile what it sends
            if self._closing.wait(_AGAIN_S) or not self._is_member(member):
                raise ConnectionLostError(f"{_named(member)} is no member any more, or this node is gone")
        return recorded

    def _new_leases(self) -> LeaseDesk:
        return LeaseDesk(
            self.settings.workers, self._surely_recorded, lambda: self._recorded() or m.Recorded()
        )

    def _welcome(self, member: m.Member, position: m.Position | None) -> m.Welcome:
        settings = self.settings
        with self._changed:
            self._book.heard(member.id, time.monotonic())
            return m.Welcome(
                member=member,
                term=self._book.term,
                servers=self._book.of("server"),
                workers=settings.workers,
                sync=settings.sync,
                settings=settings.settings,
                patience=settings.patience,
                deadline=settings.deadline,
                heartbeat=settings.lease / 3,
                generation=self._book.generation,
                position=position,
                key=self._journal.key_of(member.id),
                returns=bool(self._journal.path),
            )

    def _whereabouts(self) -> m.Whereabouts:
        with self._changed:
            return m.Whereabouts(self._book.term, self._book.of("server"))

    # ── the end of a membership ─────────────────────────────────────────────────────────────────

    def _heard(self, member: m.Member) -> None:
        with self._changed:
            self._book.heard(member.id, time.monotonic())

    def _is_member(self, member: m.Member) -> bool:
        with self._changed:
            return member.id in self._members

    def _watch_leases(self) -> None:
        """Declare dead who was not heard of for a lease, and tell servers again that were left behind."""
        while not self._closing.wait(self.settings.lease / 10):
            with self._changed:
                expired = self._book.expired(time.monotonic())
            for member in expired:
                self._strike_off(member, False, f"nothing was heard of it for {self.settings.lease:g} s")
            if self._controls.behind:
                self._publish()

    def _strike_off(self, member: m.Member, departed: bool, why: str, through: Channel | None = None) -> None:
        """It is no member any more. `through`: nor is this so where it has another connection than that."""
        verdict = f"{_named(member)} was declared dead: {why}"
        with self._changed:
            replaced = through is not None and self._members.get(member.id, through) is not through
            if replaced or self._closing.is_set():
                return
            channel = self._members.pop(member.id, None)
            departure = self._book.remove(member.id, "" if departed else verdict)
            ended = self._ended is not None
        if departure is None or ended:
            return
        if channel is not None and not departed:
            _say_goodbye(channel, m.Refused("RefusedError", verdict))
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
            self._tell_rest(member)

    def _tell_rest(self, member: m.Member) -> None:
        rest = unvisited_parts(self._recorded() or m.Recorded(), self._ranks())
        samples = sum(one.samples for one in rest if one.rank == member.index)
        if samples:
            _log.warning(
                "%d samples of worker %d's part wait for the next worker with that rank",
                samples,
                member.index,
            )

    def _lose(self, reason: str) -> None:
        """A shard is lost with all its copies."""
        if not self.settings.rewinds:
            self.end("ConnectionLostError", reason)
            return
        refusal = m.Refused("RewoundError", f"{reason}; training begins anew from the last checkpoint")
        with self._changed:
            self._book.begin_anew()
            channels, self._members = list(self._members.values()), {}
            self._leases = self._new_leases()
        _log.warning("%s", refusal.reason)
        for channel in channels:
            _say_goodbye(channel, refusal)
        self._controls.close()

    # ── standbys ────────────────────────────────────────────────────────────────────────────────

    def _caught_up(self, standby: int) -> None:
        with self._changed:
            known = self._book.caught_up(standby)
        if known:
            self._publish()

    def _dismiss(self, standby: int) -> None:
        """A server lost the connection to its standby, which therefore no longer has all it has."""
        with self._changed:
            member = self._book.member(standby)
        if member is not None and member.role == "standby":
            self._strike_off(member, False, "its server lost the connection to it")

    # ── servers ─────────────────────────────────────────────────────────────────────────────────

    def _publish(self) -> None:
        """Tell every server the roster; blocks until all that live have it."""
        self._controls.publish(self._view)

    def _view(self) -> m.Roster:
        with self._changed:
            return self._book.view()

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def statistics(self) -> m.ClusterStatistics:
        """The state of the cluster now; asks every server and blocks for their answers."""
        now = time.monotonic()
        with self._changed:
            roster = self._book.view()
            hosts = [*self._book.of("server"), *self._book.of("standby")] if self._book.complete() else []
            silence = {member.id: self._book.silence(member.id, now) for member in roster.members}
            unreplicated = self._book.unreplicated() if self.settings.replicas else []
            absent = {member.id for member in roster.members} - self._members.keys()
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
        )


def _named(member: m.Member) -> str:
    return f"{member.role} {member.index} (pid {member.pid})"


def _say_goodbye(channel: Channel, refusal: m.Refused) -> None:
    """Tell a member why, as the last thing it hears; it hangs up, or this might be lost."""
    try:
        channel.send(refusal, timeout=1.0)
        channel.finish()
    except HeadwaterError:
        channel.close()  # it is gone already, or takes nothing
