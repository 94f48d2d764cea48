"""A running cluster's table as a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.row_files import Column, check_format, write_columns
from headwater.checkpoint.store import Location
from headwater.follower.public import Follower
from headwater.follower.view import View
from headwater.spec.version import Version
from headwater.wire.security import Security


def export_rows(address: str, table: str, file: Location, *, security: Security) -> tuple[int, Version]:
    """Write all rows of a table as of one version; returns how many, and of which. Blocks.

    Raises:
        ConfigurationError: no such table, which lists those that there are, or another format.
        CheckpointError: the file cannot be written.
        ConnectionLostError, RefusedError: as of `hw.follow`.
    """
    check_format(file)
    with (
        Follower(address, (), (table,), "1000s", security=security) as follower,
        follower.pin() as view,
    ):
        rows = sum(len(ids) for ids, _ in view.scan(table))
        dim = view.rows(table, []).shape[-1]
        columns = [
            Column("ids", np.dtype("<i8"), 0, lambda: _part(view, table, 0)),
            Column("values", np.dtype("<f4"), dim, lambda: _part(view, table, 1)),
        ]
        write_columns(file, rows, columns)
        return rows, view.version


def _part(view: View, table: str, which: int) -> Iterator[NDArray[Any]]:
    for part in view.scan(table):
        yield part[which]
