"""A server's part of one table: the rows of its virtual slots, and the passes over them.

A state machine without I/O. Arrays that are passed in stay the caller's and are C-contiguous.

Invariants:
- A row exists only once a gradient for it was admitted. What is pulled of an absent id is what its first
  update starts from.
- What happens to a row depends on what is pushed to its virtual slot alone, in order: never on the number
  of servers, or on whether an expired row was swept yet.
- A gradient is tied to its id: one that is dropped moves no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater import initializers, rules
from headwater.errors import ProtocolError, RegistrationError
from headwater.kernels.arrange import unite
from headwater.kernels.index import Index
from headwater.kernels.rows import ages, begin, combine, fill, gather, row_rule, stamp
from headwater.kernels.slabs import Slabs
from headwater.lifetime import AfterSteps, LeastRecentlyUsed, admission_from_spec, expiry_from_spec
from headwater.messages import TableSpec, TableStatistics
from headwater.shard.scalars import Scalars

Ids: TypeAlias = NDArray[np.int64]
Array: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int32]

MOST_COLUMNS = 1 << 16
_ITEM = 4
_SWEEPS = 64
"""Updates in which every slot is swept once."""


class Table:
    """The rows of `server_slots` of the table `spec`.

    Raises:
        RegistrationError: an impossible dim.
        ConfigurationError: an unknown or impossible rule, initialiser, admission or expiry.
    """

    def __init__(self, spec: TableSpec, server_slots: range) -> None:
        if not 1 <= spec.dim <= MOST_COLUMNS:
            raise RegistrationError(
                f"table {spec.name!r} has dim {spec.dim}: pass a dim from 1 to {MOST_COLUMNS}"
            )
        self.spec = spec
        self.rule = rules.from_spec(spec.rule)
        self._initializer = initializers.from_spec(spec.initializer)
        self._expiry = None if spec.expiry is None else expiry_from_spec(spec.expiry)
        admission = None if spec.admission is None else admission_from_spec(spec.admission)
        self._apply_rule = row_rule(self.rule)
        self._scalars = Scalars(self.rule)
        self._index = Index(server_slots, admission.count if admission else 1)
        self._slots = len(server_slots)
        self._width = 1 if self.rule.rows_only else spec.dim
        states = [self._width * _ITEM] * len(self.rule.states())
        last = [_ITEM] if self._expiry else []
        self._slabs = Slabs([spec.dim * _ITEM, *states, *last])
        self._last = len(states) + 1
        self._step = 0
        self._swept = 0
        self._updates = self._refused = self._expired = self._pulled = self._hits = 0

    def set(self, values: dict[str, float]) -> None:
        """Change scalars of the rule, as `Rule.with_settings`."""
        self.rule = self.rule.with_settings(**values)
        self._scalars = Scalars(self.rule)

    @property
    def updates(self) -> int:
        """Commits that touched this table, which schedules are evaluated at."""
        return self._updates

    def check(self, ids: Ids) -> None:
        """Refuse ids that this server does not hold; `pull`, `apply` and `delete` rely on it.

        Raises:
            ProtocolError: there is one.
        """
        stranger = self._index.stranger(ids)
        if stranger is not None:
            raise ProtocolError(f"table {self.spec.name!r}: id {stranger} belongs to another server")

    # ── reading ─────────────────────────────────────────────────────────────────────────────────

    def pull(self, ids: Ids, out: Array, step: int) -> None:
        """Write the row of each of int64[n] ids to `out`, float32[n, dim]; nothing else changes.

        `step`: the version this is read at. An absent id has its initial value.
        """
        rows, hits = self._index.find(ids)
        if isinstance(self._expiry, AfterSteps):
            rows[self._ages(rows, step) > self._expiry.steps] = -1
            hits = int(np.count_nonzero(rows >= 0))
        gather(rows, self._slabs, self.spec.dim, out)
        if hits < len(ids):
            absent = np.flatnonzero(rows < 0)
            places = out.ctypes.data + absent * (self.spec.dim * _ITEM)
            begin(ids[absent], places, self.spec.dim, self._initializer, self.spec.seed)
        self._pulled += len(ids)
        self._hits += hits
        self._step = max(self._step, step)

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def apply(
        self, updates: Sequence[tuple[Ids, Array]], divisor: float, step: int, updates_of_schedule: int
    ) -> None:
        """Apply one commit: for each id the sum of its gradients, divided, through the rule once.

        Args:
            updates: for each worker, in rank order, int64[n] ids without repeats and float32[n, dim]
                gradients.
            divisor: what sums are divided by; rules that always add ignore it.
            step: version of this commit, never less than that of an earlier call.
            updates_of_schedule: commits before this one, which schedules are evaluated at.

        Raises:
            EnvironmentFailure: no more rows can be held; nothing changed.
        """
        ids, gradients = self._united(updates)
        if isinstance(self._expiry, AfterSteps):
            self._end_expired(ids, self._index.find(ids)[0], step)
        self._slabs.reserve(self._index.high_water + len(ids))
        rows, counts, fresh, refused = self._index.claim(ids)
        self._begin_rows(ids[fresh], rows[fresh])
        lines, which = self._scalars.look_up(updates_of_schedule, counts)
        scale = 1.0 if self.rule.always_sum else float(divisor)
        addresses, shift = self._slabs.addresses, self._slabs.shift
        self._apply_rule(rows, gradients.ctypes.data, scale, addresses, shift, self.spec.dim, lines, which)
        self._step = max(self._step, step)
        self._updates += 1
        self._refused += refused
        self._end_rows(rows, step)

    def _united(self, updates: Sequence[tuple[Ids, Array]]) -> tuple[Ids, Array]:
        """Ids once each, and their gradients summed in rank order."""
        if len(updates) == 1:
            return updates[0]
        ids, inverses = unite([part for part, _ in updates])
        sums = np.empty((len(ids), self.spec.dim), dtype=np.float32)
        seen = np.zeros(len(ids), dtype=np.uint8)
        for inverse, (_, gradients) in zip(inverses, updates, strict=True):
            combine(inverse, gradients, sums, seen)
        return ids, sums

    def _begin_rows(self, ids: Ids, rows: Rows) -> None:
        if not len(ids):
            return
        begin(ids, self._slabs.place(0, rows), self.spec.dim, self._initializer, self.spec.seed)
        for slab, value in enumerate(self.rule.states().values(), start=1):
            fill(self._slabs.place(slab, rows), self._width, value)

    def delete(self, ids: Ids) -> int:
        """Forget int64[n] ids: rows, states, counts, and updates counted before admission.

        Returns how many had a row. A later push starts from the initial value.
        """
        return self._index.remove(ids)

    # ── rows that end ───────────────────────────────────────────────────────────────────────────

    def _ages(self, rows: Rows, step: int) -> NDArray[np.uint32]:
        """Versions since the last applied gradient: exact, since swept rows are never 2³² versions old."""
        return ages(rows, self._slabs, self._last, step)

    def _end_expired(self, ids: Ids, rows: Rows, step: int) -> None:
        """Drop those of `ids`, which have `rows`, that expired."""
        assert isinstance(self._expiry, AfterSteps)
        expired = ids[self._ages(rows, step) > self._expiry.steps]
        if len(expired):
            self._expired += self._index.remove(expired)

    def _end_rows(self, rows: Rows, step: int) -> None:
        """After an update of `rows`: note its step, sweep some slots, trim those above their share."""
        if self._expiry is None:
            return
        stamp(rows, self._slabs, self._last, step)
        if isinstance(self._expiry, LeastRecentlyUsed):
            self._trim(self._expiry, step)
            return
        stop = min(self._swept + -(-self._slots // _SWEEPS), self._slots)
        self._end_expired(*self._index.entries(self._swept, stop), step)
        self._swept = stop % self._slots

    def _trim(self, expiry: LeastRecentlyUsed, step: int) -> None:
        for slot in np.flatnonzero(self._index.used > expiry.share):
            ids, rows = self._index.entries(int(slot), int(slot) + 1)
            oldest = _oldest(ids, self._ages(rows, step), len(ids) - expiry.kept)
            self._expired += self._index.remove(oldest)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        """Rows that exist as of the last step seen; with `AfterSteps` a pass over the index."""
        if not isinstance(self._expiry, AfterSteps):
            return len(self._index)
        _, rows = self._index.entries(0, self._slots)
        return int(np.count_nonzero(self._ages(rows, self._step) <= self._expiry.steps))

    def statistics(self) -> TableStatistics:
        """Counts since the table exists, and bytes in use now."""
        return TableStatistics(
            name=self.spec.name,
            dim=self.spec.dim,
            rule=self.rule.name,
            rows=len(self._index),
            resident=self._index.nbytes + self._index.high_water * sum(self._slabs.row_bytes),
            updates=self._updates,
            refused=self._refused,
            expired=self._expired,
            pulled=self._pulled,
            hits=self._hits,
        )


def _oldest(ids: Ids, ages: NDArray[np.uint32], count: int) -> Ids:
    """The `count` ids that are oldest; of the same age, the smallest."""
    youngest = np.partition(ages, len(ages) - count)[len(ages) - count]
    older = ids[ages > youngest]
    return np.concatenate([older, np.sort(ids[ages == youngest])[: count - len(older)]])
