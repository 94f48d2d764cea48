"""What a server tells people and members: statistics, and why an exchange has no answer yet.

For what members wait, the sequencer knows. It is asked when somebody wants statistics of server 0, and when
an exchange has waited for `patience`. Whoever asks again before it has answered is told what this server
knows by itself, so nobody waits without a word because the sequencer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from headwater import messages as m
from headwater.machines.actions import Actions, Close, Conn, Pause, Resume, Send
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
        """Somebody wants statistics; with the `sequencer` here they say for what members wait.

        The connection is paused until then, so that answers leave in the order of the questions.
        """
        asked = _Asked(conn, request, stays)
        if not sequencer or self._log.conn is None:
            return self._answer(asked, {})
        self._asked.append(asked)
        return [Pause(conn), *([] if self._asking else self._explain())]

    def _explain(self) -> Actions:
        self._asking = True
        return self._log.explain()

    def overdue(self, waiting: Iterable[MemberRequests], now: float) -> Actions:
        """Tell those members why they wait who have waited for `patience` since that was last looked at."""
        actions: Actions = []
        late = [one for one in waiting if one.waiting and one.since + self._patience <= now]
        asked = self._asking
        for one in late:
            one.since = now
            if one.reason or asked or self._log.conn is None:
                actions += one.tell(one.reason or self._log.why)
            else:
                one.untold = True
                actions += [] if self._asking else self._explain()
        return actions

    def explained(self, reasons: m.Reasons, waiting: Iterable[MemberRequests]) -> Actions:
        """The sequencer says for what members wait."""
        self._asking = False
        asked, self._asked = self._asked, []
        actions: Actions = []
        for asker in asked:
            actions += [*self._answer(asker, reasons.waits), Resume(asker.conn)]
        for one in waiting:
            if one.waiting and one.untold:
                actions += one.tell(reasons.waits.get(one.member.id, reasons.otherwise))
        return actions

    def closed(self, conn: Conn) -> None:
        """A connection has ended; with that to the sequencer, what it was asked is lost."""
        self._asked = [one for one in self._asked if one.conn != conn]
        self._asking = self._asking and conn != self._log.conn

    def _answer(self, asked: _Asked, waits: dict[int, str]) -> Actions:
        told: Actions = [Send(asked.conn, self._statistics(waits), request=asked.request)]
        return told if asked.stays else [*told, Close(asked.conn)]
