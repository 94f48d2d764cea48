"""The one driver of a member's machine: blocks, in the thread of whoever calls it.

The calling thread dials the servers, sends requests and takes answers, so a step enters no other thread. One
more thread keeps the membership (`headwater.runtime.membership`). What it decides about servers it leaves in
`_todo`: it closes their connections itself, which wakes the calling thread, and that does the rest.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from headwater import messages as m
from headwater.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    FinishedError,
    HeadwaterError,
    StalledError,
    UsageError,
)
from headwater.loggers import logger
from headwater.machines.actions import Action, Actions, Close, Conn, Dial, Note, Send, Tell
from headwater.machines.client import Asked, Call, ClientMachine, Failed, Settled
from headwater.machines.connections import Buffer, Connected, Frame, Outgoing, Renewal
from headwater.machines.exchange import AnyAnswer, Outcome
from headwater.machines.membership import Ended
from headwater.machines.split_request import SplitAnswer
from headwater.runtime.dialling import dial_member, machine
from headwater.runtime.membership import MembershipThread
from headwater.runtime.stage_clock import StageClock
from headwater.spec.amounts import whole
from headwater.spec.sync import Mode, parse_sync
from headwater.wire.channel import Channel, Received
from headwater.wire.exchange import exchange
from headwater.wire.fork import close_in_child
from headwater.wire.frames import check
from headwater.wire.security import PLAIN, Security
from headwater.wire.shared_memory import windows_possible

_log = logger("headwater.worker")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_OFTEN = (m.Step, m.Pull, m.PullRows)
"""Requests that are made of what was checked already, and of which there are many."""

_DIAL_S = 10.0
_LOOK_S = 0.5
"""Longest interval between two looks at whether this member was dismissed, in seconds."""


class Client:
    """Membership in a cluster as a worker or an observer. Not thread-safe: one exchange at a time.

    When a connection is lost, all are made anew, to wherever the servers are then, and the outstanding
    exchange is repeated.

    Args:
        deadline: seconds for an exchange, by default the cluster's.
        security: what connections to other nodes must prove.
        cluster: the identity of the one that this must be; "" for whichever it is.

    Attributes:
        machine: what decides. welcome: what the coordinator said first.
        channels: to the servers, by index.
        waiting: seconds spent in exchanges.
        stages: the clock of a worker's turns.
        trace: records what this member does while the coordinator asks for it.
        under_way: a step that was begun and whose result was not taken; "" for none.
        dismissed: an exit code with which calls end from now on, until it leaves; None while they do not.

    Raises:
        ConfigurationError: not an address, or not a rank.
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason, or one side does not admit the other.
        OtherClusterError: the coordinator there is of another cluster.
        StalledError: not all servers were there before the cluster's deadline; says whom it waited for.
        ProtocolError: what answers is no coordinator.
    """

    def __init__(
        self,
        coordinator: str,
        role: m.Role,
        rank: int | None = None,
        *,
        deadline: float | None = None,
        security: Security = PLAIN,
        cluster: str = "",
    ) -> None:
        _check(coordinator)
        rank = None if rank is None else whole("rank", rank, 0, 2**31 - 1)
        join = m.Join(role, rank, os.getpid(), socket.gethostname(), (), machine(), cluster)
        self.machine = ClientMachine(coordinator, join, deadline=deadline)
        self.channels: list[Channel] = []
        self.under_way = ""
        self.waiting = 0.0
        self.stages = StageClock()
        self.dismissed: int | None = None
        self._security = security
        self._links: dict[Conn, Channel] = {}
        self._conns: list[Conn] = []
        self._todo: deque[Action] = deque()
        self._frames: Sequence[Outgoing] = ()
        self._settled: Settled | None = None
        self._failure: HeadwaterError | None = None
        self._ended: HeadwaterError | None = None
        self._splits: deque[SplitAnswer] = deque()
        self._begun: Callable[[Outcome], None] | None = None
        self._files: Callable[[m.AnyMessage, Sequence[int]], None] | None = None
        self._what = "connect"
        self._traffic = [0, 0]  # of connections that have ended
        self._closed = False
        self._process = os.getpid()
        self._member = MembershipThread(self.machine, self.machine.membership, security, self._put_off)
        self._member.watched = lambda: tuple(self._links.values())
        self.trace = self.stages.trace = self._member.trace
        self._lock = self._member.lock
        close_in_child(self)
        try:
            self._member.begin(f"headwater-membership-{role}")
            self._drive([], time.monotonic())
            self.welcome = self.machine.membership.welcome
            if role == "worker":
                self.mode  # noqa: B018 - a worker must know it, others need not
        except BaseException:
            self.close()
            raise

    @functools.cached_property
    def mode(self) -> Mode:
        """The cluster's.

        Raises:
            ConfigurationError: a mode that this process does not know.
        """
        return parse_sync(self.welcome.sync)

    @property
    def version(self) -> int:
        """Of the last answer; never decreases."""
        return self.machine.version

    @property
    def shares(self) -> list[bool]:
        """By server, whether memory can be shared with it; may change with the connections."""
        return self.machine.connections.shares

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received over the connections to servers, those that have ended included."""
        now = list(self._links.values())
        return (
            self._traffic[0] + sum(channel.sent for channel in now),
            self._traffic[1] + sum(channel.received for channel in now),
        )

    # ── exchanges ───────────────────────────────────────────────────────────────────────────────

    def call(
        self,
        frame: Callable[[int, int], Outgoing],
        what: str,
        place: Callable[[int, Any], Sequence[Any]] | None = None,
        expects: type[AnyAnswer] = m.Answer,
        memory: Buffer | None = None,
        files: Callable[[m.AnyMessage, Sequence[int]], None] | None = None,
    ) -> Any:
        """Make the exchange that `Call` of these says; blocks for all answers, and returns what they come to.

        `files`: takes the descriptors that come with a message, and closes them.

        Raises:
            UsageError: the request cannot be sent; nothing was.
            HeadwaterError: what the servers refused it with.
            ClosedError: the member has left.
            StalledError: the deadline passed; says for whom. Final, as is every error below.
            ConnectionLostError: the cluster is closed, or a server is gone for good.
            RewoundError: training began anew from a checkpoint, without this member.
            RefusedError: this member was declared dead.
        """
        self._files = files
        try:
            return self._make(Call(what, frame, place, expects, memory))
        finally:
            self._files = None

    def _make(self, call: Call) -> Any:
        if self._begun is not None:
            self.finish()
        if self._closed or self.machine.failure is not None or self._is_forked:
            self._check_usable(call.what)
        self._what = call.what
        now = time.monotonic()
        with self._lock:
            actions = self.machine.call(call, now)
        return self._drive(actions, now)

    def ask(
        self, request: Callable[[int], m.AnyMessage], what: str, expects: type[AnyAnswer] = m.Answer
    ) -> Any:
        """An exchange of the same request, without payload, to every server."""
        return self._make(Call(what, lambda server, number: Frame(request(number)), None, expects))

    def begin(
        self,
        frame: Callable[[int, int], Outgoing],
        what: str,
        place: Callable[[int, m.Answer], Sequence[Any]],
        arrived: Callable[[Any], None],
        memory: Buffer | None = None,
    ) -> None:
        """Send as `call` does and return; `finish`, or the next call, takes the answers.

        Raises:
            ClosedError: the member has left.
        """
        self.finish()
        self._check_usable(what)
        self._what, self._begun = what, arrived
        with self._lock:
            actions = self.machine.begin(Call(what, frame, place, memory=memory), time.monotonic())
        self._carry_out(actions)
        frames, self._frames = self._frames, ()
        for channel, sent in zip(self.channels, frames, strict=False):
            try:
                channel.send(
                    sent.message,
                    request=self.machine.number,
                    buffers=sent.buffers,
                    timeout=self.machine.deadline,
                )
            except ConnectionLostError as error:
                _log.info("%s: %s: %s", self.machine.membership.name, what, error)  # `finish` repeats it
            except UsageError:
                self._begun = None
                with self._lock:
                    self.machine.withdraw()
                raise

    def finish(self) -> None:
        """Block for the answers to what was begun, if anything was, and hand them on. Raises as `call`."""
        arrived, self._begun = self._begun, None
        if arrived is None:
            return
        now = time.monotonic()
        with self._lock:
            actions = self.machine.wait(now)
        arrived(self._drive(actions, now))

    def poll(self, seconds: float = 0.0) -> bool:
        """Take what has come for what was begun, for at most so long; whether `finish` would return at once.

        The cluster's deadline does not count meanwhile.
        """
        over = time.monotonic() + seconds
        while self._settled is None and self._failure is None and self.machine.failure is None:
            if self.machine.connections.stage != "connected" or self._todo:
                self._carry_out(self._news(max(0.0, over - time.monotonic())))
            else:
                self._take_what_is_there(max(0.0, over - time.monotonic()))
            if self._settled is None and time.monotonic() >= over:
                return False
        return True

    def _take_what_is_there(self, seconds: float) -> None:
        waited_for = self.machine.unanswered()
        if waited_for is None:
            waited_for = list(range(len(self.channels)))
        try:
            exchange(self.channels, (), self._received, self._place, seconds, self.machine.number, waited_for)
        except StalledError:
            return
        except ConnectionLostError as error:
            _log.info("%s: %s: %s", self.machine.membership.name, self._what, error)
            with self._lock:
                actions = self.machine.closed(self._conns[0], time.monotonic())
        except HeadwaterError as error:
            with self._lock:
                actions = self.machine.fail(error)
        else:
            return
        self._carry_out(actions)

    def describe(self) -> m.Description:
        """The registered models; answered at once."""
        description: m.Description = self.ask(m.Describe, "describe", expects=m.Description)
        return description

    # ── the coordinator ─────────────────────────────────────────────────────────────────────────

    def tell(self, message: m.AnyMessage) -> None:
        """Say something to the coordinator; lost where it is away or gone."""
        self._member.step(lambda now: self.machine.membership.tell(message))

    def next_split(self, request: Callable[[int], m.Lease], on_wait: Callable[[], None]) -> m.Leased | None:
        """The next split of a data set, None when there will be none; blocks while others may still give
        theirs back, and while the coordinator is away. After an interruption it may be called again.

        `on_wait` is called once before a wait for others.

        Raises:
            ConfigurationError: the others make this call differently; names both.
            StalledError: nothing was leased before the deadline; names who holds what.
            ConnectionLostError: the coordinator is gone.
        """
        self.check_open("batches")
        self._splits.clear()
        began = time.monotonic()
        number = self.machine.splits.next_number
        self._member.step(lambda now: self.machine.next_split(request(number), now))
        try:
            reply = self._next_answer()
            if isinstance(reply, m.Unleased) and not reply.over:
                on_wait()
            while isinstance(reply, m.Unleased) and not reply.over:
                reply = self._next_answer()
            self.machine.splits.taken()
        finally:
            self.waiting += time.monotonic() - began
        return reply if isinstance(reply, m.Leased) else None

    def _next_answer(self) -> m.Leased | m.Unleased:
        while not self._splits:
            self._carry_out(self._news(_LOOK_S))
            self.check_open("batches")
        reply = self._splits.popleft().reply
        if isinstance(reply, HeadwaterError):
            self.machine.splits.taken()
            raise reply
        return reply

    def wait_for_others(self) -> None:
        """Having left the log, block until every declared worker has finished.

        Raises:
            RewoundError: training begins anew.
            ConnectionLostError: the cluster was closed before, or its coordinator is away for too long.
            SystemExit: the worker was dismissed.
        """
        _log.info("%s waits until every declared worker has finished", self.machine.membership.name)
        self._member.step(lambda now: self.machine.finish())
        while self._ended is None:
            if self.dismissed is not None:
                self.tell(m.Departed(self.welcome.member.id))
                raise SystemExit(self.dismissed)
            self._carry_out(self._news(_LOOK_S))
        if not isinstance(self._ended, FinishedError):
            raise self._ended
        _log.info("%s: %s", self.machine.membership.name, self._ended)

    # ── its end ─────────────────────────────────────────────────────────────────────────────────

    def usable(self) -> bool:
        """Whether another exchange can be made."""
        return not self._closed and self.machine.failure is None and not self._is_forked

    def leave_log(self, request: Callable[[int], m.Leave] = m.Leave) -> None:
        """Leave the log: everybody else goes on without this member. Raises as `call`."""
        self._make(Call("leave", lambda server, number: Frame(request(number)), leaves=True))

    def leave(self, *, finished: bool) -> None:
        """Leave the log and the cluster. `finished`: nobody need take this place. Raises as `call`."""
        self.leave_log()
        self.depart(finished)

    def depart(self, finished: bool) -> None:
        """Having left the log, leave the cluster."""
        self.trace.close()  # while it is a member, so that its last reaches the coordinator
        self._member.step(lambda now: self.machine.leave(finished))
        self.close()

    def interrupt(self) -> None:
        """From another thread: end the membership, and an exchange under way with ConnectionLostError."""
        if self._is_forked:
            return  # it is the parent's
        self._closed = True
        self._member.step(lambda now: self.machine.close())

    def close(self) -> None:
        """Close all connections; idempotent."""
        self.interrupt()
        self._member.stop()
        for conn in list(self._links):
            self._hang_up(conn)
        self.machine.connections.buffers.clear()

    def check_open(self, what: str) -> None:
        """Raise ClosedError unless another exchange can be made; `what` is the user's verb.

        Raises UsageError in a forked child, SystemExit where this member was dismissed.
        """
        self._check_usable(what)
        if self.under_way and what not in ("batches", "splits", "keep"):
            raise UsageError(
                f"{what}: {self.under_way} is under way, and until its answer the memory is the servers': "
                f"take the result() of the PendingStep first"
            )
        if self.dismissed is not None:
            raise SystemExit(self.dismissed)

    def close_descriptors(self) -> None:
        """In a forked child: there is no other thread, and locks may be held by one that there is not."""
        self._member.abandon()
        self._lock = self._member.lock

    @property
    def _is_forked(self) -> bool:
        """Whether this process was forked from the one whose membership this is."""
        return os.getpid() != self._process

    def _check_usable(self, what: str) -> None:
        if self._is_forked:
            raise UsageError(
                f"{what}: {self.machine.membership.name} belongs to process {self._process}, and this is "
                f"process {os.getpid()}, forked from it: only the process that joined can use it. Join here "
                "with a worker of its own (hw.connect), or hand data over instead of the worker"
            )
        if self._closed:
            name = self.machine.membership.name
            raise ClosedError(f"{what}: {name} has left the cluster; connect again for a new one")
        failure = self.machine.failure
        if failure is not None:
            raise ClosedError(f"{what}: {self.machine.membership.name} ended with: {failure}")

    # ── driving the machine ─────────────────────────────────────────────────────────────────────

    def _drive(self, actions: Actions, now: float) -> Any:
        """Do what the machine decides until all servers have answered, or at first are connected to; returns
        what they answered. Raises what they refused, or what the machine fails with."""
        began = now
        try:
            self._carry_out(actions)
            while (settled := self._settled) is None:
                if self._failure is not None:
                    raise self._failure
                if self.machine.connections.stage == "connected" and not self._todo:
                    self._exchange(now)
                else:
                    self._carry_out(self._news(None))
                now = time.monotonic()
        except BaseException as error:
            self._interrupted(error)
            raise
        finally:
            self.waiting += time.monotonic() - began
        self._settled = None
        if settled.error is not None:
            raise settled.error
        return settled.outcome

    def _exchange(self, now: float) -> None:
        """Send the request, unless it was sent, and take what comes until all servers have answered, or it
        ends otherwise; does what the machine decides then."""
        until = self.machine.until
        frames, self._frames = self._frames, ()
        try:
            left = None if until is None else max(0.0, until - now)
            for frame in frames:
                if type(frame.message) not in _OFTEN:
                    check(frame.message)
            number, unanswered = self.machine.number, self.machine.unanswered()
            exchange(self.channels, frames, self._received, self._place, left, number, unanswered, self._sent)
            return
        except UsageError as error:  # it cannot be sent, so nothing has been
            with self._lock:
                actions = self.machine.withdraw()
            self._settled = Settled(None, error)
        except StalledError:
            assert until is not None
            with self._lock:
                actions = self.machine.tick(max(until, time.monotonic()))
        except ConnectionLostError as error:
            _log.info("%s: %s: %s", self.machine.membership.name, self._what, error)
            with self._lock:
                actions = self.machine.closed(self._conns[0], time.monotonic())
        except HeadwaterError as error:
            with self._lock:
                actions = self.machine.fail(error)
        self._carry_out(actions)

    def _received(self, server: int, frame: Received) -> bool:
        """Take what a server sent; whether it was an answer."""
        message = frame.message
        if not frame.payload_length:
            self.stages.answered = self.stages.now()
        with self._lock:
            actions = self.machine.received(self._conns[server], message, None, time.monotonic())
        if frame.descriptors and self._files is not None:
            self._files(message, frame.descriptors)
        elif frame.descriptors:
            _close(frame.descriptors)
        if actions:
            self._carry_out(actions)
        return not isinstance(message, m.Waiting)

    def _sent(self) -> None:
        self.stages.sent = self.stages.now()

    def _place(self, server: int, message: m.AnyMessage, length: int) -> Sequence[Any]:
        self.stages.answered = self.stages.now()
        if isinstance(message, m.Answer | m.Publication):
            return self.machine.place(server, message)
        return ()

    def _news(self, longest: float | None) -> Actions:
        """Block until the other thread has left something to do, or a time has come; `longest`: seconds."""
        over = None if longest is None else time.monotonic() + longest
        with self._lock:
            while not self._todo:
                now, due = time.monotonic(), self.machine.call_due
                if due is not None and now >= due:
                    return self.machine.tick(now)
                if over is not None and now >= over:
                    return []
                times = [time - now for time in (due, over) if time is not None]
                self._member.changed.wait(min(times, default=None))
            actions = list(self._todo)
            self._todo.clear()
            return actions

    def _put_off(self, action: Action) -> None:
        """In whichever thread: connections to servers end at once, everything else is for the calling one."""
        if isinstance(action, Close):
            self._hang_up(action.conn)
            return
        with self._lock:
            self._todo.append(action)
            self._member.changed.notify_all()

    def _carry_out(self, actions: Actions) -> None:
        """Do all that was decided, and what follows from that."""
        for action in actions:  # which may grow
            if type(action) is Tell:
                self._take(action.event)
            elif isinstance(action, Send) and action.conn in self._links:
                actions += self._send(action)
            elif isinstance(action, Dial) and not isinstance(action.member, str):
                actions += self._dial(action.member, action.tag)
            elif isinstance(action, Note):
                _log.log(_LEVELS[action.level], "%s", action.text)
            elif isinstance(action, Close) and action.conn in self._links:
                self._hang_up(action.conn)
            else:
                self._member.do(action)

    def _hang_up(self, conn: Conn) -> None:
        channel = self._links.pop(conn, None)
        if channel is not None:
            channel.close()
            self._traffic[0] += channel.sent
            self._traffic[1] += channel.received

    def _take(self, event: Any) -> None:
        kind = type(event)
        if kind is Settled:
            self._settled = event
        elif kind is Asked:
            self._frames = event.frames
        elif isinstance(event, Failed):
            self._failure = event.error
        elif isinstance(event, Connected):
            if not self.channels:
                self._settled = Settled(None)  # there is no exchange yet
            self._conns = self.machine.connections.links
            self.channels = [self._links[conn] for conn in self._conns]
        elif isinstance(event, Renewal):
            for buffer in self.machine.connections.buffers:
                buffer.renew()
        elif isinstance(event, SplitAnswer):
            self._splits.append(event)
        elif isinstance(event, Ended):
            self._ended = event.error

    def _send(self, action: Send) -> Actions:
        """Send what is no request. Blocks."""
        try:
            self._links[action.conn].send(
                action.message, buffers=action.buffers, descriptors=action.descriptors, timeout=_DIAL_S
            )
        except ConnectionLostError as error:
            _log.info("%s: %s", self.machine.membership.name, error)
            with self._lock:
                return self.machine.closed(action.conn, time.monotonic())
        return []

    def _dial(self, member: m.Member, tag: str) -> Actions:
        """Connect to a server. Blocks."""
        try:
            channel = dial_member(member, timeout=_DIAL_S, security=self._security)
        except HeadwaterError as error:
            with self._lock:
                return self.machine.unreachable(tag, str(error), time.monotonic(), error=error)
        shared = channel.can_pass_descriptors and windows_possible()
        with self._lock:
            conn = self._member.number()
            self._links[conn] = channel
            return self.machine.opened(conn, tag, time.monotonic(), shared=shared)

    def _interrupted(self, error: BaseException) -> None:
        """An exchange ended otherwise than by its answers: no other can be made."""
        if self.machine.failure is None:
            name = type(error).__name__
            why = (
                error
                if isinstance(error, HeadwaterError)
                else ConnectionLostError(f"{self._what} was interrupted by {name}")
            )
            self._member.step(lambda now: self.machine.fail(why))


def _check(coordinator: Any) -> None:
    """Raise ConfigurationError unless it can be an address."""
    if not isinstance(coordinator, str):
        raise ConfigurationError(
            f"the address of a coordinator is a text such as 'tcp:node1:7000', got {coordinator!r}"
        )


def _close(descriptors: Sequence[int]) -> None:
    """Nobody sends a member files that it did not ask for; whoever does may not fill its table of them."""
    for descriptor in descriptors:
        os.close(descriptor)
