"""What the log has recorded of everybody's reading, as server 0 tells the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from headwater import messages as m
from headwater.errors import ConnectionLostError
from headwater.machines.splits import unvisited_parts
from headwater.runtime.coordinator.controls import Controls

_log = logging.getLogger("headwater.coordinator")


class ProgressRecorder:
    """Asks server 0.

    Args:
        servers: by index, now.
        pause: called between questions with the member that waits; False where it need not wait any more.
    """

    def __init__(
        self,
        controls: Controls,
        servers: Callable[[], Sequence[m.Member]],
        pause: Callable[[m.Member], bool],
    ) -> None:
        self._controls = controls
        self._servers = servers
        self._pause = pause

    def now(self) -> m.DataProgress | None:
        """Everybody's positions; blocks for the answer, None without one."""
        return next((answer.recorded for answer in self._controls.ask(self._servers()[:1])), None)

    def surely(self, member: m.Member) -> m.DataProgress:
        """As `now`, until there is an answer, for a member whose own thread this is.

        Without one everything would count as not read yet, and be read twice.

        Raises:
            ConnectionLostError: it is no member any more, or the coordinator is gone.
        """
        while (recorded := self.now()) is None:
            if not self._pause(member):
                raise ConnectionLostError(
                    f"{member.role} {member.index} is no member any more, or this node is gone"
                )
        return recorded

    def position(self, member: m.Member) -> m.Position | None:
        """Where the log recorded a worker's rank; blocks as `surely`."""
        last = self.surely(member).last if member.role == "worker" else ()
        return next((position for position in last if position.rank == member.index), None)

    def tell_rest(self, member: m.Member, ranks: set[int]) -> None:
        """Log what a dead worker leaves unread, while workers of these `ranks` live."""
        rest = unvisited_parts(self.now() or m.DataProgress(), ranks)
        samples = sum(one.samples for one in rest if one.rank == member.index)
        if samples:
            _log.warning(
                "%d samples of worker %d's part wait for the next worker with that rank",
                samples,
                member.index,
            )
