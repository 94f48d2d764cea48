"""Rows of one table that come before they are asked for: which a step brings, and which a read may use.

Invariants:
- Rows that came ahead are used once, for the ids that they were asked for, and only as long as they are of
  the version of this worker's last answer: so a read never goes back behind what the worker has seen.
- The next step brings what was asked for last, unless it was read meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.kernels.arrange import Ids, Plan

_FEW = 2048
"""Ids up to which comparing copies of their bytes is quicker than NumPy's comparison."""

_GLANCE = 64
"""Ids compared first: batches that differ nearly always differ there."""


def same_ids(one: Ids, other: Ids) -> bool:
    """Whether both have the same shape and ids."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    if one.size <= _FEW:
        return one.tobytes() == other.tobytes()
    return np.array_equal(one.ravel()[:_GLANCE], other.ravel()[:_GLANCE]) and np.array_equal(one, other)


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """Rows that came before they were asked for: float32[u, dim] of a plan, as of `version`."""

    plan: Plan
    given: Ids
    rows: NDArray[np.float32]
    version: int


class RowsAhead:
    """Of one worker.

    Attributes:
        wanted: ids whose rows the next step brings, and their plan.
    """

    def __init__(self) -> None:
        self.wanted: tuple[Ids, Plan] | None = None
        self._there: list[Ahead] = []

    def want(self, given: Ids, plan: Plan) -> None:
        """Have the next step bring the rows of these; replaces what was wanted, or has come, before."""
        self._there.clear()
        self.wanted = (given, plan) if len(plan.ids) else None

    def asked(self, given: Ids) -> None:
        """These are about to be read, so the next step need not bring them."""
        if self.wanted is not None and same_ids(self.wanted[0], given):
            self.wanted = None

    def leaves(self) -> Plan | None:
        """A step is sent: whose rows it is to bring. What came ahead of it is older than its answer."""
        self._there.clear()
        return None if self.wanted is None else self.wanted[1]

    def brought(self, plan: Plan, rows: NDArray[np.float32], version: int) -> None:
        """A step has brought the rows that were wanted; they are kept as they are."""
        assert self.wanted is not None
        (given, _), self.wanted = self.wanted, None
        self.put(Ahead(plan, given, rows, version))

    def put(self, ahead: Ahead) -> None:
        """These came."""
        self._there.append(ahead)

    def find(self, given: Ids, version: int) -> Ahead | None:
        """As `take`, but leave them there."""
        for one in self._there:
            if one.version == version and same_ids(one.given, given):
                return one
        return None

    def take(self, given: Ids, version: int) -> Ahead | None:
        """The rows of these ids, once; None where there are none of `version`, the worker's last one."""
        found = self.find(given, version)
        if found is not None:
            self._there.remove(found)
        return found
