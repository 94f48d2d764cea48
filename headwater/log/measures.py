"""Gradients whose norm a commit needs: who is measured together, and what the servers have said of it.

Lost with the sequencer, and asked anew by the next one. Invariant: a measurement counts for exactly those
whose exchanges it was made of, so nobody who comes or goes meanwhile makes a norm wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from headwater.log.norms import norm
from headwater.log.pending import PendingExchange
from headwater.messages import Sum, Sums

_Key: TypeAlias = tuple[tuple[int, int], ...]
"""Member and number of each exchange."""


@dataclass(slots=True, eq=False)
class _Measure:
    key: _Key
    position: int
    parts: dict[int, tuple[Sum, ...]] = field(default_factory=dict)


class Measures:
    """For `servers` servers."""

    def __init__(self, servers: int) -> None:
        self._servers = servers
        self._of: dict[int, _Measure] = {}
        self._at: dict[int, _Measure] = {}

    def __bool__(self) -> bool:
        """Whether a server has yet to say something, so that what everybody waits for may still come."""
        return any(len(measure.parts) < self._servers for measure in self._at.values())

    def under_way(self, exchanges: Sequence[PendingExchange]) -> bool:
        """Whether servers have been asked for the norms of exactly these."""
        measure = self._of.get(exchanges[0].member)
        return measure is not None and measure.key == _key(exchanges)

    def begin(self, exchanges: Sequence[PendingExchange], position: int) -> None:
        """The entry at `position` asks for them; what was asked of some of them with others is void."""
        for exchange in exchanges:
            self.forget(exchange)
        measure = self._at[position] = _Measure(_key(exchanges), position)
        self._of.update((exchange.member, measure) for exchange in exchanges)

    def add(self, server: int, sums: Iterable[Sums]) -> None:
        """A server's parts; those that nobody asks for any more change nothing."""
        for one in sums:
            if one.position in self._at:
                self._at[one.position].parts[server] = one.parts

    def norms(self, exchanges: Sequence[PendingExchange]) -> tuple[tuple[int, float], ...] | None:
        """(Model, norm) for each that these exchanges carry; None until every server has said its part."""
        measure = self._of[exchanges[0].member]
        if len(measure.parts) < self._servers:
            return None
        parts = [part for server in measure.parts.values() for part in server]
        models = sorted({part.model for part in parts})
        return tuple(
            (model, norm((p.level, p.index, p.value) for p in parts if p.model == model)) for model in models
        )

    def missing(self, exchange: PendingExchange) -> list[int]:
        """The servers whose part of what this exchange is measured in is still out."""
        measure = self._of.get(exchange.member)
        return [i for i in range(self._servers) if i not in measure.parts] if measure is not None else []

    def forget(self, exchange: PendingExchange) -> None:
        """Its exchange is over, or measured otherwise."""
        measure = self._of.get(exchange.member) if self._of else None
        if measure is not None:
            del self._at[measure.position]
            for member, _ in measure.key:
                del self._of[member]


def _key(exchanges: Iterable[PendingExchange]) -> _Key:
    return tuple((exchange.member, exchange.id.number) for exchange in exchanges)
