"""One member's memory for ids and rows of tables on their way to and from the servers.

It is shared with those servers that can share; to the others its contents travel. Decides and does no I/O:
where the memory lies, and how others are given it, is the business of `RowMemory`.

Slices are valid until `reset`, which the end of a step does; a pull gives its slice back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels.arrange import Ids, Plan
from headwater.kernels.codecs import decode_rows, encode_rows
from headwater.machines.client import ClientMachine
from headwater.machines.connections import Frame
from headwater.spec.codecs import RowCodec

Array = NDArray[np.float32]

_ID, _ITEM = 8, 4


class RowMemory(Protocol):
    """Memory that is given out from the bottom up and taken back from the top down.

    Attributes:
        memory: uint8[size]. used: bytes given out.
        shared: whether others can be given it.
        generation: counts the memories there were; 0 before the first.
        descriptors: what travels to give it to others.
    """

    used: int

    @property
    def memory(self) -> NDArray[np.uint8]: ...
    @property
    def shared(self) -> bool: ...
    @property
    def generation(self) -> int: ...
    @property
    def descriptors(self) -> Sequence[Any]: ...

    def take(self, size: int) -> int:
        """Give out so many bytes; returns their offset, a multiple of 64. May replace the memory."""

    def renew(self) -> None:
        """Go on in memory with the same content that nobody else has."""

    def release(self) -> None:
        """Give nobody else this memory any more."""


@dataclass(frozen=True, slots=True, eq=False)
class RowSlice:
    """Where the ids of a plan and a row of `dim` for each of them lie: byte offsets."""

    plan: Plan
    dim: int
    ids_at: int
    rows_at: int


class RowBuffer:
    """For all tables of the member that `machine` is."""

    def __init__(self, machine: ClientMachine, memory: RowMemory) -> None:
        self._machine = machine
        self._scratch = memory
        self._given: dict[int, int] = {}  # by server, the generation that it has
        machine.connections.buffers.append(self)

    def take(self, plan: Plan, dim: int) -> RowSlice:
        """A slice with the plan's ids written to it. A pull under way must have arrived before.

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
        """What `reset` takes to give back all slices taken from now on."""
        return self._scratch.used

    def reset(self, used: int = 0) -> None:
        """Give back the slices taken since `used` was read, all by default."""
        self._scratch.used = used

    def rows(self, place: RowSlice) -> Array:
        """float32[u, dim], the rows of a slice; a view that a later `take` may make stale."""
        count, size = len(place.plan.ids), _ITEM * place.dim * len(place.plan.ids)
        flat = self._scratch.memory[place.rows_at : place.rows_at + size].view(np.float32)
        return flat.reshape(count, place.dim)

    def encode(self, place: RowSlice, codec: RowCodec) -> list[NDArray[np.uint8]]:
        """The bytes of the rows of each server; makes the rows what these stand for."""
        rows, pieces = self.rows(place), []
        for server in range(len(place.plan.bounds) - 1):
            here = slice(*self._bounds(place, server))
            pieces.append(encode_rows(codec, rows[here]))
            decode_rows(codec, pieces[-1], rows[here])
        return pieces

    def _ids(self, place: RowSlice) -> Ids:
        size = _ID * len(place.plan.ids)
        return self._scratch.memory[place.ids_at : place.ids_at + size].view(np.int64)

    # ── on the way ──────────────────────────────────────────────────────────────────────────────

    def part(self, place: RowSlice, table: int, server: int) -> m.Rows:
        """What a message says of one server's rows."""
        start, stop = self._bounds(place, server)
        rows_at = place.rows_at + _ITEM * place.dim * start
        return m.Rows(table, stop - start, place.ids_at + _ID * start, rows_at)

    def outgoing(
        self, place: RowSlice, server: int, *, rows: bool, coded: Sequence[NDArray[np.uint8]] = ()
    ) -> list[NDArray[Any]]:
        """What follows a message to a server that shares no memory: ids, and with `rows` gradients, which are
        `coded` for each server where a codec was at work."""
        if self._is_shared(server):
            return []
        here = slice(*self._bounds(place, server))
        if coded and rows:
            return [self._ids(place)[here], coded[server]]
        return [self._ids(place)[here], self.rows(place)[here]] if rows else [self._ids(place)[here]]

    def incoming(self, places: Sequence[RowSlice], server: int) -> list[Array]:
        """Where rows go that follow the answer of a server that shares no memory."""
        if self._is_shared(server):
            return []
        return [self.rows(place)[slice(*self._bounds(place, server))] for place in places]

    def _bounds(self, place: RowSlice, server: int) -> tuple[int, int]:
        return int(place.plan.bounds[server]), int(place.plan.bounds[server + 1])

    # ── with the member's connections ───────────────────────────────────────────────────────────

    def renew(self) -> None:
        """Go on in memory with the same content that nobody else has."""
        if self._scratch.generation:
            self._scratch.renew()

    def offer(self, server: int, shared: bool, anew: bool) -> Frame | None:
        """What gives the memory to a server that does not have this one, and can share memory."""
        if anew:
            self._given.pop(server, None)
        generation = self._scratch.generation
        if not shared or not self._scratch.shared or self._given.get(server, 0) == generation:
            return None
        self._given[server] = generation
        window = m.WindowSpec(len(self._scratch.memory))
        return Frame(m.Scratch(window), (), self._scratch.descriptors)

    def _is_shared(self, server: int) -> bool:
        return self._scratch.shared and self._machine.shares[server]

    def release(self) -> None:
        """Give the memory back."""
        self._scratch.release()
