"""A member's connections to all servers: made together, dropped together, told apart by their epoch.

Theory of operation. Each set of connections is a *connection epoch*. The connections are in one of these
stages:

                   ┌───────────────────── seek, when somebody waits ◀────────────────────┐
                   ▼                                                                     │
    apart ──▶ locating ──addresses──▶ dialling ──all opened──▶ connected ──one lost──▶ apart
                 ▲                       │
                 └──pause over── pausing ◀── one unreachable, or a server is missing

- *apart*: no connections.
- *locating*: the coordinator was asked where the servers are. The first set goes to where Welcome said.
  While the coordinator is away, or when it does not answer, the servers are looked for where they were
  last.
- *dialling*: server after server. Each is told who this is (Hello) and given the memory that it may use.
- *pausing*: a server is not there, and the coordinator does not know it yet. Pauses grow.
- *connected*: to every server. A set that is lost before anything came over it is followed by a pause, like
  an attempt that failed.

A server that was replaced may still be in the middle of a pass over this member's memory, and write to it
when it goes on. So memory that was given away over dropped connections is renewed before the next set is
made: same content, same addresses, and nobody else has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from headwater import messages as m
from headwater.machines.actions import Actions, Close, Conn, Dial, Note, Send, Tell
from headwater.machines.membership import Membership

LOCATE_S = 10.0
"""How long the coordinator may take to say where the servers are, in seconds."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Between attempts to connect to all servers."""

Stage: TypeAlias = Literal["apart", "locating", "dialling", "pausing", "connected"]

_GONE = "a server is gone, and nobody has taken over yet"


class Outgoing(Protocol):
    """What one server is sent: a message, the arrays that follow it, and memory that travels with it."""

    @property
    def message(self) -> m.AnyMessage: ...
    @property
    def buffers(self) -> Sequence[Any]: ...
    @property
    def descriptors(self) -> Sequence[Any]: ...


class Frame(NamedTuple):
    """An `Outgoing`."""

    message: m.AnyMessage
    buffers: Sequence[Any] = ()
    descriptors: Sequence[Any] = ()


class Buffer(Protocol):
    """Memory of this member that servers may read from and write to."""

    def renew(self) -> None:
        """Go on in memory with the same content that nobody else has."""

    def offer(self, server: int, shared: bool, anew: bool) -> Outgoing | None:
        """What tells a server which memory to use; None where it knows, or need not.

        `shared`: memory can travel over the connection. `anew`: it is a new one, so the server knows nothing.
        """


class Connected(NamedTuple):
    """Event: there is a connection to every server, in the order of `ServerConnections.links`."""


class Renewal(NamedTuple):
    """Event: every one of `ServerConnections.buffers` must be renewed before anything else is done."""


class ServerConnections:
    """Of the member with this membership.

    Attributes:
        stage: as above. links: the connections, by server.
        shares: by server, whether memory can be shared with it; may change with the connections.
        epoch: counts the sets of connections, from 0; -1 before the first.
        buffers: what servers share with this member.
        fruitful: whether anything has come over these connections.
        reason: why there are none yet; "" where nobody knows.
        due: when `tick` should come.
    """

    def __init__(self, membership: Membership) -> None:
        self.stage: Stage = "apart"
        self.links: list[Conn] = []
        self.shares: list[bool] = []
        self.epoch = -1
        self.buffers: list[Buffer] = []
        self.fruitful = False
        self.reason = ""
        self.due: float | None = None
        self._membership = membership
        self._servers: tuple[m.Member, ...] = ()
        self._term = 0
        self._shares: list[bool] = []
        self._given_away = False
        self._pause_s = FIRST_PAUSE_S
        self._noted_at = 0.0

    def seek(self, now: float) -> Actions:
        """Connect to wherever the servers are now."""
        if self.epoch < 0:
            welcome = self._membership.welcome
            self._servers, self._term, self._noted_at = welcome.servers, welcome.term, now
            return self._dial_all(now)
        if self._membership.phase != "member":
            return self._dial_all(now)
        self.stage, self.due = "locating", now + LOCATE_S
        return self._membership.tell(m.GetServers())

    def located(self, addresses: m.ServerAddresses, now: float, *, wanted: bool) -> Actions:
        """The coordinator has said where the servers are. `wanted`: somebody waits for them."""
        if self.stage == "locating":
            self._servers, self._term = addresses.servers, addresses.term
            return self._dial_all(now)
        moved = [server.id for server in addresses.servers] != [server.id for server in self._servers]
        complete = len(addresses.servers) == len(self._membership.welcome.servers)
        if self.stage != "connected" or not moved or not complete:
            return []
        self._servers, self._term, self._noted_at = addresses.servers, addresses.term, now
        return self.drop() + (self._dial_all(now) if wanted else [])

    def coordinator_lost(self, now: float) -> Actions:
        """The coordinator is away, and will not say where the servers are."""
        return self._dial_all(now) if self.stage == "locating" else []

    def opened(self, conn: Conn, dialled: str | None, *, shared: bool) -> Actions:
        """A connection exists. `shared`: memory can travel over it."""
        if self.stage != "dialling" or dialled != self._tag():
            return [Close(conn)]
        server, welcome = len(self.links), self._membership.welcome
        member = welcome.member
        assert member.role in ("worker", "observer")
        self.links.append(conn)
        self._shares.append(shared)
        self._given_away = True
        hello = m.Hello(member.id, member.role, self._term, self.epoch, welcome.cluster)
        actions: Actions = [Send(conn, hello)]
        for buffer in self.buffers:
            actions += offered(buffer, conn, server, shared, anew=True)
        if len(self.links) < len(self._servers):
            return [*actions, self._dial()]
        self.stage, self.due, self.fruitful, self.shares = "connected", None, False, self._shares
        self._membership.watching = True
        return [*actions, Tell(Connected())]

    def is_wanted(self, dialled: str | None) -> bool:
        """Whether what was dialled with this tag is still waited for."""
        return self.stage == "dialling" and dialled == self._tag()

    def unreachable(self, why: str, now: float) -> Actions:
        """The server that was dialled cannot be connected to."""
        return self._pause(now, why)

    def lost(self, now: float, *, wanted: bool) -> Actions:
        """One of the connections has ended, and with it all. `wanted`: somebody waits for them."""
        if self.stage == "connected":
            self._noted_at = now
        fruitful = self.fruitful
        actions = self.drop()
        if fruitful:
            self._pause_s = FIRST_PAUSE_S
        if not wanted:
            return actions
        return actions + (self.seek(now) if fruitful else self._pause(now, _GONE))

    def drop(self) -> Actions:
        """Let go of all connections."""
        closes: Actions = [Close(conn) for conn in self.links]
        self.links, self._shares = [], []
        self.stage, self.due, self.fruitful = "apart", None, False
        self._membership.watching = False
        return closes

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        if self.due is None or now < self.due:
            return []
        return self._dial_all(now) if self.stage == "locating" else self.seek(now)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _dial_all(self, now: float) -> Actions:
        self.epoch += 1
        if len(self._servers) < len(self._membership.welcome.servers):
            return self._pause(now, _GONE)
        renewal: Actions = [Tell(Renewal())] if self._given_away else []
        self.stage, self.due, self._given_away = "dialling", None, False
        return [*renewal, self._dial()]

    def _dial(self) -> Dial:
        return Dial(self._servers[len(self.links)], self._tag())

    def _tag(self) -> str:
        """Of the connection that is made now."""
        return f"server {len(self.links)}, connection epoch {self.epoch}"

    def _pause(self, now: float, reason: str) -> Actions:
        actions = self.drop()
        self.stage, self.due, self.reason = "pausing", now + self._pause_s, reason
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        membership = self._membership
        if now - self._noted_at > membership.welcome.patience:
            self._noted_at = now
            actions.append(Note(f"{membership.name}: {membership.beside(reason, now)}", "warning"))
        return actions


def offered(buffer: Buffer, conn: Conn, server: int, shared: bool, *, anew: bool) -> Actions:
    """What a buffer has to offer over this connection, if anything."""
    offer = buffer.offer(server, shared, anew)
    return [] if offer is None else [Send(conn, offer.message, offer.buffers, 0, offer.descriptors)]
