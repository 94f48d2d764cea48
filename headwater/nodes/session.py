"""A member's connections to all servers, and one exchange at a time over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from headwater import messages as m
from headwater.errors import ClosedError, ConnectionLostError, HeadwaterError, StalledError
from headwater.exchange import Exchange
from headwater.nodes.join import join
from headwater.sync import parse_sync
from headwater.wire.channel import Channel, Outgoing, Received
from headwater.wire.exchange import exchange
from headwater.wire.listener import dial

_log = logging.getLogger("headwater.worker")

_DIAL_S = 10.0


PlaceAnswer: TypeAlias = Callable[[int, m.Answer], Sequence[Any]]
"""Given a server and its answer: the arrays that its payload goes to."""


OutgoingTo: TypeAlias = Callable[[int, int], Outgoing]
"""Given a server and the exchange's number: the frame for it."""


class Receiver(Protocol):
    """What values that come as payload are written to."""

    def range_of(self, server: int) -> Any:
        """The float32 memory of that server's range."""


class Session:
    """Membership in a cluster as a worker or an observer. Not thread-safe: one exchange at a time.

    Attributes:
        welcome: what the coordinator said.
        version: of the last answer; never decreases.
        waiting: seconds spent in exchanges.
        receivers: by model id, where values arrive.
    """

    def __init__(self, coordinator: str, role: m.Role, rank: int | None = None) -> None:
        self.membership, self.welcome = join(coordinator, role, rank)
        self.sync = parse_sync(self.welcome.sync)
        self.version = 0
        self.waiting = 0.0
        self.receivers: dict[int, Receiver] = {}
        self.channels: list[Channel] = []
        self.number = 0
        self._begun: _Begun | None = None
        self._broken: HeadwaterError | None = None
        self._closed = False
        try:
            for server in self.welcome.servers:
                channel = dial(server.addresses[0], timeout=_DIAL_S)
                self.channels.append(channel)
                channel.send(m.Hello(self.welcome.member.id, role, self.welcome.term))
        except BaseException:
            self.close()
            raise

    def call(self, outgoing: OutgoingTo, what: str, place: PlaceAnswer | None = None) -> Exchange:
        """Send `outgoing(server, number)` to each server and block for all answers.

        `place` says where the answers' payload goes; by default it is values, for `receivers`.

        Raises:
            ClosedError: the member has left.
            StalledError: `welcome.deadline` seconds passed; final, as is every error below.
            ConnectionLostError: a server is gone.
        """
        self.finish()
        begun = self._next(what, place)
        self._drive(begun, [outgoing(server, self.number) for server in range(len(self.channels))])
        return begun.exchange

    def begin(
        self, outgoing: OutgoingTo, what: str, place: PlaceAnswer, arrived: Callable[[m.Answer], None]
    ) -> None:
        """Send as `call` does and return; `finish`, or the next call, takes the answers. Raises as `call`."""
        self.finish()
        begun = self._next(what, place, arrived)
        for server, channel in enumerate(self.channels):
            frame = outgoing(server, self.number)
            channel.send(
                frame.message, request=self.number, buffers=frame.buffers, timeout=self.welcome.deadline
            )
        self._begun = begun

    def finish(self) -> None:
        """Block for the answers to what was begun, if anything was, and hand them on. Raises as `call`."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._drive(begun, ())
            begun.arrived(self.settle(begun.exchange))

    def _next(
        self, what: str, place: PlaceAnswer | None, arrived: Callable[[m.Answer], None] = lambda answer: None
    ) -> _Begun:
        self.check_open(what)
        self.number += 1
        return _Begun(Exchange(self.number, len(self.channels)), what, place or self.places, arrived)

    def _drive(self, begun: _Begun, messages: Sequence[Outgoing]) -> None:
        """Send `messages` and take what comes until all servers have answered."""
        current = begun.exchange

        def received(server: int, frame: Received) -> bool:
            done = current.received(server, frame.message)
            if not done:
                _log.warning("worker %d: %s", self.welcome.member.index, current.reason)
            return done

        started = time.monotonic()
        try:
            exchange(self.channels, messages, received, begun.place, self.welcome.deadline, current.number)
        except BaseException as error:
            self._broken = self._explain(error, begun.what, current)
            if self._broken is error or not isinstance(error, HeadwaterError):
                raise
            raise self._broken from error
        finally:
            self.waiting += time.monotonic() - started

    def ask(
        self, request: Callable[[int], m.Request], what: str, place: PlaceAnswer | None = None
    ) -> m.Answer:
        """An exchange of the same request, without payload, to every server."""
        return self.settle(self.call(lambda server, number: Outgoing(request(number)), what, place))

    def places(self, server: int, answer: m.Answer) -> Sequence[Any]:
        """Where the values of an answer go."""
        return [self.receivers[model].range_of(server) for model in answer.values]

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

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._closed = True
        for channel in [*self.channels, self.membership]:
            channel.close()

    def check_open(self, what: str) -> None:
        """Raise ClosedError unless another exchange can be made; `what` is the caller's verb."""
        name = f"{self.welcome.member.role} {self.welcome.member.index}"
        if self._closed:
            raise ClosedError(f"{what}: {name} has left the cluster; connect again for a new one")
        if self._broken is not None:
            raise ClosedError(f"{what}: {name} ended with: {self._broken}")

    def _explain(self, error: BaseException, what: str, current: Exchange) -> HeadwaterError:
        """The error a user should see for one that ended an exchange."""
        if isinstance(error, StalledError):
            servers = ", ".join(map(str, current.unanswered()))
            why = current.reason or f"no word from server {servers}"
            return StalledError(f"{what} had no answer for {self.welcome.deadline:g} s: {why}")
        if isinstance(error, HeadwaterError):
            return error
        return ConnectionLostError(f"{what} was interrupted by {type(error).__name__}")


class _Begun:
    """An exchange on its way: what it is called, where its answers' payload goes, and who is told."""

    def __init__(
        self, exchange: Exchange, what: str, place: PlaceAnswer, arrived: Callable[[m.Answer], None]
    ) -> None:
        self.exchange = exchange
        self.what = what
        self.arrived = arrived
        self._place = place

    def place(self, server: int, message: m.AnyMessage, length: int) -> Sequence[Any]:
        """As a channel asks: only answers have a payload."""
        return self._place(server, message) if isinstance(message, m.Answer) else []
