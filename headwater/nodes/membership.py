"""A node's membership in a cluster: its connection to the coordinator, kept alive by heartbeats."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, ProtocolError, RefusedError, named
from headwater.nodes.join import join
from headwater.wire.channel import Channel
from headwater.wire.listener import dial

_log = logging.getLogger("headwater")

_ANSWER_S = 10.0
"""How long the coordinator may take to answer a question, in seconds."""


class Membership:
    """Joins as `role`; blocks until the coordinator takes this node in. Questions are for one thread.

    Attributes:
        welcome: what the coordinator said.

    Raises:
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason.
    """

    def __init__(
        self, coordinator: str, role: m.Role, index: int | None, addresses: tuple[str, ...] = ()
    ) -> None:
        self._channel, self.welcome = join(coordinator, role, index, addresses=addresses)
        self._coordinator = coordinator
        self._expected: tuple[tuple[int, ...], Callable[[], None]] = ((), lambda: None)
        self._ended = threading.Event()
        member = self.welcome.member
        self._beating = threading.Thread(
            target=self._beat, name=f"headwater-heartbeat-{role}-{member.index}", daemon=True
        )
        self._beating.start()

    def tell(self, message: m.AnyMessage) -> None:
        """Send something that has no answer; lost where the coordinator is, since nothing depends on it."""
        try:
            self._channel.send(message, timeout=_ANSWER_S)
        except ConnectionLostError as error:
            _log.debug("the coordinator was not told: %s", error)

    def ask(self, question: m.AnyMessage) -> m.AnyMessage:
        """Send a question and block for the answer.

        Raises:
            HeadwaterError: as the coordinator named it, when it has ended this membership.
            ConnectionLostError: the coordinator is gone, or says nothing.
        """
        try:
            self._channel.send(question, timeout=_ANSWER_S)
        except ConnectionLostError:
            pass  # what it said before it hung up tells more
        try:
            return self.next_message(_ANSWER_S)
        except TimeoutError as error:
            raise ConnectionLostError(f"the coordinator does not answer: {error}") from error

    def next_message(self, timeout: float | None = None) -> m.AnyMessage:
        """What the coordinator says next. Raises TimeoutError after `timeout` seconds, and as `ask`."""
        received = self._channel.receive(timeout=timeout)
        if received is None:
            raise ConnectionLostError("the coordinator is gone")
        if isinstance(received.message, m.Refused):
            raise named(received.message.error, received.message.reason, default=RefusedError)
        return received.message

    def locate(self) -> m.Whereabouts:
        """Where the servers are now. Raises as `ask`."""
        answer = self.ask(m.Locate())
        while isinstance(answer, m.Leased | m.Unleased):  # of a request given up
            answer = self.next_message(_ANSWER_S)
        if not isinstance(answer, m.Whereabouts):
            raise ProtocolError(f"the coordinator answered {type(answer).__name__}")
        return answer

    def expect(self, servers: Sequence[m.Member], moved: Callable[[], None]) -> None:
        """Have `moved` called, from another thread, when the servers are no longer these.

        A server that was stopped keeps its connections open, so nothing else would tell.
        """
        self._expected = tuple(server.id for server in servers), moved

    def close(self) -> None:
        """End the connection, without a word, and the heartbeats; idempotent."""
        self._ended.set()
        self._channel.close()
        self._beating.join()

    @property
    def channel(self) -> Channel:
        """The connection itself."""
        return self._channel

    def _beat(self) -> None:
        while not self._ended.wait(self.welcome.heartbeat):
            self.tell(m.Heartbeat())
            expected, moved = self._expected
            now = self._servers_now() if expected else ()
            if now and now != expected and self._expected[0] == expected:
                moved()

    def _servers_now(self) -> tuple[int, ...]:
        """Ids of all servers, by index, asked over a connection of its own; empty where nobody says."""
        try:
            channel = dial(self._coordinator, timeout=_ANSWER_S)
            try:
                channel.send(m.Locate(), timeout=_ANSWER_S)
                received = channel.receive(timeout=_ANSWER_S)
            finally:
                channel.close()
        except (HeadwaterError, TimeoutError) as error:
            _log.debug("the coordinator was not asked: %s", error)
            return ()
        servers = received.message.servers if received and isinstance(received.message, m.Whereabouts) else ()
        return tuple(server.id for server in servers) if len(servers) == len(self.welcome.servers) else ()
