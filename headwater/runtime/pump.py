"""Runs a machine: threads and channels around decisions, and nothing decided here.

A thread for every connection reads from it and hands what comes to the machine, under the machine's one
lock. What the machine asks for is queued before the lock is let go: a `Send` in the outbox of its
connection, a message to the other machine of the node in that one's inbox, and the rest in one queue, which
one thread at a time carries out. So actions take effect in the order in which they were decided. Nobody
blocks for a peer: whoever decided a `Send` sends what the kernel takes at once (see `Outbox`). A `Persist`
blocks for the disk, and with it everything that was decided afterwards.

What a machine does piece by piece (`Advancing`), and what the two machines of a node tell each other, is
done by whichever thread finds the machine free; who finds it busy leaves that to the thread that is inside,
which looks again when it has let go of the lock. So a message to the other machine never waits for what
that is doing. Invariant: whoever has held a machine's lock, for whatever reason and however briefly, calls
`_settle` afterwards; else what another thread left to it stays undone until something else happens.

The order of locks: a thread holds at most one machine's lock, and inside it at most an outbox's or the
clock's. No lock is held while anything is sent, dialled, written or told to the owner.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

from headwater.errors import EngineError, HeadwaterError, RefusedError
from headwater.loggers import logger
from headwater.machines.actions import (
    BESIDE,
    Action,
    Actions,
    Advancing,
    Close,
    Conn,
    Dial,
    HandOver,
    Machine,
    Note,
    Pause,
    Perform,
    Performing,
    Persist,
    Refusing,
    Resume,
    Send,
    Tell,
    Traceable,
)
from headwater.messages import AnyMessage, Member
from headwater.runtime.dialling import NOBODY
from headwater.runtime.outbox import RESUME, Join, Outbox
from headwater.runtime.threads import ConnectionThreads
from headwater.runtime.tracing import TraceRecorder
from headwater.wire.channel import Array, Channel, Received

_log = logger("headwater")

GOODBYE_S = 2.0
"""How long a peer may take to read the last that it is sent before its connection is cut, in seconds."""

Decide: TypeAlias = Callable[[float], Actions]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


class Owner(Protocol):
    """What a machine's node does for it; called in threads of the node, without the machine's lock."""

    def dial(self, member: Member | str) -> Channel:
        """Connect; blocks. Raises HeadwaterError, TimeoutError."""

    def persist(self, record: Any) -> None:
        """Make it safe; blocks. Raises HeadwaterError: the machine is stopped, and `failed` is called."""

    def tell(self, event: Any) -> None:
        """What the machine tells; must not block for long."""

    def perform(self, task: Any) -> Any:
        """Do what takes long; blocks. A HeadwaterError that it raises is the result."""

    def failed(self, error: HeadwaterError) -> None:
        """Nothing more is decided or carried out: a record could not be made safe, or `advance` failed."""


class Payloads(Protocol):
    """Memory for what comes with messages."""

    def place(self, conn: Conn, message: AnyMessage, length: int) -> Sequence[Array]:
        """As `Channel.receive` asks."""

    def take(self, conn: Conn, received: Received) -> Any:
        """What the machine is handed, once all of it is there; takes the descriptors that it keeps."""

    def forget(self, conn: Conn) -> None:
        """The connection has ended."""


class _Connection:
    """One connection of the machine.

    Attributes:
        paused: whether the machine takes no further message before it resumes.
        closing: whether the machine has ended it.
        handed: the tag with which it belongs to another machine's pump.
    """

    __slots__ = ("channel", "closing", "conn", "handed", "outbox", "paused")

    def __init__(self, conn: Conn, channel: Channel, join: Join | None) -> None:
        self.conn = conn
        self.channel = channel
        self.outbox = Outbox(channel, join)
        self.paused = self.closing = False
        self.handed: str | None = None


class Pump:
    """Drives `machine` with the connections of a node.

    Args:
        threads: of the node; with their end this ends.
        log: of the node.
        keep_alive: seconds after which a silent machine at the other end counts as gone; None: the default.
        other: drives the node's other machine, to which this one hands over connections.
        join: makes one message of two that wait to be sent.

    Attributes:
        trace: is told of every message and every piece of work while it is on.
    """

    def __init__(
        self,
        machine: Machine,
        owner: Owner,
        threads: ConnectionThreads,
        *,
        log: logging.Logger = _log,
        payloads: Payloads | None = None,
        keep_alive: float | None = None,
        other: Pump | None = None,
        join: Join | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._advancing = machine if isinstance(machine, Advancing) else None
        self._refusing = machine if isinstance(machine, Refusing) else None
        self._tracing = machine if isinstance(machine, Traceable) else None
        self._owner = owner
        self._threads = threads
        self._log = log
        self._payloads = payloads
        self._keep_alive = keep_alive
        self._other = other
        self._together: tuple[Pump, ...] = (self,) if other is None else (other, self)
        if other is not None and other._other is None:
            other._other, other._together = self, (self, other)
        self._join = join
        self._clock = clock
        self.trace = TraceRecorder(lambda told: None)
        self._lock = threading.Lock()
        self._clockwork = threading.Condition(threading.Lock())
        self._cuts: list[tuple[float, _Connection]] = []
        self._connections: dict[Conn, _Connection] = {}
        self._mailboxes: dict[Conn, queue.SimpleQueue[AnyMessage | None]] = {}
        self._last: Conn = 0
        self._inbox: deque[AnyMessage] = deque()
        self._queue: deque[tuple[Action, bool]] = deque()
        self._ordered = 0  # actions in the queue that are a `Persist`, or stand behind one
        self._carrying = threading.Lock()
        self._unprepared = threading.Event()
        self._stopped = False

    # ── for the owner ───────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Let time pass for the machine from now on."""
        self._threads.start(self._keep_time, "time")
        if self._advancing is not None:
            self._threads.start(partial(self._prepare, self._advancing), "memory")

    def do(self, decide: Decide) -> None:
        """Have the machine decide something, as `decide(now)` says; carries out what can be at once."""
        self._step(decide)

    def look(self, at: Callable[[], Any]) -> Any:
        """What `at` returns, while nothing is decided."""
        with self._lock:
            seen = at()
        self._settle(None)
        return seen

    def ask(self, message: AnyMessage, timeout: float) -> AnyMessage | None:
        """Speak to the machine as a peer would, over a connection of its own; blocks for the first answer.

        None where there is none in time, or this was stopped.
        """
        mailbox: queue.SimpleQueue[AnyMessage | None] = queue.SimpleQueue()
        with self._lock:
            conn = self._number()
            self._mailboxes[conn] = mailbox
            if self._stopped:
                return None
        try:
            self.do(lambda now: self._machine.opened(conn, None, now))
            self.do(lambda now: self._machine.received(conn, message, None, now))
            return mailbox.get(timeout=timeout)
        except queue.Empty:
            return None
        finally:
            with self._lock:
                del self._mailboxes[conn]
            self.do(lambda now: self._machine.closed(conn, now))

    def channel(self, conn: Conn) -> Channel | None:
        """Of a connection; None where it has ended."""
        connection = self._connections.get(conn)
        return None if connection is None else connection.channel

    def flush(self, seconds: float = GOODBYE_S) -> None:
        """Block until everything that was to be sent has left, for at most so long."""
        until = self._clock() + seconds
        for connection in self.look(lambda: list(self._connections.values())):
            connection.outbox.wait_until_empty(max(0.0, until - self._clock()))

    def stop(self) -> None:
        """Decide and carry out nothing more; idempotent. Connections are the node's to close."""
        with self._lock:
            self._stopped = True
            self._queue.clear()
            self._inbox.clear()
            for mailbox in self._mailboxes.values():
                mailbox.put(None)
            paused = [connection for connection in self._connections.values() if connection.paused]
        self._wake_clock()
        self._unprepared.set()
        for connection in paused:
            if connection.outbox.put(RESUME):
                connection.outbox.drain()

    def serve(self, channel: Channel, dialled: str | None = None) -> None:
        """Hand the machine what comes over `channel`, in this thread, until that ends; then close it.

        `dialled`: the tag with which it was asked for.

        Raises:
            HeadwaterError: the connection broke, or the peer broke the protocol.
        """
        if self._keep_alive is not None:
            channel.keep_alive(self._keep_alive)
        with self._lock:
            connection = _Connection(self._number(), channel, self._join)
            self._connections[connection.conn] = connection
        conn = connection.conn
        try:
            self._hand(connection, lambda now: self._machine.opened(conn, dialled, now))
            self._read(connection)
        except HeadwaterError as error:
            self._refuse(connection, error)
            raise
        finally:
            with self._lock:
                self._connections.pop(conn, None)
            if connection.handed is None:
                channel.close()
                self._step(lambda now: self._machine.closed(conn, now))
            if self._payloads is not None:
                self._payloads.forget(conn)
        if connection.handed is not None and self._other is not None:
            self._other.serve(channel, connection.handed)

    # ── a connection's thread ───────────────────────────────────────────────────────────────────

    def _number(self) -> Conn:
        self._last += 1
        return self._last

    def _read(self, connection: _Connection) -> None:
        conn, payloads = connection.conn, self._payloads
        place = None if payloads is None else lambda message, length: payloads.place(conn, message, length)
        while connection.handed is None:
            received = connection.channel.receive(place)
            if received is None:
                return
            try:
                if not connection.closing:
                    self._take(connection, received)
            finally:
                for descriptor in received.descriptors:
                    os.close(descriptor)
        connection.outbox.wait_until_empty(GOODBYE_S)

    def _take(self, connection: _Connection, received: Received) -> None:
        conn, machine, payloads = connection.conn, self._machine, self._payloads
        payload = None if payloads is None else payloads.take(conn, received)
        decide = partial(machine.received, conn, received.message, payload, request=received.request)
        trace = self.trace
        if not trace.on:
            self._hand(connection, decide)
            return
        began = trace.now()
        flows = self._tracing.exchanges_of(conn, received.message) if self._tracing is not None else ()
        self._hand(connection, decide)
        trace.slice(type(received.message).__name__, began, trace.now(), flows, "pass")

    def _hand(self, connection: _Connection, decide: Decide) -> None:
        """Have the machine decide; this thread sends what leaves over its own connection because of it, and,
        where that is paused, everything until it is not."""
        outbox = connection.outbox
        claimed = outbox.claim()
        try:
            self._step(decide, connection, claimed)
        finally:
            outbox.finish(claimed, connection.paused and not self._stopped)
            connection.paused = False

    def _refuse(self, connection: _Connection, error: HeadwaterError) -> None:
        """A peer that broke the protocol may be told so before its connection ends."""
        refusing = self._refusing
        if refusing is not None and not connection.closing and connection.handed is None:
            self._step(lambda now: refusing.failed(connection.conn, error, now))
            connection.outbox.wait_until_empty(GOODBYE_S)

    # ── the machine ─────────────────────────────────────────────────────────────────────────────

    def _step(self, decide: Decide, own: _Connection | None = None, claimed: bool = False) -> None:
        """Decide, queue what follows, and see that it is carried out. `own`: whose thread this is; `claimed`:
        it is the sender there."""
        sender = own if claimed else None
        senders: list[_Connection] = []
        try:
            with self._lock:
                if self._stopped:
                    return
                if own is None or not (own.closing or own.handed is not None):
                    senders = self._decide(decide)
        except HeadwaterError:
            self._settle(sender)
            raise
        if senders:
            self._send(senders)
        if self._queue:
            self._carry_out()
        self._settle(sender)

    def _decide(self, decide: Decide) -> list[_Connection]:
        """Queue what the machine decides; the caller holds the lock, and sends over what is returned."""
        machine, due = self._machine, self._machine.due
        senders: list[_Connection] = []
        for action in decide(self._clock()):
            kind = type(action)
            if kind is Send and not self._ordered:
                self._route_send(action, senders)  # type: ignore[arg-type]
                continue
            if kind is Pause:
                self._pause(action)  # type: ignore[arg-type]
                continue
            if kind is Close or kind is HandOver:
                self._mark(action)  # type: ignore[arg-type]
            if self._ordered or kind is Persist:
                self._ordered += 1
                self._queue.append((action, True))
            elif kind is Resume or kind is HandOver:
                self._route(action, senders)  # type: ignore[arg-type]
            else:
                self._queue.append((action, False))
        if machine.due != due:
            self._wake_clock()
        return senders

    def _pause(self, pause: Pause) -> None:
        """Counts from the moment at which it is decided; the caller holds the lock."""
        connection = self._connections.get(pause.conn)
        if connection is not None:
            connection.paused = True

    def _mark(self, action: Close | HandOver) -> None:
        """What of these counts from the moment at which they are decided; the caller holds the lock."""
        connection = self._connections.get(action.conn)
        if connection is None:
            return
        if isinstance(action, HandOver):
            connection.handed = action.tag
            return
        connection.closing = True
        self._wake_clock((self._clock() + GOODBYE_S, connection))

    def _route_send(self, send: Send, senders: list[_Connection]) -> None:
        """Put a message where it is sent, in order with others of its connection.

        The caller holds the lock. `senders` gets the connection where the caller is its sender from now on.
        """
        connection = self._connections.get(send.conn)
        if connection is not None:
            if connection.outbox.put(send):
                senders.append(connection)
        elif send.conn == BESIDE and self._other is not None:
            self._other._inbox.append(send.message)
        elif send.conn in self._mailboxes:
            self._mailboxes[send.conn].put(send.message)

    def _route(self, action: Close | Resume | HandOver, senders: list[_Connection]) -> None:
        """Put an action that is no message where it takes effect; as `_route_send`."""
        connection, kind = self._connections.get(action.conn), type(action)
        if connection is not None:
            if kind is Resume and not connection.paused:
                return
            if connection.outbox.put(action if kind is Close else RESUME):  # type: ignore[arg-type]
                senders.append(connection)
        elif kind is Close and action.conn in self._mailboxes:
            self._mailboxes[action.conn].put(None)
        if kind is HandOver:
            self._connections.pop(action.conn, None)  # what follows is not sent over it any more

    def _send(self, senders: list[_Connection]) -> None:
        """Send what the kernel takes at once; a thread that lives as long as it must sends the rest."""
        for connection in senders:
            if not connection.outbox.push():
                self._threads.start(connection.outbox.drain, "send")

    def _settle(self, sender: _Connection | None) -> None:
        """Do what waits for this node's machines, until nothing is left that no other thread does.

        `sender`: the connection of which this thread is the sender: an answer that is there leaves between
        two pieces of work.
        """
        advanced: Pump | None = None
        again = True
        while again:
            again = False
            for pump in self._together:
                advancing = pump._advancing
                while (pump._inbox or (advancing is not None and advancing.busy)) and pump._work():
                    again = True
                    if advancing is not None:
                        advanced = pump
                    if sender is not None:
                        sender.outbox.send_ready()
        if advanced is not None and advanced._advancing is not None and advanced._advancing.unprepared:
            advanced._unprepared.set()

    def _prepare(self, machine: Advancing) -> None:
        """Prepare what is to come, beside everything else: nobody waits for that."""
        while not self._stopped:
            self._unprepared.wait()
            self._unprepared.clear()
            while machine.unprepared and not self._stopped:
                machine.prepare()

    def _work(self) -> bool:
        """Do one piece of what waits, unless another thread is inside; whether to look again.

        Whoever was inside looks again, since others may have left something to it.
        """
        if not self._lock.acquire(False):
            return False  # the thread that is inside looks again once it is out
        failure: HeadwaterError | None = None
        senders: list[_Connection] = []
        try:
            if self._stopped:
                return False
            if not self._inbox and (self._advancing is None or not self._advancing.busy):
                return True  # another thread did it meanwhile
            senders = self._traced_piece() if self.trace.on else self._decide(self._next_piece)
        except HeadwaterError as error:
            failure = error
        except BaseException as error:
            failure = EngineError(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._lock.release()
            if failure is not None:
                self._fail(failure)
        if senders:
            self._send(senders)
        if self._queue:
            self._carry_out()
        return failure is None

    def _traced_piece(self) -> list[_Connection]:
        began = self.trace.now()
        name, flows = ("log", ()) if self._inbox or self._tracing is None else self._tracing.next_piece()
        senders = self._decide(self._next_piece)
        self.trace.slice(name, began, self.trace.now(), flows, "pass")
        return senders

    def _next_piece(self, now: float) -> Actions:
        inbox = self._inbox
        if not inbox:
            return self._advancing.advance(now) if self._advancing is not None else []
        actions = self._machine.received(BESIDE, inbox.popleft(), None, now)
        while inbox:
            actions += self._machine.received(BESIDE, inbox.popleft(), None, now)
        return actions

    def _fail(self, error: HeadwaterError) -> None:
        """The machine cannot go on."""
        self.stop()
        self._owner.failed(error)

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def _keep_time(self) -> None:
        """Call `tick` when it is due, and cut connections whose peer does not hear of their end.

        Not under the machine's lock: this thread would hold it at moments at which it has nothing to settle.
        """
        while True:
            with self._clockwork:
                if self._stopped:
                    return
                now, due = self._clock(), self._machine.due
                late = [connection for cut_at, connection in self._cuts if cut_at <= now]
                self._cuts = [cut for cut in self._cuts if cut[0] > now]
                first = min(
                    [cut_at for cut_at, _ in self._cuts] + ([] if due is None else [due]), default=None
                )
                if not late and (first is None or first > now):
                    self._clockwork.wait(None if first is None else min(first - now, threading.TIMEOUT_MAX))
                    continue
            for connection in late:
                connection.channel.close()
            if due is not None and due <= now:
                self._step(self._machine.tick)

    def _wake_clock(self, cut: tuple[float, _Connection] | None = None) -> None:
        """`due` has changed, or there is one more connection to cut, or this was stopped."""
        with self._clockwork:
            if cut is not None:
                self._cuts.append(cut)
            self._clockwork.notify_all()

    # ── what is queued ──────────────────────────────────────────────────────────────────────────

    def _carry_out(self) -> None:
        """Carry out what is queued, unless another thread does."""
        while self._queue and self._carrying.acquire(blocking=False):
            try:
                while self._queue:
                    try:
                        action, ordered = self._queue.popleft()
                    except IndexError:
                        break  # it was stopped in between
                    self._do_action(action)
                    if ordered:
                        with self._lock:
                            self._ordered -= 1
            finally:
                self._carrying.release()  # whoever found it taken left its actions to this thread

    def _do_action(self, action: Action) -> None:
        if isinstance(action, Send | Resume | HandOver):  # behind a `Persist`
            self._route_alone(action)
        elif isinstance(action, Close):
            self._close(action)
        elif isinstance(action, Persist):
            self._persist(action.record)
        elif isinstance(action, Tell):
            self._owner.tell(action.event)
        elif isinstance(action, Note):
            self._log.log(_LEVELS[action.level], "%s", action.text)
        elif isinstance(action, Dial):
            self._threads.start(lambda: self._dial(action), "dial")
        elif isinstance(action, Perform):
            self._threads.start(lambda: self._perform(action), "task")

    def _route_alone(self, action: Send | Close | Resume | HandOver) -> None:
        senders: list[_Connection] = []
        with self._lock:
            if isinstance(action, Send):
                self._route_send(action, senders)
            else:
                self._route(action, senders)
        self._send(senders)

    def _close(self, close: Close) -> None:
        if close.why:
            self._log.warning("%s closes a connection: %s", self._threads.name, close.why)
        connection = self._connections.get(close.conn)
        if connection is not None and close.at_once:
            connection.channel.close()
        self._route_alone(close)

    def _persist(self, record: Any) -> None:
        try:
            self._owner.persist(record)
        except HeadwaterError as error:
            self._fail(error)

    def _dial(self, dial: Dial) -> None:
        try:
            channel = self._owner.dial(dial.member)
        except (HeadwaterError, TimeoutError) as error:
            why, nobody = str(error), isinstance(error.__cause__, NOBODY)
            refused = isinstance(error, RefusedError)
            self.do(lambda now: self._machine.unreachable(dial.tag, why, now, nobody=nobody, refused=refused))
        else:
            self._threads.converse(channel, lambda one: self.serve(one, dial.tag))

    def _perform(self, perform: Perform) -> None:
        result: Any
        try:
            result = self._owner.perform(perform.task)
        except HeadwaterError as error:
            result = error
        self.do(lambda now: cast(Performing, self._machine).performed(perform.tag, result, now))
