"""Which node becomes which server or standby, where nodes come by themselves and ask: the rule, without I/O.

Invariants:
- A place is offered to one node at a time, and to nobody while a member has it.
- Standbys are filled once every server is there or promised, so a cluster is complete as early as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.errors import ConfigurationError
from headwater.messages import Member, RequestSlot


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A place that is kept for one node; two of the same place are not equal."""

    role: Literal["server", "standby"]
    index: int


class SlotAllocator:
    """The places of `servers` servers with `replicas` standbys each, and which of them are promised."""

    def __init__(self, servers: int, replicas: int) -> None:
        self._servers = servers
        self._replicas = replicas
        self._promised: set[Reservation] = set()

    def check(self, enlist: RequestSlot) -> None:
        """Raise ConfigurationError where there can be no such place, ever."""
        if enlist.index is not None and not 0 <= enlist.index < self._servers:
            raise ConfigurationError(
                f"there can be no server {enlist.index}: this cluster has {self._servers}, counted from 0"
            )
        if enlist.role == "standby" and not self._replicas:
            raise ConfigurationError("this cluster has no standbys: start its coordinator with --replicas 1")

    def promise(self, enlist: RequestSlot, members: Sequence[Member], *, forming: bool) -> Reservation | None:
        """Keep a free place that fits for whoever enlists; None while there is none.

        `forming`: whether servers may come, which hold nothing yet.
        """
        taken: set[tuple[str, int]] = {(one.role, one.index) for one in members}
        taken |= {(one.role, one.index) for one in self._promised}
        for promise in self._wanted(taken, forming):
            role, index = promise.role, promise.index
            if (role, index) not in taken and enlist.role in (None, role) and enlist.index in (None, index):
                self._promised.add(promise)
                return promise
        return None

    def release(self, promise: Reservation) -> None:
        """Whoever it was kept for is a member now, or gone; idempotent."""
        self._promised.discard(promise)

    def _wanted(self, taken: set[tuple[str, int]], forming: bool) -> list[Reservation]:
        servers = [Reservation("server", index) for index in range(self._servers)] if forming else []
        if not self._replicas or not taken.issuperset((one.role, one.index) for one in servers):
            return servers
        return [*servers, *(Reservation("standby", index) for index in range(self._servers))]
