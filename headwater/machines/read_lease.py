"""How long a server may show members, at once, what is applied there.

A server that was replaced by its standby may not know it: the network may part it from the coordinator and
from the standby, while a member still reaches it. Commits go on elsewhere then, and what it has is old. So it
reads for members only for `READ_S` after a moment at which its standby had certainly not taken over: the
moment at which it sent the standby an entry that the standby acknowledged. A standby that takes over refuses
its former server from then on, and serves nobody for `FENCE_S`, which is longer. Hence, while anybody is told
of anything newer, no former server reads for anybody.

Nothing is sent for this. A server that commits nothing for `READ_S` lets its lease run out, and answers the
next read that it cannot say; that read comes again as an entry of the log, and with it the lease.

Assumes that clocks of two machines run at about the same rate: that while one counts `FENCE_S`, the other
counts `READ_S` at least. A machine that is suspended, and whose clock stands still meanwhile, does not.
"""

from __future__ import annotations

import math

READ_S = 0.1
"""How long what a standby said last counts, in seconds."""

FENCE_S = 0.15
"""How long a standby that takes over waits for its former server's lease to end, in seconds."""


class ReadLease:
    """A server's, of its standby."""

    __slots__ = ("_asked", "_until")

    def __init__(self) -> None:
        self._until = -math.inf
        self._asked: tuple[int, int, float] | None = None

    def asked(self, term: int, position: int, now: float) -> None:
        """The standby is sent the entry at `position`, in `term`, at `now` or later."""
        if self._asked is None or self._asked[0] != term:
            self._asked = term, position, now

    def answered(self, term: int, position: int) -> None:
        """The standby says that it follows the sequencer of `term`, and has its entries up to `position`."""
        if self._asked is not None and term == self._asked[0] and position >= self._asked[1]:
            self._until = self._asked[2] + READ_S
            self._asked = None

    def holds(self, now: float) -> bool:
        """Whether no other server can have told anybody anything."""
        return now < self._until
