"""Whom everybody waits for, in words for a user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headwater.log.measures import Measures
from headwater.log.pending import PendingExchange, PendingExchanges
from headwater.log.state import LogState
from headwater.spec.sync import Sync


@dataclass(frozen=True, slots=True)
class Waits:
    """A view of a sequencer. `ready`: steps not committed yet; `blocked`: committed and not answered yet."""

    seats: PendingExchanges
    standings: LogState
    sync: Sync
    min_workers: int
    ready: Mapping[int, PendingExchange]
    blocked: Mapping[int, PendingExchange]
    measures: Measures

    def all(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom."""
        return {id: self.why(seat) for id, seat in self.seats.of.items() if seat.held is not None}

    def why(self, seat: PendingExchange) -> str:
        """For what and for whom one member waits."""
        if not seat.waiting:
            return f"{seat.what} waits for {_list('server', self.seats.missing(seat))}"
        missing = self.standings.missing_ranks()
        if not self.standings.started and not (seat.waits_in("register") and 0 not in missing):
            return f"{seat.what} waits for {_list('worker', missing)} to join"
        present = self.seats.present
        if seat.member in self.ready and present + len(self.standings.finished) < self.min_workers:
            workers = f"{present} worker{'s' * (present > 1)} present"
            return f"training waits: {workers}, min_workers is {self.min_workers}"
        return f"{seat.what} waits for {self._whom(seat)}"

    def _whom(self, seat: PendingExchange) -> str:
        others = [other for other in self.seats.workers() if other is not seat]
        active = [other for other in others if other.standing.phase == "active"]
        if seat.waits_in("register"):
            return f"{_named((active or others)[:1])} to declare the model"
        if seat.member in self.blocked:
            slowest = self.standings.clocks.slowest
            reason = self.sync.may_read(seat.standing.clock, slowest).reason
            return f"{_named([other for other in active if other.standing.clock == slowest])}: {reason}"
        if missing := self.measures.missing(seat):
            return f"{_list('server', missing)} to say how large the gradients are"
        if seat.member in self.ready:
            return self._round(active)
        going_on = [other for other in others if not other.waiting]
        return _named(going_on or [other for other in others if other.member in self.ready])

    def _round(self, active: list[PendingExchange]) -> str:
        named = _named([other for other in active if other.member not in self.ready])
        if self.sync.quorum is None:
            return named
        held, of = len(self.ready), len(self.standings.clocks)
        return f"{named}: {self.sync.may_commit(held, of).reason}"


def _named(workers: Iterable[PendingExchange]) -> str:
    return _list("worker", [seat.standing.rank for seat in workers])


def _list(noun: str, indices: list[int]) -> str:
    if not indices:
        return "nobody"
    return f"{noun}{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
