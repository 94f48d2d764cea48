"""Runs a machine: threads and channels around decisions, and nothing decided here.

A thread for every connection reads from it and hands what comes to the machine, under the machine's one
lock. What the machine asks for is queued before the lock is let go, so actions are carried out in the order
in which they were decided, by one thread at a time: whichever finds that nobody does. That never blocks for a
peer: a `Send` goes into the outbox of its connection, which the connection's own thread empties where its own
message led to it, and else a thread that lives as long as the outbox has something. A `Persist` blocks for
the disk, and with it everything that was decided afterwards.

The order of locks: the machine's, then an outbox's. No lock is held while anything is sent, dialled, written
or told to the owner.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from headwater.errors import HeadwaterError, RefusedError
from headwater.machines.actions import (
    Action,
    Actions,
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
    Resume,
    Send,
    Tell,
)
from headwater.messages import AnyMessage, Member
from headwater.runtime.dialling import NOBODY
from headwater.runtime.outbox import Outbox
from headwater.runtime.threads import ConnectionThreads
from headwater.wire.channel import Array, Channel, Received

_log = logging.getLogger("headwater")

GOODBYE_S = 2.0
"""How long a peer may take to read the last that it is sent before its connection is cut, in seconds."""

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
        """Nothing more is decided or carried out, since a record could not be made safe."""


class Payloads(Protocol):
    """Memory for what comes with messages."""

    def place(self, conn: Conn, message: AnyMessage, length: int) -> Sequence[Array]:
        """As `Channel.receive` asks."""

    def take(self, conn: Conn, received: Received) -> Any:
        """What the machine is handed, once all of it is there."""

    def forget(self, conn: Conn) -> None:
        """The connection has ended."""


class _Connection:
    """One connection of the machine.

    Attributes:
        goes_on: whether messages are taken from it now.
        closing: whether the machine has ended it; cut_at: when it is cut, should the peer not end it too.
        handed: the tag with which it belongs to another machine's pump.
    """

    def __init__(self, conn: Conn, channel: Channel) -> None:
        self.conn = conn
        self.channel = channel
        self.outbox = Outbox(channel)
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.closing = False
        self.cut_at: float | None = None
        self.handed: str | None = None


class Pump:
    """Drives `machine` with the connections of a node.

    Args:
        threads: of the node; with their end this ends.
        log: of the node.
        keep_alive: seconds after which a silent machine at the other end counts as gone; None: the default.
        other: gets connections that the machine hands over.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._owner = owner
        self._threads = threads
        self._log = log
        self._payloads = payloads
        self._keep_alive = keep_alive
        self._other = other
        self._clock = clock
        self._changed = threading.Condition(threading.Lock())  # its lock is the machine's
        self._connections: dict[Conn, _Connection] = {}
        self._mailboxes: dict[Conn, queue.SimpleQueue[AnyMessage | None]] = {}
        self._last: Conn = 0
        self._queue: deque[Action] = deque()
        self._carrying = threading.Lock()
        self._stopped = False

    # ── for the owner ───────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Let time pass for the machine from now on."""
        self._threads.start(self._keep_time, "time")

    def do(self, decide: Callable[[float], Actions]) -> None:
        """Have the machine decide something, as `decide(now)` says; carries out what can be at once."""
        self._step(decide, None)

    def look(self, at: Callable[[], Any]) -> Any:
        """What `at` returns, while nothing is decided."""
        with self._changed:
            return at()

    def ask(self, message: AnyMessage, timeout: float) -> AnyMessage | None:
        """Speak to the machine as a peer would, over a connection of its own; blocks for the first answer.

        None where there is none in time, or this was stopped.
        """
        mailbox: queue.SimpleQueue[AnyMessage | None] = queue.SimpleQueue()
        with self._changed:
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
            with self._changed:
                del self._mailboxes[conn]
            self.do(lambda now: self._machine.closed(conn, now))

    def flush(self, seconds: float = GOODBYE_S) -> None:
        """Block until everything that was to be sent has left, for at most so long."""
        until = self._clock() + seconds
        with self._changed:
            connections = list(self._connections.values())
        for connection in connections:
            connection.outbox.wait_until_empty(max(0.0, until - self._clock()))

    def stop(self) -> None:
        """Decide and carry out nothing more; idempotent. Connections are the node's to close."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            for mailbox in self._mailboxes.values():
                mailbox.put(None)
            for connection in self._connections.values():
                connection.goes_on.set()
            self._changed.notify_all()

    def serve(self, channel: Channel, dialled: str | None = None) -> None:
        """Hand the machine what comes over `channel`, in this thread, until that ends; then close it.

        `dialled`: the tag with which it was asked for.

        Raises:
            HeadwaterError: the connection broke, or the peer broke the protocol.
        """
        if self._keep_alive is not None:
            channel.keep_alive(self._keep_alive)
        with self._changed:
            connection = _Connection(self._number(), channel)
            self._connections[connection.conn] = connection
        conn = connection.conn
        try:
            self._step(lambda now: self._machine.opened(conn, dialled, now), connection)
            self._read(connection)
        finally:
            with self._changed:
                self._connections.pop(conn, None)
            if connection.handed is None:
                channel.close()
                self._step(lambda now: self._machine.closed(conn, now), None)
            if self._payloads is not None:
                self._payloads.forget(conn)
        if connection.handed is not None and self._other is not None:
            self._other.serve(channel, connection.handed)

    # ── the machine ─────────────────────────────────────────────────────────────────────────────

    def _number(self) -> Conn:
        self._last += 1
        return self._last

    def _read(self, connection: _Connection) -> None:
        conn, payloads = connection.conn, self._payloads
        place = None if payloads is None else lambda message, length: payloads.place(conn, message, length)
        while connection.goes_on.wait() and connection.handed is None:
            received = connection.channel.receive(place)
            if received is None:
                return
            self._hand(connection, received, None if payloads is None else payloads.take(conn, received))
        connection.outbox.wait_until_empty(GOODBYE_S)

    def _hand(self, own: _Connection, received: Received, payload: Any) -> None:
        self._step(
            lambda now: self._machine.received(
                own.conn, received.message, payload, now, request=received.request
            ),
            own,
        )

    def _step(self, decide: Callable[[float], Actions], own: _Connection | None) -> None:
        """Decide, queue what follows, and see that it is carried out. `own`: whose thread this is."""
        with self._changed:
            if self._stopped or (own is not None and (own.closing or own.handed is not None)):
                return
            due = self._machine.due
            for action in decide(self._clock()):
                self._queue.append(action)
                self._mark(action)
            if self._machine.due != due:
                self._changed.notify_all()
        self._carry_out(own)

    def _mark(self, action: Action) -> None:
        """What counts from the moment at which it is decided; the caller holds the lock."""
        if isinstance(action, Close | HandOver | Pause | Resume):
            connection = self._connections.get(action.conn)
            if connection is None:
                return
            if isinstance(action, Close):
                connection.closing = True
                connection.cut_at = self._clock() + GOODBYE_S
                self._changed.notify_all()
            elif isinstance(action, HandOver):
                connection.handed = action.tag
                connection.goes_on.set()
            elif isinstance(action, Pause):
                connection.goes_on.clear()
            else:
                connection.goes_on.set()

    def _keep_time(self) -> None:
        """Call `tick` when it is due, and cut connections whose peer does not hear of their end."""
        while True:
            with self._changed:
                if self._stopped:
                    return
                now, due = self._clock(), self._machine.due
                late = self._late(now)
                cuts = [one.cut_at for one in self._connections.values() if one.cut_at is not None]
                first = min(cuts if due is None else [*cuts, due], default=None)
                if not late and (first is None or first > now):
                    self._changed.wait(None if first is None else min(first - now, threading.TIMEOUT_MAX))
                    continue
            for connection in late:
                connection.channel.close()
            if due is not None and due <= now:
                self._step(self._machine.tick, None)

    def _late(self, now: float) -> list[_Connection]:
        """Those that are to be cut now, each once; the caller holds the lock."""
        late = [one for one in self._connections.values() if one.cut_at is not None and one.cut_at <= now]
        for connection in late:
            connection.cut_at = None
        return late

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, own: _Connection | None) -> None:
        """Carry out what is queued, unless another thread does."""
        mine = False
        while self._queue:
            if not self._carrying.acquire(blocking=False):
                break  # whoever has it looks again after it has let go
            try:
                while self._queue:
                    try:
                        action = self._queue.popleft()
                    except IndexError:
                        break  # it was stopped in between
                    mine = self._do_action(action, own) or mine
            finally:
                self._carrying.release()
        if mine and own is not None:
            own.outbox.drain()

    def _do_action(self, action: Action, own: _Connection | None) -> bool:
        """Carry out one action; whether the thread's own connection has something to send now."""
        if isinstance(action, Send):
            return self._put(action, own)
        if isinstance(action, Close):
            if action.why:
                self._log.warning("%s closes a connection: %s", self._threads.name, action.why)
            return self._put(action, own)
        if isinstance(action, Persist):
            self._persist(action.record)
        elif isinstance(action, Tell):
            self._owner.tell(action.event)
        elif isinstance(action, Note):
            self._log.log(_LEVELS[action.level], "%s", action.text)
        elif isinstance(action, Dial):
            self._threads.start(lambda: self._dial(action), "dial")
        elif isinstance(action, HandOver):
            with self._changed:  # what follows is not sent over it any more
                self._connections.pop(action.conn, None)
        elif isinstance(action, Perform):
            self._threads.start(lambda: self._perform(action), "task")
        return False

    def _put(self, last: Send | Close, own: _Connection | None) -> bool:
        connection, mailbox = self._connections.get(last.conn), self._mailboxes.get(last.conn)
        if mailbox is not None:
            mailbox.put(last.message if isinstance(last, Send) else None)
        if connection is None or not connection.outbox.put(last):
            return False
        if connection is own:
            return True
        self._threads.start(connection.outbox.drain, "send")
        return False

    def _persist(self, record: Any) -> None:
        try:
            self._owner.persist(record)
        except HeadwaterError as error:
            self.stop()
            self._owner.failed(error)

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
