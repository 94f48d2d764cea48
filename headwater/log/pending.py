"""Pending exchanges: what each present member has outstanding, which servers hold it, how far it has come.

What the sequencer knows beyond the log: it is lost with it, and rebuilt from the servers' reports.

Where an exchange stands is one `Stage`; `MOVES` says which stage may follow which. All that asks for the
exchanges in a stage (steps that may be committed, answers that are withheld, …) reads one index of them.

Invariants:
- An exchange is complete at a connection epoch when every server holds it as it came with that epoch. Once
  it is complete at any, no report takes that back.
- A report of what was answered already, or that comes twice, changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from headwater.log.state import LogState, MemberState
from headwater.messages import ExchangeId, Held, Pace


class Stage(enum.IntEnum):
    """How far a member's exchange has come."""

    IDLE = 0
    """Nothing is outstanding."""
    ARRIVING = 1
    """Some servers hold it."""
    COMPLETE = 2
    """Every server holds it: it is being decided, or waits for all declared workers to have joined."""
    DECLARING = 3
    """A registration waits for the worker that declares the model."""
    MEETING = 4
    """It waits in a meeting."""
    SCHEDULED = 5
    """A checkpoint or publication waits for its version, or for room."""
    RESUMING = 6
    """A step after the end of its worker's batches waits until nobody is active."""
    READY = 7
    """A step may be committed as soon as the mode says so."""
    COMMITTED = 8
    """A step is committed, and its answer withheld until the mode allows it."""
    WORKING = 9
    """Work on vectors waits for what it comes to, or for the evaluation that follows it."""
    ASKING = 10
    """A worker waits for a portion of an evaluation."""


IDLE, ARRIVING, COMPLETE, DECLARING, MEETING, SCHEDULED, RESUMING, READY, COMMITTED, WORKING, ASKING = Stage
"""As plain names: looking one up in its class takes longer than deciding what it means."""

_OVER = frozenset({IDLE, ARRIVING})
"""After its answer an exchange is over, or what has arrived of it in a newer connection epoch remains."""

MOVES: Mapping[Stage, frozenset[Stage]] = {
    IDLE: frozenset({ARRIVING}),
    ARRIVING: _OVER | {COMPLETE},
    COMPLETE: _OVER.union({DECLARING, MEETING, SCHEDULED, RESUMING, READY, COMMITTED, WORKING, ASKING}),
    DECLARING: _OVER,
    MEETING: _OVER,
    SCHEDULED: _OVER,
    RESUMING: _OVER | {READY},
    READY: _OVER | {COMMITTED},
    COMMITTED: _OVER,
    WORKING: _OVER,
    ASKING: _OVER,
}
"""From each stage to those that may follow it."""


@dataclass(slots=True, eq=False)
class PendingExchange:
    """What one member has outstanding; to a mode, the `ReadyStep` of its worker.

    Attributes:
        state: the member's, shared with the log's state.
        held: the exchange, as the first server reported it; None where nothing is outstanding.
        holders: for each connection epoch the servers that hold it, as a bit mask.
        connection_epoch: the newest one at which it is complete.
        since: when it became complete, in seconds.
    """

    member: int
    state: MemberState
    log: LogState
    stage: Stage = IDLE
    held: Held | None = None
    holders: dict[int, int] = field(default_factory=dict)
    connection_epoch: int = 0
    since: float = 0.0

    @property
    def id(self) -> ExchangeId:
        """Names the outstanding exchange."""
        assert self.held is not None
        return ExchangeId(self.member, self.held.number, self.connection_epoch)

    @property
    def what(self) -> str:
        """The outstanding exchange in words."""
        assert self.held is not None
        return self.held.name if self.held.meeting else f"{self.held.kind} {self.held.name}".rstrip()

    @property
    def kind(self) -> str:
        """Of the outstanding exchange; "" where there is none."""
        return self.held.kind if self.held is not None else ""

    @property
    def weight(self) -> float:
        """Of the outstanding step, in a mean."""
        return self.held.weight if self.held is not None else 1.0

    @property
    def pace(self) -> Pace | None:
        return self.held.pace if self.held is not None else None

    @property
    def fragment(self) -> int:
        """The model whose change the outstanding step sends; -1 where it is no outer one."""
        return self.held.fragment if self.held is not None else -1

    @property
    def waits(self) -> bool:
        """Whether the exchange is complete and has no answer yet."""
        return self.stage > ARRIVING

    @property
    def rank(self) -> int:
        return self.state.rank

    @property
    def clock(self) -> int:
        return self.state.clock

    @property
    def missed(self) -> int:
        fragment = self.fragment
        if fragment < 0:
            return self.log.rounds - self.state.round
        return missed_of(fragment, self.state, self.log)


class PendingExchanges:
    """Those of all members present, for `servers` servers.

    Attributes:
        of: by member.
        present: workers among them; waiting: those of them whose exchange is complete and has no answer.
    """

    def __init__(self, servers: int, log: LogState) -> None:
        self.servers = servers
        self.present = 0
        self.waiting = 0
        self.of: dict[int, PendingExchange] = {}
        self._log = log
        self._everybody = (1 << servers) - 1
        self._in: list[dict[int, PendingExchange]] = [{} for _ in Stage]
        self._early: list[tuple[int, Held]] = []
        for member in log.members:
            self.add(member)

    def add(self, member: int) -> None:
        """A member of the log's state takes part from now on."""
        exchange = self.of[member] = PendingExchange(member, self._log.members[member], self._log)
        self._in[exchange.stage][member] = exchange
        self.present += exchange.rank >= 0

    def remove(self, exchange: PendingExchange) -> None:
        """The member is gone, having been answered for the last time."""
        self.present -= exchange.rank >= 0
        del self._in[exchange.stage][exchange.member]
        del self.of[exchange.member]

    def workers(self) -> list[PendingExchange]:
        """All but observers', in rank order."""
        return by_rank(exchange for exchange in self.of.values() if exchange.rank >= 0)

    # ── stages ──────────────────────────────────────────────────────────────────────────────────

    def move(self, exchange: PendingExchange, stage: Stage) -> None:
        """It has come so far now."""
        before = exchange.stage
        assert stage in MOVES[before], f"{exchange.what} of member {exchange.member}: {before!r} → {stage!r}"
        del self._in[before][exchange.member]
        self._in[stage][exchange.member] = exchange
        exchange.stage = stage
        if exchange.state.rank >= 0:
            self.waiting += (stage > ARRIVING) - (before > ARRIVING)

    def count(self, stage: Stage) -> int:
        """How many are in a stage."""
        return len(self._in[stage])

    def at(self, stage: Stage) -> list[PendingExchange]:
        """Those in a stage, in rank order."""
        there = self._in[stage]
        return by_rank(there.values()) if there else []

    def all_wait(self) -> bool:
        """Whether every worker waits, and there is one."""
        return self.waiting > 0 and self.waiting == self.present

    # ── what servers hold ───────────────────────────────────────────────────────────────────────

    def hear(self, server: int, held: Iterable[Held], now: float) -> Iterator[PendingExchange]:
        """Note what `server` holds; yields each exchange that became complete with that, at its first or a
        newer connection epoch.

        A member that is not here is gone, or will be enrolled: what is held of the latter is kept until then.
        """
        for one in held:
            exchange = self.of.get(one.member)
            if exchange is None and one.member > self._log.newest:
                self._early.append((server, one))
            elif exchange is not None and self.hold(exchange, server, one):
                if not exchange.waits:
                    exchange.since = now
                    self.move(exchange, COMPLETE)
                yield exchange

    def hear_early(self, now: float) -> Iterator[PendingExchange]:
        """Once more what was held of members who were not here: servers may know of a newcomer before."""
        early, self._early = self._early, []
        for server, one in early:
            yield from self.hear(server, (one,), now)

    def hold(self, exchange: PendingExchange, server: int, held: Held) -> bool:
        """Note that `server` holds this; whether all servers do with it, at its first or a newer connection
        epoch.
        """
        state = exchange.state
        if (held.number, held.connection_epoch) <= (state.answered, state.connection_epoch):
            return False
        if exchange.held is None or held.number > exchange.held.number:
            if exchange.waits:
                return False
            exchange.held, exchange.holders = held, {}
            if exchange.stage is IDLE:
                self.move(exchange, ARRIVING)
        elif held.number < exchange.held.number:
            return False
        before = exchange.holders.get(held.connection_epoch, 0)
        after = exchange.holders[held.connection_epoch] = before | 1 << server
        if before == after or after != self._everybody:
            return False
        newest = max(exchange.connection_epoch, held.connection_epoch)
        exchange.connection_epoch = newest if exchange.waits else held.connection_epoch
        return True

    def end(self, exchange: PendingExchange) -> None:
        """It is answered; what is known of newer connection epochs, which need an answer too, stays."""
        newer: dict[int, int] = {}
        if len(exchange.holders) > 1:
            newer = {
                epoch: mask for epoch, mask in exchange.holders.items() if epoch > exchange.connection_epoch
            }
        if exchange.stage is not IDLE:
            self.move(exchange, ARRIVING if newer else IDLE)
        exchange.holders = newer
        if not newer:
            exchange.held = None

    def missing(self, exchange: PendingExchange) -> list[int]:
        """The servers that do not hold the outstanding exchange yet, at the epoch that most hold."""
        most = max(exchange.holders.values(), key=int.bit_count, default=0)
        return [server for server in range(self.servers) if not most >> server & 1]


class ReadySteps:
    """The steps that may be committed, as a mode sees them; always those of now."""

    def __init__(self, exchanges: PendingExchanges, log: LogState) -> None:
        self._exchanges = exchanges
        self._log = log

    @property
    def active(self) -> int:
        return len(self._log.clocks)

    def current(self, fragment: int) -> int:
        """How many active workers have the values of the fragment's last commit."""
        active = (state for state in self._log.members.values() if state.phase == "active")
        return sum(not missed_of(fragment, state, self._log) for state in active)

    def __len__(self) -> int:
        return self._exchanges.count(READY)

    def __iter__(self) -> Iterator[PendingExchange]:
        return iter(self._exchanges.at(READY))


def missed_of(fragment: int, state: MemberState, log: LogState) -> int:
    """Commits of a fragment since a member got its values last."""
    return log.fragments.get(fragment, 0) - state.fragments.get(fragment, 0)


def by_rank(exchanges: Iterable[PendingExchange]) -> list[PendingExchange]:
    """In rank order."""
    found = list(exchanges)
    if len(found) > 1:
        found.sort(key=lambda exchange: exchange.state.rank)
    return found


def ids(exchanges: Iterable[PendingExchange]) -> tuple[ExchangeId, ...]:
    """Of these outstanding exchanges."""
    return tuple([exchange.id for exchange in exchanges])


def weights_of(steps: Iterable[PendingExchange]) -> tuple[float, ...]:
    """What each of these counts in a mean; empty where each counts 1."""
    weights = [step.weight for step in steps]
    return () if weights.count(1.0) == len(weights) else tuple(weights)
