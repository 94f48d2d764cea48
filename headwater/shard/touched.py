"""Which ids of a table were touched after which version, for followers that have an older one.

Kept only while somebody follows the table. It is no part of the shared state: a server that has it no more,
such as a promoted standby, sends all rows instead of what was touched.

Invariants:
- What `after` returns contains every id whose row was written, made or dropped since, and may contain more.
- Memory is bounded by a few bytes a row of the table, however long nobody asks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_LEAST = 1 << 16
"""Ids that may always be kept."""


class Touched:
    """Of one table.

    Attributes:
        since: ids touched after this version are known; None: nothing is noted.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._parts: list[tuple[int, Ids]] = []
        self._count = 0

    def begin(self, version: int) -> None:
        """Note what is touched after `version`, unless that is noted already."""
        if self.since is None:
            self.since = version

    def end(self) -> None:
        """Nobody asks any more."""
        self.since, self._parts, self._count = None, [], 0

    def add(self, ids: Ids, version: int, rows: int) -> None:
        """These were touched in `version`; the table has `rows`. The ids stay the caller's."""
        if self.since is None or not len(ids):
            return
        self._parts.append((version, ids.copy()))
        self._count += len(ids)
        if self._count > max(_LEAST, 2 * rows):
            self._shorten(version)

    def _shorten(self, version: int) -> None:
        """Keep every id once; where that is no less than all rows, followers get all rows instead."""
        united = np.unique(np.concatenate([ids for _, ids in self._parts]))
        if 2 * len(united) > self._count:
            self.since, self._parts, self._count = version, [], 0
        else:
            self._parts, self._count = [(version, united)], len(united)

    def after(self, version: int) -> Ids | None:
        """int64[n], each once: at least what was touched after `version`; None: that is not known."""
        if self.since is None or version < self.since:
            return None
        parts = [ids for touched, ids in self._parts if touched > version]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
