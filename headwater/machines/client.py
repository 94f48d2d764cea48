"""A member's side of a cluster: joining, connecting, exchanging, being away, repeating, leaving.

Theory of operation. A member has a connection to the coordinator (`Membership`), one to each server
(`ServerConnections`), and at most one exchange outstanding: a request to every server, and an answer from
each (`Exchange`). What the three parts do is described in their modules. This is how they couple:

- The first connections to servers are made when the coordinator has taken this member in. Later ones are
  made when they are needed: while an exchange waits.
- A lost connection to a server drops all of them. If an exchange is outstanding it is *repeated* over the
  next ones, with the same number, and no answer of before counts. A step that was committed already is
  answered again and never applied again, so repeating is always safe.
- Addresses that are others than those connected to count as a lost connection. The coordinator says them
  with every heartbeat.
- While the coordinator is away exchanges go on. When the membership is over, everything is: the outstanding
  exchange fails with what the coordinator said.
- A server that refuses this member only knows that the roster has it no more. The coordinator is given a
  moment to say why (*judging*) before the refusal counts. A member that is leaving has left already.
- An exchange that has waited for the deadline fails with StalledError. That is final, and so is every error
  but what the servers refuse a request with: frames may be half sent, and this member's memory is with the
  servers.

Answers of all servers come from one position of the log, so they must agree, and an exchange is over when
the last has come. Reads are answered outside the log, and asked again until they agree
(`headwater.machines.current_read`). Why it waits, the servers say (Waiting). Server 0 has the sequencer and
knows best; but a server that says nothing, while others do, is what everybody waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from headwater import messages as m
from headwater.errors import (
    ConnectionLostError,
    HeadwaterError,
    ProtocolError,
    RefusedError,
    StalledError,
    UsageError,
)
from headwater.machines.actions import Actions, Conn, Note, Tell
from headwater.machines.connections import Buffer, Outgoing, ServerConnections, offered
from headwater.machines.current_read import CurrentRead
from headwater.machines.exchange import AnyAnswer, Exchange, Outcome
from headwater.machines.membership import COORDINATOR, Joined, Membership, Returned
from headwater.machines.split_request import SplitRequests

_new = tuple.__new__  # a NamedTuple's own constructor takes twice the time, and this is a step's way

VERDICT_S = 2.0
"""How long the coordinator may take to say why a server refused this member, in seconds."""


@dataclass(slots=True, eq=False)
class Call:
    """A request to every server.

    Attributes:
        what: the user's verb, for errors.
        frame: given a server and the exchange's number: what it is sent; asked again when it is repeated.
        place: given a server and its answer: where the payload goes; None where it is models' values.
        expects: the class of the answers.
        memory: offers what it has to offer before the request leaves, as the request refers to it.
        leaves: with this the member leaves. A server that does not know it has let it go already.
    """

    what: str
    frame: Callable[[int, int], Outgoing]
    place: Callable[[int, Any], Sequence[Any]] | None = None
    expects: type[AnyAnswer] = m.Answer
    memory: Buffer | None = None
    leaves: bool = False


class Asked(NamedTuple):
    """Event: `frames[i]` is to leave over `links[i]`, with `number` as its request, for all servers together.

    Nothing happens where these connections have ended.
    """

    links: list[Conn]
    frames: list[Outgoing]
    number: int


class Settled(NamedTuple):
    """Event: every server has answered. `error`: what the servers refused the request with."""

    outcome: Outcome | None
    error: HeadwaterError | None = None


class Failed(NamedTuple):
    """Event: this member can make no further exchange."""

    error: HeadwaterError


class ClientMachine:
    """One member. `deadline`: seconds for an exchange, by default the cluster's; infinite for none.

    Attributes:
        membership, connections, splits: its parts.
        servers: how many there are. deadline: seconds that an exchange may take.
        number: of the last exchange. version: of the last answer; never decreases.
        receivers: by model id, where values arrive.
        failure: why no further exchange can be made; None while one can.
        until: when the outstanding exchange, or the first connection, has waited for the deadline.
        call_due: when `tick` should come for the sake of who waits.
    """

    def __init__(self, coordinator: str, join: m.Join, *, deadline: float | None = None) -> None:
        self.membership = Membership(coordinator, join)
        self.connections = ServerConnections(self.membership)
        self.splits = SplitRequests(self.membership)
        self.number = 0
        self.version = 0
        self.receivers: dict[int, Callable[[int], Sequence[Any]]] = {}
        self.failure: HeadwaterError | None = None
        self.servers = 0
        self.deadline = math.inf if deadline is None else deadline
        self._own_deadline = deadline is not None
        self._connecting = False  # somebody waits for the first connections
        self.until: float | None = None
        self._call: Call | None = None
        self._exchange: Exchange | None = None
        self._read = CurrentRead()
        self._refusal: RefusedError | None = None
        self._verdict_at: float | None = None
        self._finishing = False

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    @property
    def due(self) -> float | None:
        """When `tick` should come."""
        return _earliest(self.membership.due, self.call_due)

    @property
    def call_due(self) -> float | None:
        """As documented above."""
        away = self._finishing and self.membership.phase == "away"
        patience = self.membership.gives_up_at if away else None
        return _earliest(self.until, self._verdict_at, self.connections.due, self.splits.due, patience)

    @property
    def shares(self) -> list[bool]:
        """By server, whether memory can be shared with it; may change with the connections."""
        return self.connections.shares

    # ── what the member does ────────────────────────────────────────────────────────────────────

    def join(self, now: float, *, dial: bool = True) -> Actions:
        """Become a member, and connect to all servers. `dial` False: the driver opens the connection."""
        self._connecting = True
        return self.membership.join(now, dial=dial)

    def call(self, call: Call, now: float) -> Actions:
        """Begin an exchange, and wait for it."""
        actions = self.begin(call, now)
        if self._exchange is not None:
            self.until = None if self.deadline == math.inf else now + self.deadline
        return actions

    def begin(self, call: Call, now: float) -> Actions:
        """Send a request, and do not count the time until `wait`.

        Raises:
            UsageError: another exchange is outstanding, as another thread waits for it; nothing changes.
        """
        if self._exchange is not None:
            raise UsageError(
                f"{call.what}: another thread of this process is in an exchange of the same worker: a Worker "
                "is used by one thread at a time"
            )
        assert self.failure is None, self.failure
        if self.membership.error is not None:
            return self._fail(self.membership.error)
        number = self.number + 1
        connected = self.connections.stage == "connected"
        actions = self._ask(call, number) if connected else []
        self.number, self._call, self._exchange = number, call, Exchange(number, self.servers, call.expects)
        return actions if connected else self.connections.seek(now)

    def wait(self, now: float) -> Actions:
        """The time of what is outstanding counts from now on."""
        self._wait(now)
        return []

    def withdraw(self) -> Actions:
        """Forget the request that was begun last: none of it has left."""
        self.number -= 1
        self._done()
        return []

    def unanswered(self) -> list[int] | None:
        """The servers whose answer to what is outstanding is still out; None where all are, or nothing is."""
        exchange = self._exchange
        return None if exchange is None or exchange.missing == self.servers else exchange.unanswered()

    def next_split(self, lease: m.Lease, now: float) -> Actions:
        """Ask the coordinator for a split of a data set."""
        return self.splits.ask(lease, now)

    def hang_up(self) -> Actions:
        """Close the connections to servers: there is no exchange to come."""
        return self.connections.drop()

    def finish(self) -> Actions:
        """Having left the log, wait until all others have too: until the membership is over."""
        self._finishing = True
        return self.hang_up() + self.membership.tell(m.Finished(self.membership.welcome.member.id))

    def leave(self, finished: bool) -> Actions:
        """Having left the log, leave the cluster. `finished`: nobody need take this member's place."""
        member = self.membership.welcome.member.id
        return self.membership.tell(m.Departed(member, finished)) + self.close()

    def close(self) -> Actions:
        """End every connection without another word; an outstanding exchange ends as if they were lost."""
        outstanding = self._wanted
        actions = self.connections.drop() + self.membership.leave()
        assert self.membership.error is not None
        return actions + (self._fail(self.membership.error) if outstanding else [])

    def fail(self, error: HeadwaterError) -> Actions:
        """The driver cannot go on."""
        return self._fail(error)

    def place(self, server: int, answer: m.Answer | m.Publication) -> Sequence[Any]:
        """Where the payload of an answer goes that belongs to the outstanding exchange."""
        call = self._call
        if call is None or answer.number != self.number:
            return ()
        if call.place is not None:
            return call.place(server, answer)
        return self.values(server, answer) if isinstance(answer, m.Answer) else ()

    def values(self, server: int, answer: m.Answer) -> list[Any]:
        """Where the models' values of an answer go."""
        return [part for model in answer.values for part in self.receivers[model](server)]

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, dialled: str | None, now: float, *, shared: bool = False) -> Actions:
        """A connection exists. `shared`: memory can travel over it."""
        if dialled == COORDINATOR:
            return self.membership.opened(conn, dialled, now)
        completes = self.connections.is_wanted(dialled)
        actions = self.connections.opened(conn, dialled, shared=shared)
        if not completes or self.connections.stage != "connected":
            return actions
        if self._call is None:
            self._connecting, self.until = False, None
            return actions
        self._exchange = Exchange(self.number, self.servers, self._call.expects)
        return actions + self._ask(self._call, self.number)

    def unreachable(
        self,
        dialled: str,
        why: str,
        now: float,
        *,
        error: HeadwaterError | None = None,
        nobody: bool = False,
        refused: bool = False,
    ) -> Actions:
        """A `Dial` failed. `error`: as the caller should see it, where that is known."""
        if dialled == COORDINATOR:
            actions = self.membership.unreachable(
                dialled, why, now, error=error, nobody=nobody, refused=refused
            )
            return self._followed(actions, now)
        error = error or (RefusedError(why) if refused else ConnectionLostError(why))
        if not self.connections.is_wanted(dialled):
            return []
        if not isinstance(error, ConnectionLostError):
            return self._fail(error)
        return self.connections.unreachable(why, now)

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """A message came; its payload lies where `place` said."""
        links = self.connections.links
        if conn not in links:
            return self._told(conn, message, now)
        server = links.index(conn)
        self.connections.fruitful = True
        exchange = self._exchange
        if exchange is None:
            return self._fail(ProtocolError(f"server {server} sent {message!r}, and nothing was asked"))
        try:
            if not exchange.received(server, message, now):
                return self._word(exchange, server, now)
        except RefusedError as error:
            return self._judge(error, now)
        except HeadwaterError as error:
            return self._fail(error)
        return [] if exchange.missing else self._settle(exchange)

    def failed(self, conn: Conn, error: HeadwaterError, now: float) -> Actions:
        """What came over a connection breaks the protocol."""
        return self._fail(error)

    def closed(self, conn: Conn, now: float) -> Actions:
        """A connection has ended, by either side."""
        if conn in self.connections.links:
            return self.connections.lost(now, wanted=self._wanted)
        return self._followed(self.membership.closed(conn, now), now)

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        membership = self.membership
        actions = self._followed(membership.tick(now), now)
        if self._finishing and membership.phase == "away" and now >= membership.gives_up_at:
            seconds = membership.away_s(now)
            why = f"has been away for {seconds:.0f} s: whether its work is safe nobody can tell"
            lost = ConnectionLostError(f"{membership.name} has finished, but its coordinator {why}")
            actions += self._followed(membership.give_up(lost), now)
        actions += self.splits.tick(now)
        if self._verdict_at is not None and now >= self._verdict_at and self._refusal is not None:
            return actions + self._fail(self._refusal)
        if self.until is not None and now >= self.until:
            return actions + self._fail(self._stalled(now))
        return actions + self.connections.tick(now)

    # ── the coordinator ─────────────────────────────────────────────────────────────────────────

    def _told(self, conn: Conn, message: m.AnyMessage, now: float) -> Actions:
        """The coordinator said something."""
        membership = self.membership
        if conn == membership.conn and membership.phase == "member":
            if isinstance(message, m.Leased | m.Unleased):
                return self.splits.received(message)
            if not isinstance(message, m.ServerAddresses | m.Refused | m.Finished | m.RecordTrace):
                wrong = ProtocolError(f"the coordinator sent {type(message).__name__}")
                return self._followed(membership.give_up(wrong), now)
        actions = self._followed(membership.received(conn, message, None, now), now)
        if isinstance(message, m.ServerAddresses) and message is membership.addresses:
            actions += self.connections.located(message, now, wanted=self._wanted)
        return actions

    def _followed(self, actions: Actions, now: float) -> Actions:
        """What the membership does, and what follows from that for all else."""
        membership = self.membership
        for event in [action.event for action in actions if isinstance(action, Tell)]:
            if isinstance(event, Joined):
                self.servers = len(event.welcome.servers)
                if not self._own_deadline:
                    self.deadline = event.welcome.deadline
                self._wait(now)
                actions += self.connections.seek(now)
            elif isinstance(event, Returned):
                actions += self.splits.returned()
                if self._finishing:
                    actions += membership.tell(m.Finished(membership.welcome.member.id))
        if membership.error is not None:
            wanted = self._wanted
            actions += self.splits.ended(membership.error)
            return actions + (self._fail(membership.error) if wanted else self.connections.drop())
        if membership.phase == "away":
            actions += self.connections.coordinator_lost(now)
        return actions

    # ── an exchange ─────────────────────────────────────────────────────────────────────────────

    def _wait(self, now: float) -> None:
        if self._exchange is not None or self._connecting:
            self.until = None if self.deadline == math.inf else now + self.deadline

    @property
    def _wanted(self) -> bool:
        """Whether somebody waits for the servers."""
        return self._connecting or self._exchange is not None

    def _ask(self, call: Call, number: int) -> Actions:
        """The request to every server."""
        actions: Actions = []
        links = self.connections.links
        if call.memory is not None:
            for server, conn in enumerate(links):
                shared = self.connections.shares[server]
                actions += offered(call.memory, conn, server, shared, anew=False)
        frames = [call.frame(server, number) for server in range(len(links))]
        frames = self._read.frames(frames)
        actions.append(_new(Tell, (_new(Asked, (links, frames, number)),)))
        return actions

    def _word(self, exchange: Exchange, server: int, now: float) -> Actions:
        """A server says why there is no answer yet. Only the lowest that speaks is noted: it knows best."""
        membership = self.membership
        if membership.welcome.member.role != "worker" or server != min(exchange.words):
            return []
        reason = exchange.words[server][1]
        return [Note(f"{membership.name}: {membership.beside(reason, now)}", "warning")]

    def _settle(self, exchange: Exchange) -> Actions:
        if self._read.unordered and not self._read.agree(exchange.versions(), self.version):
            assert self._call is not None
            self._exchange = Exchange(self.number, self.servers, self._call.expects)
            return self._ask(self._call, self.number)
        try:
            outcome = exchange.outcome()
        except (StalledError, ProtocolError) as error:
            return self._fail(error)
        except HeadwaterError as error:
            self._done()
            return [Tell(Settled(None, error))]
        self._done()
        if isinstance(outcome, m.Answer) and outcome.version > self.version:
            self.version = outcome.version
        return [_new(Tell, (_new(Settled, (outcome, None)),))]

    def _done(self) -> None:
        self._call = self._exchange = self.until = self._verdict_at = None
        self._read.over()
        self._connecting = False

    def _judge(self, refusal: RefusedError, now: float) -> Actions:
        """A server does not know this member, or not any more."""
        if self._call is not None and self._call.leaves:
            return self._fail(refusal)
        self._refusal, self._verdict_at, self.until = refusal, now + VERDICT_S, None
        return self.connections.drop()

    def _fail(self, error: HeadwaterError) -> Actions:
        """No further exchange can be made."""
        call = self._call
        actions = self.connections.drop()
        self._done()
        self.failure = error
        if call is not None and call.leaves and isinstance(error, RefusedError):
            left = f"{self.membership.name} had left already: {error}"
            return [*actions, Note(left), Tell(Settled(None))]
        return [*actions, Tell(Failed(error))]

    # ── why it waits ────────────────────────────────────────────────────────────────────────────

    def _stalled(self, now: float) -> StalledError:
        what = self._call.what if self._call is not None else "connecting to the servers"
        why = self.membership.beside(self._why(now), now)
        return StalledError(f"{what} had no answer for {self.deadline:g} s: {why}")

    def _why(self, now: float) -> str:
        """What holds things up, as far as anybody has said; a server that answers is not to blame."""
        if self.connections.stage != "connected" or self._exchange is None:
            return self.connections.reason or "the coordinator does not say where the servers are"
        unanswered, words = self._exchange.unanswered(), self._exchange.words
        patience = self.membership.welcome.patience
        heard = {server: word for server, (at, word) in words.items() if now - at <= 2 * patience}
        silent = [server for server in unanswered if server not in heard]
        said = heard[min(heard)] if heard else ""
        if not silent:
            return said
        if not heard and len(unanswered) == self.servers and self.deadline <= patience:
            return f"no server has said for whom: they do after patience={patience:g} s, which is no shorter"
        silence = f"no word from server{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
        return f"{silence}; {said}" if said else silence


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
