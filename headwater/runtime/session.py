"""A member's connections to all servers, and one exchange at a time over them."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from headwater import messages as m
from headwater.errors import ClosedError, ConnectionLostError, HeadwaterError, RefusedError, StalledError
from headwater.machines.exchange import Exchange
from headwater.runtime.connections import Connections
from headwater.runtime.coordinator_client import CoordinatorClient
from headwater.spec.sync import Mode, parse_sync
from headwater.wire.channel import Channel, Outgoing, Received
from headwater.wire.exchange import exchange
from headwater.wire.security import PLAIN, Security
from headwater.wire.shared_memory import windows_possible

_log = logging.getLogger("headwater.worker")

PlaceAnswer: TypeAlias = Callable[[int, m.Answer], Sequence[Any]]
"""Given a server and its answer: the arrays that its payload goes to."""


OutgoingTo: TypeAlias = Callable[[int, int], Outgoing]
"""Given a server and the exchange's number: the frame for it; called again when the exchange is repeated."""


class Receiver(Protocol):
    """What values that come as payload are written to."""

    def incoming(self, server: int) -> Sequence[Any]:
        """The float32 memory of that server's range; nothing where it writes to shared memory itself."""


class SharedMemory(Protocol):
    """Memory that servers use between exchanges, which they must be given anew when connections are."""

    def renew(self) -> None:
        """Go on in memory with the same content that nobody else has."""

    def offer(self, server: int, shared: bool) -> Outgoing | None:
        """The frame that gives it to a server over a connection that passes files on, or else tells it that
        there is none; None where nothing need be said."""


class Session:
    """Membership in a cluster as a worker or an observer. Not thread-safe: one exchange at a time.

    When a connection is lost, all are made anew, to wherever the servers are then, and the outstanding
    exchange is repeated.

    Attributes:
        membership: its connection to the coordinator; welcome: what that said.
        version: of the last answer; never decreases.
        waiting: seconds spent in exchanges.
        shares: by server, whether memory can be shared with it; may change with the connections.
        receivers: by model id, where values arrive.
        memories: what servers share with this member.
        dismissed: an exit code with which calls end from now on, until it leaves; None while they do not.
    """

    def __init__(
        self,
        coordinator: str,
        role: m.Role,
        rank: int | None = None,
        *,
        deadline: float | None = None,
        security: Security = PLAIN,
    ) -> None:
        self.membership = CoordinatorClient(coordinator, role, rank, security=security)
        self.welcome = self.membership.welcome
        self._deadline = self.welcome.deadline if deadline is None else deadline
        self.version = 0
        self.waiting = 0.0
        self.receivers: dict[int, Receiver] = {}
        self.memories: list[SharedMemory] = []
        self.number = 0
        self.dismissed: int | None = None
        self._begun: _Begun | None = None
        self._broken: HeadwaterError | None = None
        self._closed = False
        self._name = role if role == "observer" else f"{role} {self.welcome.member.index}"
        self.channels: list[Channel] = []
        self.shares: list[bool] = []
        self._connections = Connections(self.membership)
        try:
            if role == "worker":
                self.mode  # noqa: B018 - a worker must know it, others need not
            self._take(self._connections.make(time.monotonic() + self._deadline))
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

    def _take(self, channels: list[Channel]) -> None:
        """Exchange over these from now on."""
        self.channels, self.shares = channels, [_shares(channel) for channel in channels]

    def call(self, outgoing: OutgoingTo, what: str, place: PlaceAnswer | None = None) -> Exchange:
        """Send `outgoing(server, number)` to each server and block for all answers.

        `place` says where the answers' payload goes; by default it is values, for `receivers`.

        Raises:
            ClosedError: the member has left.
            StalledError: `welcome.deadline` seconds passed; final, as is every error below.
            ConnectionLostError: the cluster is closed, or a server is gone for good.
            RewoundError: training began anew from a checkpoint, without this member.
            RefusedError: this member was declared dead.
        """
        self.finish()
        begun = self._next(outgoing, what, place)
        self._drive(begun, begun.frames(len(self.channels)))
        return begun.exchange

    def begin(
        self, outgoing: OutgoingTo, what: str, place: PlaceAnswer, arrived: Callable[[m.Answer], None]
    ) -> None:
        """Send as `call` does and return; `finish`, or the next call, takes the answers.

        Raises:
            ClosedError: the member has left.
        """
        self.finish()
        begun = self._begun = self._next(outgoing, what, place, arrived)
        try:
            for channel, frame in zip(self.channels, begun.frames(len(self.channels)), strict=True):
                channel.send(
                    frame.message, request=self.number, buffers=frame.buffers, timeout=self.welcome.deadline
                )
        except ConnectionLostError as error:
            _log.info("%s: %s: %s", self._name, what, error)  # `finish` repeats it

    def finish(self) -> None:
        """Block for the answers to what was begun, if anything was, and hand them on. Raises as `call`."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._drive(begun, ())
            begun.arrived(self.settle(begun.exchange))

    def _next(
        self,
        outgoing: OutgoingTo,
        what: str,
        place: PlaceAnswer | None,
        arrived: Callable[[m.Answer], None] = lambda answer: None,
    ) -> _Begun:
        self._check_usable(what)
        self.number += 1
        return _Begun(self.number, len(self.channels), outgoing, what, place or self.places, arrived)

    def _drive(self, begun: _Begun, frames: Sequence[Outgoing]) -> None:
        """Send `frames` and take what comes until all servers have answered; connects anew if needed."""
        started = time.monotonic()
        until = started + self._deadline
        try:
            while not self._exchanged(begun, frames, until):
                frames = self._repeated(begun, until)
        except BaseException as error:
            self._broken = self._explain(error, begun)
            if self._broken is error or not isinstance(error, HeadwaterError):
                raise
            raise self._broken from error
        finally:
            self.waiting += time.monotonic() - started

    def _exchanged(self, begun: _Begun, frames: Sequence[Outgoing], until: float) -> bool:
        """False when a connection was lost before all had answered."""

        def received(server: int, frame: Received) -> bool:
            done = begun.exchange.received(server, frame.message)
            if not done and self.welcome.member.role == "worker":
                _log.warning("%s: %s", self._name, self.membership.beside(begun.exchange.reason))
            return done

        left = max(0.0, until - time.monotonic())
        try:
            exchange(
                self.channels,
                frames,
                received,
                begun.place,
                None if left == math.inf else left,
                begun.exchange.number,
            )
        except ConnectionLostError as error:
            if self._closed:
                raise
            _log.info("%s: %s: %s", self._name, begun.what, error)
            return False
        return True

    def _repeated(self, begun: _Begun, until: float) -> Sequence[Outgoing]:
        """Connect anew; returns the frames to send again. Raises as `call`."""
        self._connections.drop()
        for memory in self.memories:
            memory.renew()
        try:
            self._take(self._connections.make(until, self._offers))
        except StalledError as error:
            begun.exchange.reason = str(error)
            raise
        return begun.again(len(self.channels))

    def _offers(self, server: int, channel: Channel) -> Iterator[Outgoing]:
        for memory in self.memories:
            offer = memory.offer(server, _shares(channel))
            if offer is not None:
                yield offer

    def ask(
        self, request: Callable[[int], m.Request], what: str, place: PlaceAnswer | None = None
    ) -> m.Answer:
        """An exchange of the same request, without payload, to every server."""
        return self.settle(self.call(lambda server, number: Outgoing(request(number)), what, place))

    def places(self, server: int, answer: m.Answer) -> Sequence[Any]:
        """Where the values of an answer go."""
        return [part for model in answer.values for part in self.receivers[model].incoming(server)]

    def settle(self, current: Exchange) -> m.Answer:
        """The answer of an exchange; takes over its version.

        Raises:
            HeadwaterError: what the servers refused it with; StalledError is final.
        """
        try:
            answer = current.answer()
        except StalledError as error:
            self._broken = error
            raise
        self.version = max(self.version, answer.version)
        return answer

    def describe(self) -> m.Description:
        """The registered models; answered at once."""
        return self.call(lambda server, number: Outgoing(m.Describe(number)), "describe").description()

    def usable(self) -> bool:
        """Whether another exchange can be made."""
        return not self._closed and self._broken is None

    def hang_up(self) -> None:
        """Close the connections to servers: there is no exchange to come."""
        self._connections.drop()
        self.channels = []

    def interrupt(self) -> None:
        """From another thread: end the session, and an exchange under way with ConnectionLostError."""
        self._closed = True
        self.membership.close()
        self._connections.drop()

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._closed = True
        self._connections.drop()
        self.membership.close()
        self.memories.clear()

    def check_open(self, what: str) -> None:
        """Raise ClosedError unless another exchange can be made; `what` is the user's verb.

        Raises SystemExit where this member was dismissed.
        """
        self._check_usable(what)
        if self.dismissed is not None:
            raise SystemExit(self.dismissed)

    def _check_usable(self, what: str) -> None:
        if self._closed:
            raise ClosedError(f"{what}: {self._name} has left the cluster; connect again for a new one")
        if self._broken is not None:
            raise ClosedError(f"{what}: {self._name} ended with: {self._broken}")

    def _explain(self, error: BaseException, begun: _Begun) -> HeadwaterError:
        """The error a user should see for one that ended an exchange."""
        if isinstance(error, StalledError):
            servers = ", ".join(map(str, begun.exchange.unanswered()))
            why = begun.exchange.reason or f"no word from server {servers}"
            why = self.membership.beside(why)
            return StalledError(f"{begun.what} had no answer for {self._deadline:g} s: {why}")
        if isinstance(error, RefusedError):
            return self.membership.verdict() or error
        if isinstance(error, HeadwaterError):
            return error
        return ConnectionLostError(f"{begun.what} was interrupted by {type(error).__name__}")


def _shares(channel: Channel) -> bool:
    return channel.can_pass_descriptors and windows_possible()


class _Begun:
    """An exchange on its way: what makes its frames, where its answers' payload goes, and who is told."""

    def __init__(
        self,
        number: int,
        servers: int,
        outgoing: OutgoingTo,
        what: str,
        place: PlaceAnswer,
        arrived: Callable[[m.Answer], None],
    ) -> None:
        self.exchange = Exchange(number, servers)
        self.what = what
        self.arrived = arrived
        self._outgoing = outgoing
        self._place = place

    def frames(self, servers: int) -> list[Outgoing]:
        """What to send to each server."""
        return [self._outgoing(server, self.exchange.number) for server in range(servers)]

    def again(self, servers: int) -> list[Outgoing]:
        """The same, for the exchange to begin anew: no answer of before counts."""
        self.exchange = Exchange(self.exchange.number, servers)
        return self.frames(servers)

    def place(self, server: int, message: m.AnyMessage, length: int) -> Sequence[Any]:
        """As a channel asks: only answers have a payload."""
        return self._place(server, message) if isinstance(message, m.Answer) else []
