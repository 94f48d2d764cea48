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
        if isinstance(message, m.AssignRows) and length != count * (_ID + _ITEM * message.width):
            raise ProtocolError(f"{count} rows of {message.width} floats in {length} bytes of payload")
        self._private = [self._room(message, rows) for rows in rows_of(message)]
        pushed = _pushed(message)
        arrays: list[NDArray[Any]] = []
        for number, staged in enumerate(self._private):
            arrays += [staged.ids, staged.rows] if number < pushed else [staged.ids]
        return arrays

    def _room(self, message: m.Request, rows: m.Rows) -> StagedRows:
        width = self._check(message, rows)
        return StagedRows(
            rows.table,
            np.empty(rows.count, dtype=np.int64),
            np.empty((rows.count, width), dtype=np.float32),
        )

    def _check(self, message: m.Request, rows: m.Rows) -> int:
        """Floats of each of the rows."""
        if rows.count < 0:
            raise ProtocolError(f"{rows.count} rows of table {rows.table}")
        table = self._shard.tables[rows.table]
        if not isinstance(message, m.AssignRows):
            return table.spec.dim
        if message.width != table.width_of(message.state):
            raise ProtocolError(f"rows of {message.width} floats, expected {table.width_of(message.state)}")
        return message.width

    def staged(self, message: m.Request) -> Sequence[StagedRows]:
        """The ids and the memory of each of the message's rows, in its order.

        Raises:
            ProtocolError: no such table, memory outside of the window, or ids that did not come.
        """
        rows = list(rows_of(message))
        if self._scratch is not None:
            staged = [self._mapped(self._scratch, message, one) for one in rows]
        else:
            staged, self._private = self._private, []
            if len(staged) != len(rows):
                if any(one.count for one in rows):
                    raise ProtocolError(f"{type(message).__name__} names rows, but no ids came with it")
                staged = [self._room(message, one) for one in rows]
        self._pulled = staged[_pushed(message) :] if isinstance(message, m.Step | m.PullRows) else []
        return staged

    def _mapped(self, scratch: ScratchView, message: m.Request, rows: m.Rows) -> StagedRows:
        dim = self._check(message, rows)
        ids = scratch.part(rows.ids, _ID * rows.count).view(np.int64).copy()
        memory = scratch.part(rows.rows, _ITEM * dim * rows.count).view(np.float32)
        return StagedRows(rows.table, ids, memory.reshape(rows.count, dim))

    def payload(self) -> list[NDArray[np.float32]]:
        """What follows the answer of the last request: the rows it pulled; nothing, with a scratch window."""
        pulled, self._pulled = self._pulled, ()
        return [] if self._scratch is not None else [one.rows for one in pulled]


def _pushed(message: m.AnyMessage) -> int:
    """How many of the rows that a message names come with it."""
    if isinstance(message, m.AssignRows):
        return 1
    return len(message.pushed) if isinstance(message, m.Step) else 0


def rows_of(message: m.AnyMessage) -> Iterator[m.Rows]:
    """All rows that a request names, pushed ones first."""
    if isinstance(message, m.Step):
        yield from message.pushed
        yield from message.pulled
    elif isinstance(message, m.PullRows | m.DeleteRows | m.AssignRows):
        yield message.rows
