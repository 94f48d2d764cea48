"""The coordinator's connections to servers and standbys: rosters out, acknowledgements and statistics back.

A server that does not answer in time is left behind, not waited for: its connection is given up, and it is
told again with the next publication.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.runtime.dialling import NOBODY, dial_member
from headwater.runtime.threads import ConnectionThreads
from headwater.wire.channel import Channel
from headwater.wire.security import Security

Answer = TypeVar("Answer")

_log = logging.getLogger("headwater.coordinator")

_ANSWER_S = 2.0
"""How long a server may take to acknowledge a roster or to answer a question, in seconds."""


class Controls:
    """One connection to each server and standby, made when it is first needed; owned by `threads`.

    Attributes:
        behind: whether a server did not acknowledge the last roster.
    """

    def __init__(self, threads: ConnectionThreads, security: Security) -> None:
        self.behind = False
        self._threads = threads
        self._security = security
        self._channels: dict[int, Channel] = {}
        self._busy = threading.Lock()

    def publish(self, view: Callable[[], m.Roster]) -> None:
        """Tell every server and standby of the roster; blocks until those that live have it.

        `view` is called in here, so rosters go out in the order of their terms.
        """
        with self._busy:
            roster = view()
            hosts = _hosts(roster)
            self._forget({member.id for member in hosts})
            self.behind = None in self._ask_all(hosts, roster)

    def ask(self, members: Sequence[m.Member]) -> list[m.ServerStatistics]:
        """The statistics of those that answer."""
        with self._busy:
            answers = self._ask_all(members, m.Ask())
        return [answer for answer in answers if isinstance(answer, m.ServerStatistics)]

    def refusing(self, roster: m.Roster) -> list[m.Member]:
        """Servers and standbys at whose address nobody listens; blocks for dialling."""
        with self._busy:
            return [member for member in _hosts(roster) if self._refuses(member)]

    def _refuses(self, member: m.Member) -> bool:
        try:
            self._channel(member)
        except (HeadwaterError, TimeoutError) as error:
            return isinstance(error.__cause__, NOBODY)
        return False

    def close(self) -> None:
        """Hang up on all."""
        with self._busy:
            self._forget(())

    def _ask_all(self, members: Sequence[m.Member], question: m.Roster | m.Ask) -> list[m.AnyMessage | None]:
        """What each answers; None for those that do not. All are asked before the first is waited for."""
        asked = [self._guarded(member, lambda channel: _sent(channel, question)) for member in members]
        return [
            self._guarded(member, _received) if done else None
            for member, done in zip(members, asked, strict=True)
        ]

    def _guarded(self, member: m.Member, talk: Callable[[Channel], Answer]) -> Answer | None:
        """What `talk` returns; None after an error, with which the connection ends."""
        try:
            return talk(self._channel(member))
        except (HeadwaterError, TimeoutError) as error:
            _log.info("%s %d does not answer: %s", member.role, member.index, error)
            channel = self._channels.pop(member.id, None)
            if channel is not None:
                channel.close()
            return None

    def _channel(self, member: m.Member) -> Channel:
        channel = self._channels.get(member.id)
        if channel is None:
            channel = self._threads.own(dial_member(member, timeout=_ANSWER_S, security=self._security))
            channel.send(m.Hello(0, "coordinator", 0), timeout=_ANSWER_S)
            self._channels[member.id] = channel
        return channel

    def _forget(self, living: Iterable[int]) -> None:
        for gone in self._channels.keys() - set(living):
            self._channels.pop(gone).close()


def _hosts(roster: m.Roster) -> list[m.Member]:
    return [member for member in roster.members if member.role in ("server", "standby")]


def _sent(channel: Channel, question: m.AnyMessage) -> bool:
    channel.send(question, timeout=_ANSWER_S)
    return True


def _received(channel: Channel) -> m.AnyMessage:
    received = channel.receive(timeout=_ANSWER_S)
    if received is None:
        raise ProtocolError("it closed its connection")
    return received.message
