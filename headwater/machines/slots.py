"""Which node becomes which server or standby, where nodes come by themselves and ask.

Invariants:
- A slot is reserved for one node at a time, and for nobody while a member has it.
- Standbys are filled once every server is there or reserved, so a cluster is complete as early as can be.
- A server's slot is free only while the generation forms. Later, a lost server takes its shard along, and
  what is to become of that is decided first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.errors import ConfigurationError
from headwater.messages import Member, RequestSlot, ServerRole


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A slot that is kept for one node; two of the same slot are not equal."""

    role: ServerRole
    index: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


class SlotAllocator:
    """The slots of `servers` servers with `replicas` standbys each, and which of them are reserved."""

    def __init__(self, servers: int, replicas: int) -> None:
        self._servers = servers
        self._replicas = replicas
        self._reserved: set[Reservation] = set()

    def check(self, request: RequestSlot) -> None:
        """Raise ConfigurationError where there can be no such slot, ever."""
        if request.index is not None and not 0 <= request.index < self._servers:
            raise ConfigurationError(
                f"there can be no server {request.index}: this cluster has {self._servers}, counted from 0"
            )
        if request.role == "standby" and not self._replicas:
            raise ConfigurationError("this cluster has no standbys: start its coordinator with --replicas 1")

    def reserve(
        self, request: RequestSlot, members: Sequence[Member], *, forming: bool
    ) -> Reservation | None:
        """Keep a free slot that fits the request; None while there is none.

        `forming`: whether servers may come, which hold nothing yet.
        """
        taken: set[tuple[str, int]] = {(one.role, one.index) for one in members}
        taken |= {(one.role, one.index) for one in self._reserved}
        for slot in self._wanted(taken, forming):
            fits = request.role in (None, slot.role) and request.index in (None, slot.index)
            if fits and (slot.role, slot.index) not in taken:
                self._reserved.add(slot)
                return slot
        return None

    def release(self, slot: Reservation) -> None:
        """Whoever it was kept for is a member now, or gone; idempotent."""
        self._reserved.discard(slot)

    def _wanted(self, taken: set[tuple[str, int]], forming: bool) -> list[Reservation]:
        servers = [Reservation("server", index) for index in range(self._servers)] if forming else []
        if not self._replicas or not taken.issuperset((one.role, one.index) for one in servers):
            return servers
        return [*servers, *(Reservation("standby", index) for index in range(self._servers))]


def why_none(request: RequestSlot) -> str:
    """Why a node that asked for a slot has none yet."""
    wanted = "server or standby" if request.role is None else request.role
    which = "" if request.index is None else f" {request.index}"
    return f"no {wanted}{which} is missing: it waits as a spare"
