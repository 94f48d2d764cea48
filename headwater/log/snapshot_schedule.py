"""Checkpoints and publications that were asked for: when the log has the entry that fixes what is in them.

Part of the sequencer, whose theory of operation is in `headwater.log.sequencer`:

    COMPLETE ──→ SCHEDULED    a checkpoint or publication, until its version is reached (and there is room)

Workers do not wait for followers, so a publication that finds no room waits for those before it.
"""

from __future__ import annotations

from headwater import messages as m
from headwater.log.pending import SCHEDULED, PendingExchange, ids
from headwater.log.writer import LogWriter

ROOM = 2
"""Followers that servers keep a publication for at a time; the others wait."""


class SnapshotSchedule:
    """Keeps what was asked for, and writes its entry when its version is reached."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._state, self._pending = writer.state, writer.pending

    def schedule(self, exchange: PendingExchange) -> None:
        """Somebody asks for a checkpoint or a publication."""
        self._pending.move(exchange, SCHEDULED)
        self.take_ready()

    def take_ready(self) -> None:
        """Write the entry of each whose version is reached: the first that it waits for."""
        ready: list[PendingExchange] = []
        for exchange in self._pending.at(SCHEDULED):
            assert exchange.held is not None
            if self._state.version < int(exchange.held.name or 0):
                continue
            if exchange.held.kind == "publish":
                ready.append(exchange)
            else:
                self._writer.write(m.Checkpointed(self._writer.next, exchange.id))
                self._writer.done(exchange)
        if ready:
            self._publish(ready)

    def _publish(self, ready: list[PendingExchange]) -> None:
        """Publish for as many followers as servers have room for; those who have waited for longest first."""
        room = ROOM - len(self._state.receiving())
        chosen = [exchange for exchange in ready if exchange.rank >= 0]
        others = [exchange for exchange in ready if exchange.rank < 0]
        others.sort(key=lambda exchange: (exchange.since, exchange.member))
        chosen += others[: max(0, room)]
        if chosen:
            self._writer.write(m.Published(self._writer.next, ids(chosen)))
            for exchange in chosen:
                self._writer.done(exchange)
