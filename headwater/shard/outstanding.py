"""What a server has of members beyond the log: their outstanding exchanges and the memory they share.

A standby has nothing here. All of it is lost with a server, and comes again with the members' next attempt.

Invariants:
- A member has one exchange outstanding at a time; it may come again, under its number, in a newer
  connection epoch.
- Once a member has connected as connection epoch k, nothing of an older connection epoch is answered, and
  no memory written for
  it: its window may be mapped by nobody any more. What it staged counts all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError
from headwater.shard.snapshot import ShardSnapshot
from headwater.shard.staging import Array, Staging
from headwater.shard.tables import StagedRows

_NONE: dict[int, Staging] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Outstanding:
    """A member's exchange, held here. `rows`: of each `Rows` of the request, in its order."""

    held: m.Held
    request: m.Request
    staging: Staging | None = None
    rows: Sequence[StagedRows] = ()

    def pushed(self) -> Sequence[StagedRows]:
        """Of a step: its gradients."""
        return self.rows[: len(self.request.pushed)] if isinstance(self.request, m.Step) else ()

    def pulled(self) -> Sequence[StagedRows]:
        """The rows that its answer brings."""
        if isinstance(self.request, m.Step):
            return self.rows[len(self.request.pushed) :]
        return self.rows if isinstance(self.request, m.PullRows) else ()


class Members:
    """By member: attempt, outstanding exchange, stagings, and what was made for its last answer."""

    def __init__(self) -> None:
        self._connection_epochs: dict[int, int] = {}
        self._outstanding: dict[int, Outstanding] = {}
        self._stagings: dict[int, dict[int, Staging]] = {}
        self._copies: dict[int, list[NDArray[Any]]] = {}
        self._snapshots: dict[int, ShardSnapshot] = {}

    def reconnected(self, member: int, connection_epoch: int) -> None:
        """From now on nothing of an older connection epoch is taken or answered.

        Raises:
            RefusedError: a newer connection epoch is known.
        """
        known = self._connection_epochs.get(member, 0)
        if connection_epoch < known:
            raise RefusedError(
                f"connection epoch {connection_epoch} of member {member} is over: "
                f"the member has connected again as epoch {known}"
            )
        self._connection_epochs[member] = connection_epoch

    def check(self, member: int, number: int, connection_epoch: int) -> None:
        """Refuse an exchange beside the one that is outstanding.

        Raises:
            ProtocolError: another one, or the same in the same connection epoch, is not answered yet.
        """
        held = self._outstanding.get(member)
        if held is not None and (
            number != held.held.number or connection_epoch == held.held.connection_epoch
        ):
            raise ProtocolError(f"member {member} sent {number} before {held.held.number} was answered")

    def hold(self, exchange: Outstanding) -> None:
        """Keep an exchange that was checked until it is answered."""
        self._outstanding[exchange.held.member] = exchange

    def all_held(self) -> tuple[m.Held, ...]:
        """Every exchange outstanding."""
        return tuple(exchange.held for exchange in self._outstanding.values())

    def of(self, ticket: m.ExchangeId) -> Outstanding:
        """The exchange that an entry names.

        Raises:
            ProtocolError: it is not held here, so no entry may name it.
        """
        held = self._outstanding.get(ticket.member)
        if held is None or held.held.number != ticket.number:
            raise ProtocolError(f"an entry names exchange {ticket}, which this server does not hold")
        return held

    def holds(self, ticket: m.ExchangeId) -> bool:
        """Whether the exchange is outstanding here, in whichever connection epoch."""
        held = self._outstanding.get(ticket.member)
        return held is not None and held.held.number == ticket.number

    def reader(self, ticket: m.ExchangeId) -> Outstanding | None:
        """The exchange, where the member can be answered here: it has not connected again since."""
        held = self._outstanding.get(ticket.member)
        if held is None or held.held.number != ticket.number:
            return None
        return held if self._connection_epochs[ticket.member] <= ticket.connection_epoch else None

    def readers(self, tickets: Sequence[m.ExchangeId]) -> list[Outstanding]:
        """Those of the exchanges whose members can be answered here."""
        return [held for ticket in tickets if (held := self.reader(ticket)) is not None]

    def end(self, ticket: m.ExchangeId) -> bool:
        """The exchange is answered; whether the member can be told here."""
        held = self._outstanding.get(ticket.member)
        if (
            held is None
            or held.held.number != ticket.number
            or held.held.connection_epoch > ticket.connection_epoch
        ):
            return False
        del self._outstanding[ticket.member]
        return self._connection_epochs[ticket.member] <= ticket.connection_epoch

    def forget(self, member: int) -> bool:
        """The member is gone for good; whether it waits for an answer here, which it will not get."""
        waits = member in self._outstanding
        for kept in (
            self._connection_epochs,
            self._outstanding,
            self._stagings,
            self._copies,
            self._snapshots,
        ):
            kept.pop(member, None)
        return waits

    # ── memory ──────────────────────────────────────────────────────────────────────────────────

    def staging(self, member: int, model: int) -> Staging:
        """Where the member's part of `model` is staged.

        Raises:
            ProtocolError: there is no such model, or the member has not registered it.
        """
        mine = self._stagings.get(member, _NONE)
        if model not in mine:
            raise ProtocolError(
                f"member {member} named model {model}, but has registered only {sorted(mine)}"
            )
        return mine[model]

    def staged(self, member: int, model: int) -> Array:
        """What the member's outstanding exchange brought of a model: values to assign, otherwise gradients.

        Raises:
            ProtocolError: as `staging`.
        """
        staging, held = self.staging(member, model), self._outstanding.get(member)
        return staging.parameters if held and isinstance(held.request, m.Assign) else staging.gradients

    def stagings(self, member: int) -> dict[int, Staging]:
        """By model."""
        return self._stagings.get(member, {})

    def stage(self, member: int, model: int, staging: Staging) -> None:
        """From now on the member's part of a model is staged here."""
        self._stagings.setdefault(member, {})[model] = staging

    def keep_copies(self, member: int, copies: list[NDArray[Any]]) -> None:
        """Keep arrays made for the member's answer until they are taken."""
        self._copies[member] = copies

    def take_copies(self, member: int) -> list[NDArray[Any]]:
        """Those arrays, once; the caller's then."""
        return self._copies.pop(member, [])

    def keep_snapshot(self, member: int, snapshot: ShardSnapshot) -> None:
        """Keep what the member asked for until it is taken."""
        self._snapshots[member] = snapshot

    def take_snapshot(self, member: int) -> ShardSnapshot | None:
        """That snapshot, once; the caller's then."""
        return self._snapshots.pop(member, None)
