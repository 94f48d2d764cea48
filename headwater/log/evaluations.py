"""Work on vectors for one worker alone, and evaluations that others compute in portions.

Part of the sequencer, whose theory of operation is in `headwater.log.sequencer`:

    COMPLETE ──→ WORKING      work on vectors, until its reductions are measured, or its evaluation is over
    COMPLETE ──→ ASKING       a worker that wants a portion, until there is one for it, or none to come

A result is counted as soon as every server holds it; whoever brought it is answered with its next portion.
"""

from __future__ import annotations

from headwater import messages as m
from headwater.log.pending import ASKING, WORKING, PendingExchange, ids
from headwater.log.writer import LogWriter


class Evaluations:
    """Writes the entries of work on vectors and of portions."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._state, self._pending = writer.state, writer.pending

    def work(self, exchange: PendingExchange) -> None:
        """Work on vectors is held everywhere."""
        assert exchange.held is not None
        self._pending.move(exchange, WORKING)
        plan, portions = exchange.held.plan, self._state.portions
        source = (exchange.member, exchange.held.number)
        if plan is not None and portions.source != source:  # else it was opened by a sequencer before
            version = self._state.version + 1
            model = int(exchange.held.name)
            self._writer.write(m.Opened(self._writer.next, version, exchange.id, plan, model))

    def ask(self, exchange: PendingExchange) -> None:
        """A worker brings a result, or none, and wants a portion."""
        assert exchange.held is not None
        self._pending.move(exchange, ASKING)
        done = exchange.held.done
        if done is not None and self._state.portions.counts(done):
            self._writer.write(m.Counted(self._writer.next, exchange.id, done))

    def settle(self) -> None:
        """Answer whoever need not wait any more."""
        for exchange in self._pending.at(WORKING):
            self._finish(exchange)
        portions = self._state.portions
        for exchange in self._pending.at(ASKING):
            portion = None if portions.over else portions.next_for(exchange.member)
            if portion is not None or portions.over:
                self._writer.write(m.Handed(self._writer.next, exchange.id, portion))
                self._writer.done(exchange)

    def _finish(self, exchange: PendingExchange) -> None:
        assert exchange.held is not None
        totals: tuple[float, ...] | None = ()
        if exchange.held.plan is not None:
            if not self._state.portions.complete:
                return
        elif exchange.held.measured:
            measures = self._writer.measures
            if not measures.under_way([exchange], self._state.version):
                self._writer.write(m.Measured(self._writer.next, ids([exchange])))
                measures.begin([exchange], self._state.position, self._state.version)
            totals = measures.totals([exchange])
        if totals is not None:
            version = self._state.version + 1
            self._writer.write(m.Operated(self._writer.next, version, exchange.id, totals))
            self._writer.done(exchange)
