"""The end of the log as the sequencer writes it: the log's state, who has what outstanding, the new entries.

What every decision of the sequencer reads and changes. An entry is applied to the log's state as it is
written, so the next decision sees it.
"""

from __future__ import annotations

from headwater.log.measures import Measures
from headwater.log.pending import PendingExchange, PendingExchanges
from headwater.log.state import LogState
from headwater.messages import AnyEntry


class LogWriter:
    """For `servers` servers, after the entries that `state` follows from.

    Attributes:
        state: as of the last entry written.
        pending: of the members present.
        measures: norms that servers were asked for.
    """

    def __init__(self, servers: int, state: LogState) -> None:
        self.state = state
        self.pending = PendingExchanges(servers, state)
        self.measures = Measures(servers)
        self._entries: list[AnyEntry] = []

    @property
    def next(self) -> int:
        """Position of the next entry."""
        return self.state.position + 1

    def write(self, entry: AnyEntry) -> None:
        """Continue the log with it."""
        self.state.apply(entry)
        self._entries.append(entry)

    def take(self) -> list[AnyEntry]:
        """The entries written since the last call."""
        entries, self._entries = self._entries, []
        return entries

    def done(self, exchange: PendingExchange) -> None:
        """Its answer was written: the exchange is over."""
        self.measures.forget(exchange)
        self.pending.end(exchange)
