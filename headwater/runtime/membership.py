"""Runs a node's membership: one thread that reads what the coordinator says, and lets time pass.

The thread carries out what the machine decides about the coordinator. Everything else that the machine asks
for, and every event, goes to whoever uses this: `elsewhere` is called with it, in the order in which it was
decided, by whichever thread had the machine decide it, without the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.loggers import logger
from headwater.machines.actions import Action, Actions, Close, Conn, Dial, Note, Send, Tell
from headwater.machines.membership import COORDINATOR, Membership, TraceAsked
from headwater.runtime.dialling import NOBODY
from headwater.runtime.tracing import TraceRecorder
from headwater.wire.channel import Channel
from headwater.wire.listener import dial
from headwater.wire.liveness import PeerLiveness
from headwater.wire.security import Security

_log = logger("headwater")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_DIAL_S, _CALL_S = 10.0, 2.0
"""How long connecting to the coordinator may take: at first, and when it is called again."""

_SEND_S = 10.0
"""How long the coordinator may take nothing before its connection is given up."""

_LOOK_S = 5.0
"""Longest interval between two looks at whether peers live, in seconds."""


class MemberMachine(Protocol):
    """A machine with a connection to the coordinator."""

    def join(self, now: float, *, dial: bool = True) -> Actions: ...
    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions: ...
    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions: ...
    def unreachable(
        self, dialled: str, why: str, now: float, *, error: HeadwaterError | None = None, nobody: bool = False
    ) -> Actions: ...
    def closed(self, conn: Conn, now: float) -> Actions: ...
    def tick(self, now: float) -> Actions: ...


class MembershipThread:
    """Runs `machine`, whose dealings with the coordinator are `membership`.

    Attributes:
        lock: the machine's; changed: its condition, notified after everything that happens here.
        watched: returns the node's other connections; those whose peer's machine is gone are closed.
        trace: records what this node does while the coordinator asks for it.
    """

    def __init__(
        self,
        machine: MemberMachine,
        membership: Membership,
        security: Security,
        elsewhere: Callable[[Action], None],
    ) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.watched: Callable[[], Iterable[Channel]] = tuple
        self._machine = machine
        self._membership = membership
        self.trace = TraceRecorder(lambda told: self.step(lambda now: membership.tell(told)))
        self._security = security
        self._elsewhere = elsewhere
        self._channels: dict[Conn, Channel] = {}
        self._last: Conn = 0
        self._stopped = False
        self._life, self._own_life = PeerLiveness(), PeerLiveness()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, name: str, over: Channel | None = None) -> None:
        """Ask to join, over the connection over which this node got its slot if there is one.

        Blocks until the coordinator is dialled, not for its answer.
        """
        self.step(lambda now: self._machine.join(now, dial=over is None))
        if over is not None:
            self._adopt(over)
        self._thread.name = name
        self._thread.start()

    def number(self) -> Conn:
        """For a new connection of this node; the caller holds the lock."""
        self._last += 1
        return self._last

    def owns(self, conn: Conn) -> bool:
        """Whether this is a connection to the coordinator."""
        return conn in self._channels

    def step(self, decide: Callable[[float], Actions]) -> None:
        """Have the machine decide, and do what follows."""
        with self.lock:
            actions = decide(time.monotonic())
            self.changed.notify_all()
        for action in actions:
            self.do(action)

    def do(self, action: Action) -> None:
        """Carry out one action, or pass it on."""
        if isinstance(action, Note):
            _log.log(_LEVELS[action.level], "%s", action.text)
        elif isinstance(action, Send) and (channel := self._channels.get(action.conn)) is not None:
            try:
                channel.send(action.message, timeout=_SEND_S)
            except ConnectionLostError as error:
                _log.debug("the coordinator was not told: %s", error)
        elif isinstance(action, Close) and (channel := self._channels.pop(action.conn, None)) is not None:
            channel.close()
        elif isinstance(action, Dial) and action.tag == COORDINATOR:
            self._dial(action)
        elif isinstance(action, Tell) and isinstance(action.event, TraceAsked):
            self.trace.obey(action.event.asked)
        else:
            self._elsewhere(action)

    def stop(self) -> None:
        """Let no more time pass; blocks until the thread has ended. Idempotent; after the machine closed."""
        self.trace.close()
        with self.lock:
            self._stopped = True
            self.changed.notify_all()
        for channel in list(self._channels.values()):
            channel.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child: there is no thread, and the lock may be held by one that there is not."""
        self._stopped = True
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)

    # ── in the thread ───────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._stopped and self._membership.phase != "over":
            conn = self._membership.conn
            channel = None if conn is None else self._channels.get(conn)
            left = self._left()
            if channel is None or conn is None:
                with self.lock:
                    self.changed.wait_for(lambda: self._stopped or self._membership.conn is not None, left)
            elif left > 0:
                self._read(conn, channel, left)
            now = time.monotonic()
            due = self._membership.due
            if due is not None and now >= due:
                self.step(self._machine.tick)
            self._life.look(self.watched(), now)
            self._own_life.look(tuple(self._channels.values()), now)

    def _left(self) -> float:
        due = self._membership.due
        return _LOOK_S if due is None else min(max(due - time.monotonic(), 0.0), _LOOK_S)

    def _read(self, conn: Conn, channel: Channel, left: float) -> None:
        """Take one message, or find that none has come, or that the connection has ended."""
        try:
            received = channel.receive(timeout=left)
        except TimeoutError:
            return
        except HeadwaterError as error:
            _log.info("%s: lost the coordinator: %s", self._membership.name, error)
            received = None
        if received is None:
            channel.close()  # the peer ended it, which does not let go of it here
            self._channels.pop(conn, None)
            self.step(lambda now: self._machine.closed(conn, now))
        else:
            message, phase = received.message, self._membership.phase
            self.step(lambda now: self._machine.received(conn, message, None, now))
            if phase != self._membership.phase == "member":
                self._watch(channel)

    def _dial(self, action: Dial) -> None:
        assert isinstance(action.member, str)
        timeout = _DIAL_S if self._membership.phase == "joining" else _CALL_S
        try:
            channel = dial(action.member, timeout=timeout, security=self._security)
        except HeadwaterError as error:
            failure, nobody = error, isinstance(error.__cause__, NOBODY)
            self.step(
                lambda now: self._machine.unreachable(
                    action.tag, str(failure), now, error=failure, nobody=nobody
                )
            )
        else:
            self._adopt(channel)

    def _adopt(self, channel: Channel) -> None:
        """A connection to the coordinator exists."""
        with self.lock:
            conn = self.number()
            self._channels[conn] = channel
        self.step(lambda now: self._machine.opened(conn, COORDINATOR, now))

    def _watch(self, channel: Channel) -> None:
        """A coordinator that acknowledges nothing for two leases has declared this member dead, or is gone
        itself; before that the connection may recover, and its end would be a death."""
        silence = 6 * self._membership.welcome.heartbeat
        channel.keep_alive(silence)
        self._own_life = PeerLiveness(silence)
