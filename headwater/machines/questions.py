"""What a server tells people and members: statistics, and why an exchange has no answer yet.

For what members wait, the sequencer knows. It is asked when somebody wants statistics of server 0, and when
an exchange has waited for `patience`. Whoever asks again before it has answered is told what this server
knows by itself, so nobody waits without a word because the sequencer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from headwater import messages as m
from headwater.machines.actions import Actions, Close, Conn, Send
from headwater.machines.log_link import ReportLink
from headwater.machines.requests import MemberRequests


class _Asked(NamedTuple):
    """A question for statistics; `stays`: the connection goes on afterwards."""

    conn: Conn
    request: int
    stays: bool


class Questions:
    """To a server whose end of the log is `log`; `statistics` makes them, given for what members wait."""

    def __init__(
        self, log: ReportLink, patience: float, statistics: Callable[[dict[int, str]], m.ServerStatistics]
    ) -> None:
        self._log = log
        self._patience = patience
        self._statistics = statistics
        self._asked: list[_Asked] = []
        self._asking = False

    def ask(self, conn: Conn, request: int, *, stays: bool, sequencer: bool) -> Actions:
        """Somebody wants statistics; `sequencer`: whether it is here, so that they say for what members wait."""
        asked = _Asked(conn, request, stays)
        if not sequencer or self._log.conn is None:
            return self._answer(asked, {})
        self._asked.append(asked)
        return [] if self._asking else self._explain()

    def _explain(self) -> Actions:
        self._asking = True
        return self._log.explain()

    def overdue(self, waiting: Iterable[MemberRequests], now: float) -> Actions:
        """Tell those members why they wait who have waited for `patience` since they were told last."""
        late = [one for one in waiting if one.waiting and one.since + self._patience <= now]
        actions: Actions = []
        for one in late:
            if one.reason or self._asking or self._log.conn is None:
                actions += one.tell(one.reason or self._log.why, now)
        if any(one.since != now for one in late):
            actions += self._explain()
        return actions

    def explained(self, reasons: m.Reasons, waiting: Iterable[MemberRequests], now: float) -> Actions:
        """The sequencer says for what members wait."""
        self._asking = False
        asked, self._asked = self._asked, []
        actions = [action for one in asked for action in self._answer(one, reasons.waits)]
        for one in waiting:
            if one.waiting and one.since + self._patience <= now:
                actions += one.tell(reasons.waits.get(one.member.id, reasons.otherwise), now)
        return actions

    def closed(self, conn: Conn) -> None:
        """A connection has ended; with that to the sequencer, what it was asked is lost."""
        self._asked = [one for one in self._asked if one.conn != conn]
        self._asking = self._asking and conn != self._log.conn

    def _answer(self, asked: _Asked, waits: dict[int, str]) -> Actions:
        told: Actions = [Send(asked.conn, self._statistics(waits), request=asked.request)]
        return told if asked.stays else [*told, Close(asked.conn)]
