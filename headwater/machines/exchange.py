"""The client's half of an exchange: one request to every server, one answer from each.

A state machine without I/O or clock: messages in, an outcome out. The servers answer at the same
position of the log, so their answers must agree.
"""

from __future__ import annotations

from headwater.errors import ProtocolError, RefusedError, named
from headwater.messages import Answer, AnyMessage, Compared, Description, Refused, Stored, Waiting


class Exchange:
    """Exchange `number` with `servers` servers.

    Attributes:
        reason: the last word from a server on whom this exchange waits for; "" when there was none.
    """

    def __init__(self, number: int, servers: int) -> None:
        self.number = number
        self.reason = ""
        self._answers: list[Answer | Description | Stored | Compared | None] = [None] * servers

    def received(self, server: int, message: AnyMessage) -> bool:
        """Take a message from `server`; True when it was that server's answer.

        Raises:
            ProtocolError: it belongs to no exchange, or a second answer came.
            RefusedError: the server refuses this member.
        """
        if isinstance(message, Refused):
            raise named(message.error, message.reason, default=RefusedError)
        if (
            not isinstance(message, Answer | Waiting | Description | Stored | Compared)
            or message.number != self.number
        ):
            raise ProtocolError(f"server {server} sent {message!r} during exchange {self.number}")
        if isinstance(message, Waiting):
            self.reason = message.reason
            return False
        if self._answers[server] is not None:
            raise ProtocolError(f"server {server} answered exchange {self.number} twice")
        self._answers[server] = message
        return True

    def repeat(self) -> None:
        """Forget all answers: the request goes out again to every server, in a newer connection epoch."""
        self._answers = [None] * len(self._answers)

    def unanswered(self) -> list[int]:
        """The servers whose answer is still out."""
        return [i for i, answer in enumerate(self._answers) if answer is None]

    def answer(self) -> Answer:
        """The answer on which all servers agree.

        Raises:
            HeadwaterError: the class and text with which the servers refused the request.
            ProtocolError: the answers differ.
        """
        answers = [answer for answer in self._answers if isinstance(answer, Answer)]
        assert len(answers) == len(self._answers), "not all servers have answered"
        for answer in answers:
            if answer.failure is not None:
                raise named(answer.failure.error, answer.failure.reason, default=ProtocolError)
        first = answers[0]
        for server, answer in enumerate(answers):
            # As text, because a sum that is NaN does not equal itself.
            if answer != first and repr(answer) != repr(first):
                raise ProtocolError(f"servers 0 and {server} answered differently: {first!r}, {answer!r}")
        return first

    def description(self) -> Description:
        """The shortest answer to Describe: the models that every server knows by now."""
        descriptions = [answer for answer in self._answers if isinstance(answer, Description)]
        assert len(descriptions) == len(self._answers), "not all servers have answered"
        return min(descriptions, key=lambda description: len(description.models))

    def stored(self) -> list[Stored]:
        """What each server wrote, in their order."""
        stored = [answer for answer in self._answers if isinstance(answer, Stored)]
        assert len(stored) == len(self._answers), "not all servers have answered"
        return stored

    def compared(self) -> list[Compared]:
        """What each server and its standby are, in their order."""
        compared = [answer for answer in self._answers if isinstance(answer, Compared)]
        assert len(compared) == len(self._answers), "not all servers have answered"
        return compared
