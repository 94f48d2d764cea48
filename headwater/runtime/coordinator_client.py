"""A node's membership in a cluster: its connection to the coordinator, kept alive by heartbeats.

A coordinator that ends this membership says so. One that is gone without a word is *away*: it is called until
it is back, and training goes on meanwhile. Without a journal it is gone for good once its process has ended.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError, RefusedError, named
from headwater.runtime.dialling import NOBODY
from headwater.runtime.join import join, rejoin
from headwater.wire.channel import Channel
from headwater.wire.liveness import PeerLiveness
from headwater.wire.security import PLAIN, Security

_log = logging.getLogger("headwater")

_ANSWER_S = 10.0
"""How long the coordinator may take to answer a question, in seconds."""

_VERDICT_S = 2.0

_LOOK_S = 5.0
"""How often at least it is looked whether peers live, in seconds."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
"""Between calls to a coordinator that is away."""


class CoordinatorClient:
    """Joins as `role`; blocks until the coordinator takes this node in.

    `locate` and `next_message` are for one thread at a time, the rest for any.

    Attributes:
        welcome: what the coordinator said first.
        connection: counts the connections; what was sent over an older one may be lost.
        security: what connections to other nodes must prove.

    `over`: the connection over which a server enlisted.

    Raises:
        ConnectionLostError: nobody answers at that address.
        RefusedError: the coordinator refuses, with its reason.
    """

    def __init__(
        self,
        coordinator: str,
        role: m.Role,
        index: int | None,
        addresses: tuple[str, ...] = (),
        *,
        security: Security = PLAIN,
        over: Channel | None = None,
    ) -> None:
        self._channel, self.welcome = join(
            coordinator, role, index, addresses=addresses, security=security, over=over
        )
        self.security = security
        self.connection = 0
        self._calling: Channel | None = None
        self._coordinator = coordinator
        self._changed = threading.Condition()
        self._messages: deque[m.AnyMessage] = deque()
        self._whereabouts: m.ServerAddresses | None = None
        self._refused: m.Refused | None = None
        self._away_since: float | None = None
        self._expected: tuple[tuple[int, ...], Callable[[], None]] = ((), lambda: None)
        self._closed = threading.Event()
        self._life = PeerLiveness()
        self._watched: Callable[[], Iterable[Channel]] = tuple
        self._own_life = self._begin_life(self._channel)
        name = f"{role}-{self.welcome.member.index}"
        self._threads = [
            threading.Thread(target=self._beat, name=f"headwater-heartbeat-{name}", daemon=True),
            threading.Thread(target=self._keep, name=f"headwater-membership-{name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # ── for the node ────────────────────────────────────────────────────────────────────────────

    def tell(self, message: m.AnyMessage) -> int:
        """Send something, lost where the coordinator is away or gone; returns the connection it went over."""
        with self._changed:
            channel, connection = self._channel, self.connection
        try:
            channel.send(message, timeout=_ANSWER_S)
        except ConnectionLostError as error:
            _log.debug("the coordinator was not told: %s", error)
        return connection

    def next_message(self, timeout: float | None = None) -> m.AnyMessage:
        """What the coordinator says next, Whereabouts aside: Welcome when it is back after it was away.

        Raises:
            HeadwaterError: as the coordinator named it, when it has ended this membership.
            ConnectionLostError: the coordinator is gone, or `close` was called.
            TimeoutError: it said nothing for `timeout` seconds, perhaps because it is away.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._messages or self._is_over(), timeout):
                raise TimeoutError(f"the coordinator said nothing for {timeout} s")
            if self._messages:
                return self._messages.popleft()
            raise self._end()

    def locate(self) -> m.ServerAddresses | None:
        """Where the servers are now; None where the coordinator is away or says nothing.

        Raises:
            HeadwaterError, ConnectionLostError: as `next_message`.
        """
        with self._changed:
            self._whereabouts = None
        self.tell(m.GetServers())
        with self._changed:
            self._changed.wait_for(
                lambda: self._whereabouts or self._away_since is not None or self._is_over(), _ANSWER_S
            )
            if self._is_over():
                raise self._end()
            return self._whereabouts

    def verdict(self) -> HeadwaterError | None:
        """Why the coordinator ended this membership, where it does within a moment; for who was refused by a
        server, which only knows that it did."""
        with self._changed:
            self._changed.wait_for(self._is_over, _VERDICT_S)
            return self._end() if self._refused is not None else None

    def expect(self, servers: Sequence[m.Member], moved: Callable[[], None]) -> None:
        """Have `moved` called, from another thread, when the servers are no longer these, or this is over.

        A server that was stopped keeps its connections open, and one that retired this member owes it no
        answer, so nothing else would tell.
        """
        self._expected = tuple(server.id for server in servers), moved
        if self._is_over():
            moved()

    def watch(self, channels: Callable[[], Iterable[Channel]]) -> None:
        """Close those of the node's other connections whose peer's machine is gone, from now on."""
        self._watched = channels

    @property
    def away_s(self) -> float:
        """For how many seconds the coordinator has been away; 0.0 while it is there."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def beside(self, reason: str) -> str:
        """Why something waits, with the coordinator's absence, without which it might not."""
        seconds = self.away_s
        if not seconds:
            return reason
        return f"{reason or 'waits'}; the coordinator at {self._coordinator} is away for {seconds:.1f} s"

    def close(self) -> None:
        """End the connection, without a word, and the threads; idempotent."""
        self._closed.set()
        with self._changed:
            channels = [one for one in (self._channel, self._calling) if one is not None]
            self._changed.notify_all()
        for channel in channels:
            channel.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # ── what has ended it ───────────────────────────────────────────────────────────────────────

    def _is_over(self) -> bool:
        return self._refused is not None or self._closed.is_set()

    def _end(self) -> HeadwaterError:
        if self._refused is None:
            return ConnectionLostError("this node has left the cluster")
        return named(self._refused.error, self._refused.reason, default=RefusedError)

    # ── in its threads ──────────────────────────────────────────────────────────────────────────

    def _beat(self) -> None:
        now = time.monotonic()
        due = now + self.welcome.heartbeat
        while not self._closed.wait(min(max(due - now, 0.0), _LOOK_S)):
            now = time.monotonic()
            if now >= due:
                due = now + self.welcome.heartbeat
                self.tell(m.GetServers() if self._expected[0] else m.Heartbeat())
            self._life.look(self._watched(), now)
            self._own_life.look((self._channel,), now)

    def _begin_life(self, channel: Channel) -> PeerLiveness:
        """A coordinator that is not heard of for two leases has declared this member dead, or is gone itself;
        before that the connection may recover, and its end would be a death."""
        silence = 6 * self.welcome.heartbeat
        channel.keep_alive(silence)
        return PeerLiveness(silence)

    def _keep(self) -> None:
        """Take what the coordinator says, and have it back when it is away, until this is over."""
        refused = None
        while not self._closed.is_set() and (refused := self._listen()) is None:
            refused = self._call_back()
            if refused is not None:
                break
        with self._changed:
            self._refused = refused
            self._changed.notify_all()
        self._channel.close()
        if refused is not None:
            self._expected[1]()

    def _listen(self) -> m.Refused | None:
        """What ended this membership; None when the connection ended."""
        try:
            while (received := self._channel.receive()) is not None:
                if isinstance(received.message, m.Refused):
                    return received.message
                if isinstance(received.message, m.Finished):
                    return m.Refused("FinishedError", "training has finished")
                self._take(received.message)
        except HeadwaterError as error:
            _log.info("lost the coordinator: %s", error)
        return None

    def _take(self, message: m.AnyMessage) -> None:
        with self._changed:
            if isinstance(message, m.ServerAddresses):
                self._whereabouts = message
            else:
                self._messages.append(message)
            self._changed.notify_all()
        if isinstance(message, m.ServerAddresses):
            self._compare(message)

    def _compare(self, whereabouts: m.ServerAddresses) -> None:
        expected, moved = self._expected
        now = tuple(server.id for server in whereabouts.servers)
        if expected and now != expected and len(now) == len(expected):
            moved()

    def _call_back(self) -> m.Refused | None:
        """Call until the coordinator takes this member back; what it says where it does not, or what there is
        to say where it will not answer any more. None when it is back, or this is closed."""
        member = self.welcome.member
        with self._changed:
            self._away_since = time.monotonic()
            self._changed.notify_all()
        request = m.Rejoin(member.id, self.welcome.key, self.welcome.generation, self.welcome.cluster)
        pause = _FIRST_PAUSE_S
        while not self._closed.wait(pause * random.uniform(0.5, 1.0)):
            try:
                channel, answer = rejoin(self._coordinator, request, own=self._adopt, security=self.security)
            except (HeadwaterError, TimeoutError) as error:
                if self._is_gone(error):
                    return m.Refused("ConnectionLostError", f"the coordinator is gone: {error}")
                if pause == _FIRST_PAUSE_S:
                    _log.warning("%s %d: calls the coordinator: %s", member.role, member.index, error)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if isinstance(answer, m.Refused):
                channel.close()
                return answer
            self._is_back(channel, answer)
            return None
        return None

    def _is_gone(self, error: Exception) -> bool:
        """Whether nobody will answer any more: a coordinator without a journal whose process has ended, or
        that was not heard of for too long. Its machine may only be cut off from this one."""
        if self.welcome.returns:
            return False
        cut_off = isinstance(error, ConnectionLostError | TimeoutError) and not isinstance(
            error.__cause__, NOBODY
        )
        return not cut_off or self.away_s > self.welcome.deadline

    def _adopt(self, channel: Channel) -> Channel:
        """`close` ends this one too from now on; nothing else is sent over it before the answer."""
        with self._changed:
            self._calling = channel
        if self._closed.is_set():
            channel.close()
        return channel

    def _is_back(self, channel: Channel, welcome: m.Welcome) -> None:
        member = self.welcome.member
        _log.warning("%s %d: the coordinator is back after %.1f s", member.role, member.index, self.away_s)
        with self._changed:
            self._channel.close()  # the peer ended it, which does not let go of it here
            self._channel, self._calling = channel, None
            self._own_life = self._begin_life(channel)
            self.connection += 1
            self._away_since = None
            self._messages.append(welcome)
            self._changed.notify_all()
