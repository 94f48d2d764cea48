"""The client's half of an exchange: one request to every server, one answer from each.

A state machine without I/O or clock: messages in, an outcome out. The servers answer at the same
position of the log, so their answers must agree.
"""

from __future__ import annotations

from typing import TypeAlias

from headwater.errors import ProtocolError, RefusedError, named
from headwater.messages import (
    Answer,
    AnyMessage,
    Compared,
    Description,
    Publication,
    Refused,
    Stored,
    Waiting,
)

AnyAnswer: TypeAlias = Answer | Description | Stored | Compared | Publication

Outcome: TypeAlias = Answer | Description | list[Stored] | list[Compared] | list[Publication]
"""What all servers together have answered: what they agree on, or what each has done."""


class Exchange:
    """Exchange `number` with `servers` servers, whose answers are of the class `expects`.

    Attributes:
        missing: how many servers have not answered.
        words: by server, when it spoke last of whom the exchange waits for, and what it said.
    """

    __slots__ = ("_answers", "_expects", "missing", "number", "words")

    def __init__(self, number: int, servers: int, expects: type[AnyAnswer] = Answer) -> None:
        self.number = number
        self.missing = servers
        self.words: dict[int, tuple[float, str]] = {}
        self._expects = expects
        self._answers: list[AnyAnswer | None] = [None] * servers

    def received(self, server: int, message: AnyMessage, now: float = 0.0) -> bool:
        """Take a message from `server`; True when it was that server's answer.

        Raises:
            ProtocolError: it belongs to no exchange, is an answer to something else, or a second one.
            RefusedError: the server refuses this member.
        """
        if type(message) is not self._expects or message.number != self.number:
            return self._is_no_answer(server, message, now)
        if self._answers[server] is not None:
            raise ProtocolError(f"server {server} answered exchange {self.number} twice")
        self._answers[server] = message
        self.missing -= 1
        return True

    def _is_no_answer(self, server: int, message: AnyMessage, now: float) -> bool:
        if isinstance(message, Refused):
            raise named(message.error, message.reason, default=RefusedError)
        if isinstance(message, Waiting) and message.number == self.number:
            self.words[server] = now, message.reason
            return False
        if isinstance(message, AnyAnswer) and message.number == self.number:
            wanted = self._expects.__name__
            raise ProtocolError(f"server {server} answered {type(message).__name__}, expected {wanted}")
        raise ProtocolError(f"server {server} sent {message!r} during exchange {self.number}")

    def unanswered(self) -> list[int]:
        """The servers whose answer is still out."""
        return [i for i, answer in enumerate(self._answers) if answer is None]

    def versions(self) -> set[int] | None:
        """Those of the answers to a read; None where a server has refused it."""
        versions: set[int] = set()
        for one in self._answers:
            if type(one) is not Answer or one.failure is not None:
                return None
            versions.add(one.version)
        return versions

    def outcome(self) -> Outcome:
        """What all servers have answered together: of answers the one that all agree on, of descriptions the
        shortest, which lists what every server knows by now; of others what each server did, in their order.

        Raises:
            HeadwaterError: the class and text with which the servers refused the request.
            ProtocolError: the answers differ.
        """
        assert not self.missing, "not all servers have answered"
        first = self._answers[0]
        if isinstance(first, Answer):
            for server, answer in enumerate(self._answers):
                if isinstance(answer, Answer) and answer.failure is not None:
                    raise named(answer.failure.error, answer.failure.reason, default=ProtocolError)
                # As text, because a sum that is NaN does not equal itself.
                if answer is not first and answer != first and repr(answer) != repr(first):
                    raise ProtocolError(f"servers 0 and {server} answered differently: {first!r}, {answer!r}")
            return first
        if isinstance(first, Description):
            descriptions = [one for one in self._answers if isinstance(one, Description)]
            return min(descriptions, key=lambda description: len(description.models))
        if isinstance(first, Stored):
            return [one for one in self._answers if isinstance(one, Stored)]
        if isinstance(first, Publication):
            return [one for one in self._answers if isinstance(one, Publication)]
        return [one for one in self._answers if isinstance(one, Compared)]
