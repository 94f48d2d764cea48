"""A worker's memory for ids and rows on their way to and from the servers, shared with those that can share.

Places are valid until `reset`, which the end of a step does; a pull gives its place back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConnectionLostError
from headwater.kernels.arrange import Ids, Plan
from headwater.runtime.client import Client
from headwater.wire.channel import Outgoing
from headwater.wire.scratch import Scratch

Array = NDArray[np.float32]

_ID, _ITEM = 8, 4


@dataclass(frozen=True, slots=True, eq=False)
class RowSlice:
    """Where the ids of a plan and a row of `dim` for each of them lie: byte offsets."""

    plan: Plan
    dim: int
    ids_at: int
    rows_at: int


class RowBuffer:
    """For all tables of one worker."""

    def __init__(self, session: Client) -> None:
        self._session = session
        self._scratch = Scratch(shared=any(session.shares))
        self._announced = 0
        session.machine.connections.buffers.append(self)

    def take(self, plan: Plan, dim: int) -> RowSlice:
        """A place with the plan's ids written to it. A pull under way must have arrived before.

        Raises:
            EnvironmentFailure: the system has no memory for it.
        """
        count = len(plan.ids)
        ids_at = self._scratch.take(_ID * count)
        place = RowSlice(plan, dim, ids_at, self._scratch.take(_ITEM * dim * count))
        self._ids(place)[...] = plan.ids
        return place

    @property
    def used(self) -> int:
        """What `reset` takes to give back all places taken from now on."""
        return self._scratch.used

    def reset(self, used: int = 0) -> None:
        """Give back the places taken since `used` was read, all by default."""
        self._scratch.used = used

    def rows(self, place: RowSlice) -> Array:
        """float32[u, dim], the rows of a place; a view that a later `take` may make stale."""
        count, size = len(place.plan.ids), _ITEM * place.dim * len(place.plan.ids)
        flat = self._scratch.memory[place.rows_at : place.rows_at + size].view(np.float32)
        return flat.reshape(count, place.dim)

    def _ids(self, place: RowSlice) -> Ids:
        size = _ID * len(place.plan.ids)
        return self._scratch.memory[place.ids_at : place.ids_at + size].view(np.int64)

    # ── on the way ──────────────────────────────────────────────────────────────────────────────

    def announce(self) -> None:
        """Give the servers the window if they do not have this one yet; before a message with places."""
        if self._announced == self._scratch.generation:
            return
        try:
            for server, channel in enumerate(self._session.channels):
                if self._is_shared(server):
                    channel.send(self._announcement(), descriptors=(self._scratch.descriptor,))
        except ConnectionLostError:
            pass  # the exchange that follows connects anew, and offers it
        self._announced = self._scratch.generation

    def renew(self) -> None:
        """Go on in a window with the same content that nobody else has."""
        if self._scratch.generation:
            self._scratch.renew()
            self._announced = self._scratch.generation

    def offer(self, server: int, shared: bool, anew: bool) -> Outgoing | None:
        """The frame that gives the window to a server; without one it takes what follows a message."""
        if not shared or not self._scratch.shared or not self._scratch.generation:
            return None
        return Outgoing(self._announcement(), (), (self._scratch.descriptor,))

    def _is_shared(self, server: int) -> bool:
        return self._scratch.shared and self._session.shares[server]

    def _announcement(self) -> m.Scratch:
        return m.Scratch(m.WindowSpec(self._scratch.generation, len(self._scratch.memory)))

    def part(self, place: RowSlice, table: int, server: int) -> m.Rows:
        """What a message says of one server's rows."""
        start, stop = self._bounds(place, server)
        rows_at = place.rows_at + _ITEM * place.dim * start
        return m.Rows(table, stop - start, place.ids_at + _ID * start, rows_at)

    def outgoing(self, place: RowSlice, server: int, *, rows: bool) -> list[NDArray[Any]]:
        """What follows a message to a server that shares no memory: ids, and with `rows` gradients."""
        if self._is_shared(server):
            return []
        here = slice(*self._bounds(place, server))
        return [self._ids(place)[here], self.rows(place)[here]] if rows else [self._ids(place)[here]]

    def incoming(self, places: Sequence[RowSlice], server: int) -> list[Array]:
        """Where rows go that follow the answer of a server that shares no memory."""
        if self._is_shared(server):
            return []
        return [self.rows(place)[slice(*self._bounds(place, server))] for place in places]

    def _bounds(self, place: RowSlice, server: int) -> tuple[int, int]:
        return int(place.plan.bounds[server]), int(place.plan.bounds[server + 1])

    def release(self) -> None:
        """Give the window back."""
        self._scratch.release()
