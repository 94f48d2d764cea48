"""What a stream of events is: partitions that grow, each read from an offset on.

Invariants:
- An offset names a place between two events of a partition; reading from it again gives the same events.
- A stream keeps no position: the log does, with each step, so a restarted worker continues exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

BEGINNING = ""
"""The offset before the first event of every partition."""


class StreamEvent(NamedTuple):
    """One event: field → value, and the offset after it. `value` None: it was malformed, and is skipped."""

    value: Mapping[str, Any] | None
    offset: str


@runtime_checkable
class Stream(Protocol):
    """What `worker.batches` reads events from.

    Attributes:
        endless: whether more may come once all that is there was read; otherwise `batches` end then. It may
            become False while it is read.
    """

    endless: bool

    def partitions(self) -> Sequence[str]:
        """The partitions that there are now; more may come, none goes. Blocks shortly.

        Raises:
            DataError: they cannot be listed.
        """

    def read(self, partition: str, offset: str, most: int) -> list[StreamEvent]:
        """At most `most` events after `offset`; none where no more are there yet. Blocks shortly.

        Raises:
            DataError: the partition cannot be read, or the offset no longer exists; names both.
        """

    def close(self) -> None:
        """Let go of files and connections; a later `read` opens them again."""
