"""All rows of a table as of one version, for a worker: a publication of that table alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import RefusedError, named
from headwater.machines.connections import Frame
from headwater.runtime.client import Client
from headwater.shard.version_copy import VersionCopy
from headwater.spec.amounts import whole

Rows = Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]


def scan_rows(session: Client, table: int, spec: m.TableSpec, batch: int) -> Rows:
    """The rows in pieces of `batch`; `Table.scan` says what it raises."""
    return _scanned(session, table, spec, whole("scan: batch", batch))


def _scanned(session: Client, table: int, spec: m.TableSpec, batch: int) -> Rows:
    copy = VersionCopy({}, {table: spec}, "float32", len(session.channels))

    def frame(server: int, number: int) -> Frame:
        copy.expect(server)
        return Frame(m.Publish(number, (), (m.Wanted(table),)))

    parts: list[m.Publication] = session.call(frame, "scan", copy.place, m.Publication)
    for part in parts:
        if part.failure is not None:
            raise named(part.failure.error, part.failure.reason, default=RefusedError)
    copy.install(parts)
    session.ask(m.Taken, "scan")
    yield from copy.tables[table].scan(batch)
