"""The memory of a request's rows on a server: in the member's scratch window, or private.

Ids are copied in every case, so that what was checked cannot change afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.shard import Shard, StagedRows
from headwater.wire.scratch import ScratchView

_ID, _ITEM = 8, 4


class RowIntake:
    """For one member's connection to the server that hosts `shard`."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._scratch: ScratchView | None = None
        self._private: list[StagedRows] = []
        self._pulled: Sequence[StagedRows] = ()

    def map(self, message: m.Scratch, descriptors: list[int]) -> None:
        """Take over the window in which rows lie from now on.

        Raises:
            ProtocolError: it is not what the message says.
        """
        if len(descriptors) != 1:
            raise ProtocolError(f"scratch came with {len(descriptors)} descriptors, expected 1")
        self._scratch = ScratchView(descriptors.pop(), message.window.size)

    def place(self, message: m.Request, length: int) -> list[NDArray[Any]]:
        """Where ids and gradients go that follow a message as payload: nowhere, with a scratch window.

        Raises:
            ProtocolError: no such table, or more ids than `length` bytes can hold.
        """
        if self._scratch is not None:
            return []
        count = sum(max(rows.count, 0) for rows in rows_of(message))
        if _ID * count > length:
            raise ProtocolError(f"{type(message).__name__} names {count} rows in {length} bytes of payload")
        self._private = [self._room(rows) for rows in rows_of(message)]
        pushed = _pushed(message)
        arrays: list[NDArray[Any]] = []
        for number, staged in enumerate(self._private):
            arrays += [staged.ids, staged.rows] if number < pushed else [staged.ids]
        return arrays

    def _room(self, rows: m.Rows) -> StagedRows:
        dim = self._check(rows)
        return StagedRows(
            rows.table,
            np.empty(rows.count, dtype=np.int64),
            np.empty((rows.count, dim), dtype=np.float32),
        )

    def _check(self, rows: m.Rows) -> int:
        """The table's dim."""
        if rows.count < 0:
            raise ProtocolError(f"{rows.count} rows of table {rows.table}")
        return self._shard.tables[rows.table].spec.dim

    def staged(self, message: m.Request) -> Sequence[StagedRows]:
        """The ids and the memory of each of the message's rows, in its order.

        Raises:
            ProtocolError: no such table, memory outside of the window, or ids that did not come.
        """
        rows = list(rows_of(message))
        if self._scratch is not None:
            staged = [self._mapped(self._scratch, one) for one in rows]
        else:
            staged, self._private = self._private, []
            if len(staged) != len(rows):
                if any(one.count for one in rows):
                    raise ProtocolError(f"{type(message).__name__} names rows, but no ids came with it")
                staged = [self._room(one) for one in rows]
        self._pulled = [] if isinstance(message, m.DeleteRows) else staged[_pushed(message) :]
        return staged

    def _mapped(self, scratch: ScratchView, rows: m.Rows) -> StagedRows:
        dim = self._check(rows)
        ids = scratch.part(rows.ids, _ID * rows.count).view(np.int64).copy()
        memory = scratch.part(rows.rows, _ITEM * dim * rows.count).view(np.float32)
        return StagedRows(rows.table, ids, memory.reshape(rows.count, dim))

    def payload(self) -> list[NDArray[np.float32]]:
        """What follows the answer of the last request: the rows it pulled; nothing, with a scratch window."""
        pulled, self._pulled = self._pulled, ()
        return [] if self._scratch is not None else [one.rows for one in pulled]


def _pushed(message: m.AnyMessage) -> int:
    return len(message.pushed) if isinstance(message, m.Step) else 0


def rows_of(message: m.AnyMessage) -> Iterator[m.Rows]:
    """All rows that a request names, pushed ones first."""
    if isinstance(message, m.Step):
        yield from message.pushed
        yield from message.pulled
    elif isinstance(message, m.PullRows | m.DeleteRows):
        yield message.rows
