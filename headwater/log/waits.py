"""Whom everybody waits for, in words for a user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headwater.log import meetings
from headwater.log.measures import Measures
from headwater.log.pending import (
    ASKING,
    COMMITTED,
    MEETING,
    READY,
    SCHEDULED,
    WORKING,
    PendingExchange,
    PendingExchanges,
)
from headwater.log.state import LogState
from headwater.spec.sync import Mode
from headwater.spec.words import numbered


@dataclass(frozen=True, slots=True)
class Waits:
    """A view of a sequencer. `reason`: why its mode commits nothing yet, where it was asked."""

    pending: PendingExchanges
    log: LogState
    mode: Mode
    min_workers: int
    measures: Measures
    reason: str

    def all(self) -> dict[int, str]:
        """For each member that waits, by id: for what and for whom."""
        return {id: self.why(one) for id, one in self.pending.of.items() if one.held is not None}

    def why(self, exchange: PendingExchange) -> str:
        """For what and for whom one member waits."""
        if not exchange.waits:
            return f"{exchange.what} waits for {numbered('server', self.pending.missing(exchange))}"
        missing = self.log.missing_ranks()
        if not self.log.started and not (exchange.kind == "register" and 0 not in missing):
            return f"{exchange.what} waits for {numbered('worker', missing)} to join"
        present = self.pending.present
        few = present + len(self.log.finished) < self.min_workers
        if few and exchange.stage in (READY, MEETING):
            workers = f"{present} worker{'s' * (present > 1)} present"
            return f"training waits: {workers}, min_workers is {self.min_workers}"
        return f"{exchange.what} waits for {self._whom(exchange)}"

    def _whom(self, exchange: PendingExchange) -> str:
        if exchange.stage is SCHEDULED and exchange.held is not None:
            at = int(exchange.held.name or 0)
            return f"version {at}, and {self.log.version} is reached" if self.log.version < at else "room"
        others = [other for other in self.pending.workers() if other is not exchange]
        active = [other for other in others if other.state.phase == "active"]
        if exchange.kind == "register":
            if first := (active or others)[:1]:
                return f"{_named(first)} to declare the model"
            return f"{numbered('worker', self.log.missing_ranks())} to join"
        if exchange.stage is COMMITTED:
            slowest = self.log.clocks.slowest
            reason = self.mode.may_read(exchange.clock, slowest).reason
            return f"{_named([other for other in active if other.clock == slowest])}: {reason}"
        if missing := self.measures.missing(exchange):
            what = "what the vectors come to" if exchange.stage is MEETING else "how large the gradients are"
            return f"{numbered('server', missing)} to say {what}"
        if exchange.stage is WORKING:
            holders = self.log.portions.holders()
            ranks = sorted({self.log.standing(one).rank for members in holders.values() for one in members})
            return f"{numbered('worker', ranks)} to compute portions" if ranks else "workers to take portions"
        if exchange.stage is ASKING:
            source = self.log.portions.source[0]
            known = self.log.members.get(source)
            who = f"worker {known.rank}" if known is not None else "a worker"
            return f"{who} to ask for an evaluation, or for a portion to be counted"
        if exchange.stage is READY:
            missing_steps = [other for other in active if other.stage is not READY]
            measured = [other for other in active if self.measures.missing(other)]
            if measured and not missing_steps:
                return f"{_named(measured)}, whose round is measured first"
            named = _named(missing_steps) + self._never_stepped(missing_steps)
            return f"{named}: {self.reason}" if self.reason else named
        going_on = [other for other in others if not other.waits]
        meeting = meetings.meeting_of(exchange)
        absent = meetings.missing_from(meeting, [exchange, *others], self.log) if meeting else set()
        if absent and not going_on:
            return f"{numbered('worker', sorted(absent))} to come back"
        return _named(going_on or [other for other in others if other.stage is READY])

    def _never_stepped(self, workers: Iterable[PendingExchange]) -> str:
        """What to do about those who joined beyond the declared workers and only stand in the way."""
        idle = [
            worker
            for worker in workers
            if worker.rank >= self.log.workers and not self.log.histories[worker.rank].steps
        ]
        if not idle:
            return ""
        return (
            f" ({_named(idle)} joined beyond the declared workers and took no step yet: "
            f"have it step, or leave with worker.leave())"
        )


def _named(workers: Iterable[PendingExchange]) -> str:
    return numbered("worker", [worker.rank for worker in workers])
