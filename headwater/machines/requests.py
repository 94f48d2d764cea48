"""One member's exchanges on a server, over one of its connections.

Theory of operation. A connection takes one request at a time:

    free ──request──▶ held ──entry of the log──▶ answered, and free again
    free ──declaration──▶ busy ──loops compiled──▶ held
    free ──Store, Compare──▶ busy ──done──▶ answered, and free again
    free ──Read──▶ answered, and free again

While it is held or busy the connection is paused: the member's next message waits in it, and nobody reads
or writes the member's memory but to answer it. What needs no entry of the log (`Describe`, new windows) is
done at once.

A `Read` is answered at once with what is applied here, unless this server cannot say that this is current
(`RequestServer.readable`), which it answers then. The member compares what all servers have answered, and
asks for an entry of the log where that is not one version (`headwater.machines.current_read`).

A new kind of exchange needs nothing here unless it comes with memory (`headwater.machines.member_memory`):
whatever is a `Request` is held, reported, and answered by the entry that names it. One that is not an
exchange of the log gets a method and a line in `_OUTSIDE`.

A snapshot that an answered `Checkpoint` or `Verify` asked for stays with the connection until the member says
what is to become of it, and is lost with the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, UsageError
from headwater.machines.actions import Actions, Close, Conn, Note, Pause, Perform, Resume, Send
from headwater.machines.member_memory import Brought, MemberMemory
from headwater.machines.memory import CheckpointPlace, Given, ServerMemory
from headwater.machines.standby_link import StandbyLink
from headwater.shard import Shard
from headwater.shard.copies import found
from headwater.shard.digest import digests
from headwater.shard.loops_ahead import compile_for
from headwater.shard.snapshot import ShardSnapshot

READING = (
    m.Attach,
    m.Pull,
    m.PullRows,
    m.CountRows,
    m.ReadState,
    m.Checkpoint,
    m.Verify,
    m.Publish,
    m.Taken,
    m.Stop,
    m.Leave,
)
"""What observers may ask for: to read, and for an end of everybody's batches."""


class RequestServer(Protocol):
    """What a member's exchanges need of their server."""

    index: int
    memory: ServerMemory

    @property
    def shard(self) -> Shard:
        """The shard that is asked."""

    @property
    def standby(self) -> StandbyLink | None:
        """The standby that follows it."""

    def readable(self, now: float) -> bool:
        """Whether what is applied here is all that any member has been told."""

    def report(self, held: m.Held) -> Actions:
        """Tell the sequencer that this is held."""

    def perform(self, task: Callable[[], Any], then: Callable[[Any], Actions], conn: Conn = 0) -> Perform:
        """Have `task` done without the lock; `then` says what follows from its result, or its HeadwaterError.

        What `then` raises is the fault of `conn`.
        """


class MemberRequests:
    """Of `member`, over `conn`, as its connection epoch number `connection_epoch`.

    Attributes:
        waiting: the number of the exchange that waits for an answer; 0 for none.
        since: when it began to wait, or it was last looked why.
        untold: the sequencer was asked why, and has not said so yet.
    """

    def __init__(self, server: RequestServer, conn: Conn, member: m.Member, connection_epoch: int) -> None:
        self.conn = conn
        self.member = member
        self.connection_epoch = connection_epoch
        self.waiting = 0
        self.since = 0.0
        self.untold = False
        self._server = server
        self._memory = MemberMemory(server.shard, member.id, server.memory, exact=member.role == "observer")
        self._message: m.AnyMessage | None = None
        self._request = 0
        self._snapshot: ShardSnapshot | None = None
        self._own: tuple[m.Digest, ...] | None = None
        self._comparing: ShardSnapshot | None = None
        self._compiling = ""

    def place(self, message: m.AnyMessage, length: int) -> list[Any]:
        """As `MemberMemory.place`."""
        return self._memory.place(message, length)

    def unpack(self, message: m.AnyMessage, given: Given) -> Brought:
        """As `MemberMemory.unpack`."""
        return self._memory.unpack(message, given)

    def received(self, message: m.AnyMessage, brought: Brought, now: float, request: int) -> Actions:
        """Serve one message.

        Raises:
            ProtocolError: the member broke the protocol.
            RefusedError: it was retired meanwhile, or this connection is an old one.
        """
        if self.waiting:
            raise ProtocolError(f"{type(message).__name__} came before exchange {self.waiting} was answered")
        kind = type(message)
        if kind in _READS and not message.ordered:  # type: ignore[union-attr]
            return self._read(message, brought, now, request)  # type: ignore[arg-type]
        if kind is m.Scratch:
            return []
        if isinstance(message, m.Renew):
            return self._renew(message, brought)
        self._message, self._request = message, request
        self.since, self.untold = now, False
        outside = _OUTSIDE.get(kind)
        if outside is not None:
            return outside(self, message)
        if not isinstance(message, m.Request):
            raise ProtocolError(f"a member sent {kind.__name__}")
        if self.member.role == "observer" and not isinstance(message, READING):
            raise ProtocolError(f"an observer sent {type(message).__name__}, which only workers may")
        if brought.failure is not None:
            return [self._refusal(message.number, brought.failure)]
        if isinstance(message, m.Register | m.RegisterTable):
            self.waiting, self._compiling = message.number, message.spec.name
            return self._busy(partial(compile_for, message), partial(self._compiled, message, brought))
        if isinstance(message, m.Checkpoint) and (lengths := self._server.shard.expect_snapshots()):
            return self._busy(partial(found, lengths), partial(self._provided, message, brought))
        return self._hold(message, brought)

    def _read(self, message: m.Read, brought: Brought, now: float, request: int) -> Actions:
        """Answer with what is applied here."""
        server, conn = self._server, self.conn
        if not server.readable(now):
            return [Send(conn, m.Answer(message.number, m.UNREAD), request=request)]
        answer = server.shard.read(self.member.id, message, brought.rows, self.connection_epoch)
        return [Send(conn, answer, self._memory.payload(answer), request)]

    # ── exchanges of the log ────────────────────────────────────────────────────────────────────

    def _hold(self, message: m.Request, brought: Brought) -> Actions:
        """Hold the request until an entry answers it."""
        shard, member = self._server.shard, self.member.id
        try:
            held = shard.hold(member, message, brought.staging, brought.rows, self.connection_epoch)
        except UsageError as error:
            return [self._refusal(message.number, error)]
        self.waiting = message.number
        return [Pause(self.conn), *self._server.report(held)]

    def _compiled(
        self, message: m.Register | m.RegisterTable, brought: Brought, result: HeadwaterError | None
    ) -> Actions:
        """The loops that a declared model or table needs are there, or cannot be made."""
        self.waiting, self._compiling = 0, ""
        if isinstance(result, UsageError):
            told = Note(f"{message.spec.name!r} is refused: {result}", "info")
            return [told, self._refusal(message.number, result), Resume(self.conn)]
        if result is not None:
            raise result
        actions = self._hold(message, brought)
        return actions if self.waiting else [*actions, Resume(self.conn)]

    def _refusal(self, number: int, error: UsageError) -> Send:
        failure = m.Refused(type(error).__name__, str(error))
        return self._send(m.Answer(number, self._server.shard.version, failure=failure))

    def answered(self, answer: m.Answer | None) -> Actions:
        """An entry answers the exchange; None where it retires the member instead."""
        if answer is None:
            return [Close(self.conn, f"member {self.member.id} was retired")]
        self.waiting = 0
        if isinstance(self._message, m.Checkpoint | m.Verify):
            self._snapshot = self._server.shard.take_snapshot(self.member.id)
        if isinstance(self._message, m.Publish):
            return [self._publication(answer), Resume(self.conn)]
        payload = self._memory.payload(answer)
        return [Send(self.conn, answer, payload, self._request), Resume(self.conn)]

    def _publication(self, answer: m.Answer) -> Send:
        """What was copied for the member; it stays until the member's Taken."""
        cut = self._server.shard.take_cut(self.member.id)
        if answer.failure is not None or cut is None:
            why = answer.failure or m.Refused("RefusedError", "nothing was copied here: ask again")
            return self._send(m.Publication(answer.number, answer.version, failure=why))
        return Send(self.conn, cut.message(answer.number), cut.arrays(), self._request)

    def tell(self, reason: str) -> Actions:
        """Say why there is no answer yet."""
        self.untold = False
        return [Send(self.conn, m.Waiting(self.waiting, reason))]

    def _renew(self, message: m.Renew, brought: Brought) -> Actions:
        if brought.staging is not None:
            shard, epoch = self._server.shard, self.connection_epoch
            shard.replace_staging(self.member.id, message.model, brought.staging, epoch)
        return []

    # ── what needs no entry ─────────────────────────────────────────────────────────────────────

    def _describe(self, message: m.Describe) -> Actions:
        return [self._send(self._server.shard.describe(message.number))]

    def _store(self, message: m.Store) -> Actions:
        """Write the snapshot that the member asked for."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None or snapshot.version != message.version:
            why = f"there is no snapshot of version {message.version} here: another server took it"
            return [self._send(m.Stored(message.number, None, failure=m.Refused("CheckpointError", why)))]
        place = CheckpointPlace(message.directory, message.generation, message.version)
        write = partial(self._server.memory.write_part, place, snapshot)
        return self._busy(write, partial(self._stored, message.number, snapshot))

    def _stored(self, number: int, snapshot: ShardSnapshot, part: m.PartRecord | HeadwaterError) -> Actions:
        self._server.shard.provide(array for model in snapshot.models for array in model.arrays())
        if isinstance(part, HeadwaterError):
            failure = m.Refused(type(part).__name__, str(part))
            return self._done(m.Stored(number, None, failure=failure))
        return self._done(m.Stored(number, part, snapshot.standings, snapshot.recorded))

    def _compare(self, message: m.Compare) -> Actions:
        """Say what this server and its standby were at the entry of the member's last Verify."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None:
            why = "the server that was asked to verify is lost: ask again"
            failure = m.Refused("RefusedError", why)
            return [self._send(m.Compared(message.number, -1, 0, 0, (), None, failure=failure))]
        return self._busy(partial(digests, snapshot), partial(self._summed, message.number, snapshot))

    def _summed(self, number: int, snapshot: ShardSnapshot, own: tuple[m.Digest, ...]) -> Actions:
        self._own, self._comparing, self.waiting = own, snapshot, number
        return self.compared()

    def compared(self) -> Actions:
        """What follows from the standby's digests, or from its loss: an answer, or nothing yet."""
        snapshot, own, standby = self._comparing, self._own, self._server.standby
        if snapshot is None or own is None:
            return []
        told, reason = None, ""
        if standby is None:
            reason = "it has no standby"
        elif standby.began >= snapshot.position or not standby.caught_up:
            reason = "its standby has not caught up yet"
        elif (told := standby.digests_at(snapshot.position)) is None:
            if not standby.over:
                return []
            reason = "its standby was lost meanwhile"
        place = snapshot.index, snapshot.version, snapshot.position
        number, self._comparing, self._own, self.waiting = self.waiting, None, None, 0
        return self._done(m.Compared(number, *place, own, told, reason=reason))

    @property
    def reason(self) -> str:
        """Why the member waits, where that is not the log's business; "" otherwise."""
        if self._compiling:
            return (
                f"server {self._server.index} compiles the loops of {self._compiling!r}, which takes seconds "
                f"where no process of its user has done so"
            )
        if self._comparing is None:
            return ""
        return f"server {self._server.index} waits for its standby to sum up what it holds"

    # ── small things ────────────────────────────────────────────────────────────────────────────

    def _provided(self, message: m.Checkpoint, brought: Brought, memory: Any) -> Actions:
        """There is memory for the snapshot now: ask for it."""
        if not isinstance(memory, HeadwaterError):
            self._server.shard.provide(memory)
        actions = self._hold(message, brought)
        return actions if self.waiting else [*actions, Resume(self.conn)]

    def _busy(self, task: Callable[[], Any], then: Callable[[Any], Actions]) -> Actions:
        return [Pause(self.conn), self._server.perform(task, then, self.conn)]

    def _done(self, message: m.AnyMessage) -> Actions:
        return [self._send(message), Resume(self.conn)]

    def _send(self, message: m.AnyMessage) -> Send:
        return Send(self.conn, message, request=self._request)


_READS = frozenset((m.Pull, m.PullRows, m.CountRows))

_OUTSIDE: dict[type, Callable[[MemberRequests, Any], Actions]] = {
    m.Describe: MemberRequests._describe,
    m.Store: MemberRequests._store,
    m.Compare: MemberRequests._compare,
}
"""Messages that are answered outside the log."""
