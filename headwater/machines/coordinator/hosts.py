"""The coordinator's connections to servers and standbys: rosters and questions out, answers back.

One connection to each, made when it is first needed. A host answers in the order in which it was told and
asked, so what it answers after a roster is what it knows with that roster.

Invariants:
- A host that does not answer in time is left behind, not waited for: its connection is given up, and the
  roster is told again, over another, when the coordinator next looks.
- One dial at a time to each host. A connection that comes late is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from headwater.errors import ProtocolError
from headwater.machines.actions import Action, Close, Conn, Dial, Send
from headwater.messages import (
    Acknowledged,
    AnyMessage,
    Ask,
    Hello,
    Member,
    Roster,
    ServerStatistics,
)

ANSWER_S = 2.0
"""How long a host may take to acknowledge a roster or to answer a question, in seconds."""

TAG = "host "
"""Begins the tags of dials to hosts; the member's id follows."""

Answers: TypeAlias = list[tuple[str, ServerStatistics | None]]
"""By the asker's tag; None from a host that did not answer."""


@dataclass(slots=True)
class _Asked:
    """What a host was told or asked. `term`: of a roster, 0 for a question."""

    until: float
    term: int = 0
    tag: str = ""


@dataclass(slots=True)
class _Host:
    """`acknowledged`: the newest term that it has; `asked`: sent, in order; `unsent`: questions."""

    member: Member
    conn: Conn | None = None
    dialling: bool = False
    acknowledged: int = 0
    asked: deque[_Asked] = field(default_factory=deque)
    unsent: list[_Asked] = field(default_factory=list)
    wanted: _Asked | None = None

    def waits_for(self, term: int) -> bool:
        """Whether it may still acknowledge this term in time."""
        if self.acknowledged >= term:
            return False
        wanted = self.wanted is not None and self.wanted.term >= term
        return wanted or any(one.term >= term for one in self.asked)

    def pending(self) -> Iterable[_Asked]:
        """All that is not answered."""
        return [*self.asked, *self.unsent, *([self.wanted] if self.wanted is not None else [])]


class Hosts:
    """All servers and standbys of the roster that was told last.

    Args:
        emit: takes the actions.
        cluster: whose hosts.
        answer_s: how long a host may take to answer, in seconds.
    """

    def __init__(self, emit: Callable[[Action], None], cluster: str, answer_s: float = ANSWER_S) -> None:
        self._emit = emit
        self._cluster = cluster
        self._answer_s = answer_s
        self._roster: Roster | None = None
        self._hosts: dict[int, _Host] = {}
        self._conns: dict[Conn, int] = {}
        self._answers: Answers = []

    # ── for the coordinator ─────────────────────────────────────────────────────────────────────

    def tell(self, roster: Roster, now: float) -> None:
        """Have every server and standby of this roster know it, and drop the others."""
        self._roster = roster
        members = {member.id: member for member in roster.members if member.role in ("server", "standby")}
        for gone in self._hosts.keys() - members.keys():
            self._drop(gone)
        for member in members.values():
            self._tell(self._host(member), now)

    def ask(self, member: Member, tag: str, now: float) -> None:
        """Ask a host for its statistics; the answer, or None, is among `answers` with this tag."""
        host = self._host(member)
        question = _Asked(now + self._answer_s, tag=tag)
        if host.conn is not None:
            self._send(host, Ask(), question)
        else:
            host.unsent.append(question)
            self._dial(host)

    def again(self, now: float) -> None:
        """Tell those the roster that were left behind."""
        for host in list(self._hosts.values()):
            if self._is_behind(host):
                self._tell(host, now)

    def waited_for(self, term: int) -> list[Member]:
        """Those that have this long to acknowledge a term and have not yet."""
        return [host.member for host in self._hosts.values() if host.waits_for(term)]

    def answers(self) -> Answers:
        """What was answered, or not in time, since the last call."""
        answers, self._answers = self._answers, []
        return answers

    def due(self) -> float | None:
        """When `tick` has something to give up."""
        first: float | None = None
        for host in self._hosts.values():
            if host.asked or host.unsent or host.wanted is not None:  # mostly nothing is
                until = min(one.until for one in host.pending())
                first = until if first is None else min(first, until)
        return first

    def close(self) -> None:
        """End all connections."""
        for id in list(self._hosts):
            self._drop(id)

    def __contains__(self, conn: Conn) -> bool:
        return conn in self._conns

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, member: int, now: float) -> None:
        """The connection to this member was made."""
        host = self._hosts.get(member)
        if host is None or host.conn is not None:
            self._emit(Close(conn))
            return
        host.dialling, host.conn = False, conn
        self._conns[conn] = member
        self._emit(Send(conn, Hello(0, "coordinator", 0, cluster=self._cluster)))
        host.wanted = None
        self._tell(host, now)
        unsent, host.unsent = host.unsent, []
        for question in unsent:
            question.until = now + self._answer_s
            self._send(host, Ask(), question)

    def unreachable(self, member: int) -> None:
        """The connection to this member could not be made."""
        host = self._hosts.get(member)
        if host is not None:
            host.dialling = False
            self._give_up(host)

    def received(self, conn: Conn, message: AnyMessage) -> None:
        """A host answers. Raises ProtocolError for what answers nothing."""
        host = self._hosts[self._conns[conn]]
        first = host.asked[0] if host.asked else None
        expected = None if first is None else Acknowledged if first.term else ServerStatistics
        if first is None or expected is None or not isinstance(message, expected):
            raise ProtocolError(
                f"{host.member.role} {host.member.index} sent {type(message).__name__}, "
                f"expected {expected.__name__ if expected is not None else 'nothing'}"
            )
        host.asked.popleft()
        if isinstance(message, ServerStatistics):
            self._answers.append((first.tag, message))
        else:
            host.acknowledged = first.term

    def closed(self, conn: Conn) -> None:
        """A connection has ended."""
        host = self._hosts.get(self._conns.pop(conn))
        if host is not None and host.conn == conn:
            host.conn = None
            self._give_up(host)

    def tick(self, now: float) -> None:
        """Give up those that have not answered in time."""
        for host in list(self._hosts.values()):
            if any(one.until <= now for one in host.pending()):
                self._hang_up(host)
                self._give_up(host)

    # ── one host ────────────────────────────────────────────────────────────────────────────────

    def _host(self, member: Member) -> _Host:
        host = self._hosts.get(member.id)
        if host is None:
            host = self._hosts[member.id] = _Host(member)
        host.member = member
        return host

    def _tell(self, host: _Host, now: float) -> None:
        if self._roster is None:
            return
        roster = _Asked(now + self._answer_s, term=self._roster.term)
        if host.conn is not None:
            self._send(host, self._roster, roster)
        else:
            host.wanted = roster
            self._dial(host)

    def _dial(self, host: _Host) -> None:
        if not host.dialling:
            host.dialling = True
            self._emit(Dial(host.member, f"{TAG}{host.member.id}"))

    def _send(self, host: _Host, message: Roster | Ask, asked: _Asked) -> None:
        assert host.conn is not None
        host.asked.append(asked)
        self._emit(Send(host.conn, message))

    def _is_behind(self, host: _Host) -> bool:
        term = self._roster.term if self._roster is not None else 0
        return host.acknowledged < term and not host.waits_for(term)

    def _give_up(self, host: _Host) -> None:
        """It does not answer what it was asked."""
        self._answers += [(one.tag, None) for one in host.pending() if one.tag]
        host.asked.clear()
        host.unsent.clear()
        host.wanted = None

    def _hang_up(self, host: _Host) -> None:
        if host.conn is not None:
            self._emit(Close(host.conn))
            host.conn = None

    def _drop(self, id: int) -> None:
        host = self._hosts.pop(id)
        self._hang_up(host)
        self._give_up(host)
