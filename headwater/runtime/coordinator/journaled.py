"""The roster of a coordinator that may die: every change is in the journal before anybody can see it.

Until all servers are there nobody has been welcomed, so nothing is kept: a coordinator that dies before
begins with nobody, as do the nodes that waited for it.
"""

from __future__ import annotations

from collections.abc import Callable

from headwater.errors import JournalError
from headwater.machines.roster import Departure, RosterBook
from headwater.messages import Join, Member, Refused
from headwater.runtime.coordinator.journal import Journal


class JournaledBook(RosterBook):
    """A RosterBook that goes on with what `journal` holds, and keeps itself there.

    Its methods raise JournalError where that fails; it then cannot go on, and `failed` is called first.

    Attributes:
        forming: whether not all servers have been there yet in this generation, so that none has anything.
        begun: whether all were there once, in whichever generation: training may have begun.
    """

    def __init__(
        self,
        journal: Journal,
        failed: Callable[[JournalError], None],
        workers: int,
        servers: int,
        *,
        lease_s: float,
        generation: int,
        now: float,
    ) -> None:
        super().__init__(
            workers, servers, lease_s=lease_s, generation=generation, record=journal.found, now=now
        )
        self._journal = journal
        self._failed = failed
        self.forming = not self.view().members
        self._over = False
        self.begun = journal.found is not None

    def join(self, join: Join, now: float = 0.0) -> Member:
        """As RosterBook's."""
        member = super().join(join, now)
        self._keep()
        return member

    def remove(self, id: int, why: str = "") -> Departure | None:
        """As RosterBook's."""
        departure = super().remove(id, why)
        if departure is not None:
            self._keep()
        return departure

    def caught_up(self, id: int) -> bool:
        """As RosterBook's."""
        known = super().caught_up(id)
        if known:
            self._keep()
        return known

    def finish(self, id: int) -> None:
        """As RosterBook's."""
        super().finish(id)
        self._keep()

    def begin_anew(self) -> list[Member]:
        """As RosterBook's."""
        gone = super().begin_anew()
        self._keep()
        self.forming = True
        return gone

    def end(self, refusal: Refused) -> None:
        """The cluster is over; nothing is kept of what follows."""
        if not self._over:
            self._over = True
            self._guarded(lambda: self._journal.end(refusal))

    def _keep(self) -> None:
        self.forming = self.forming and not self.complete()
        self.begun = self.begun or not self.forming
        if not self.forming and not self._over:
            self._guarded(lambda: self._journal.write(self.record()))

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except JournalError as error:
            self._over = True
            self._failed(error)
            raise
