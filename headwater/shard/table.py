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
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ProtocolError, RegistrationError, UsageError
from headwater.kernels.arrange import trace, unite
from headwater.kernels.index import Index
from headwater.kernels.rows import ages, begin, combine, fill, gather, oldest, row_rule, scatter, stamp
from headwater.kernels.slabs import Slabs
from headwater.messages import SettingValue, TableSpec, TableStatistics
from headwater.shard.cuts import TableCut
from headwater.shard.governed import GovernedRules
from headwater.shard.scalars import Scalars
from headwater.shard.snapshot import TableSnapshot
from headwater.shard.touched import Touched
from headwater.spec import initializers
from headwater.spec.lifetime import AfterSteps, LeastRecentlyUsed, admission_from_spec, expiry_from_spec
from headwater.spec.rules import Rule

Ids: TypeAlias = NDArray[np.int64]
Array: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int32]
Gradients: TypeAlias = tuple[Ids, Array]
"""Ids, int64[n], each once, and their gradients, float32[n, dim]."""

MOST_COLUMNS = 1 << 16
_ITEM = 4
_NO_LAST = np.empty(0, dtype=np.int32)
_NO_IDS = np.empty(0, dtype=np.int64)
_NOTHING = np.empty(0, dtype=np.float32)
_NO_BOUNDS = np.empty(0, dtype=np.int64)
_PREPARED, _PREPARED_FIRST = 32 << 20, 1 << 20
"""Bytes of rows that memory is prepared for ahead at most, and of a table that has none yet."""
_PUSHES_AHEAD = 4
"""Memory is prepared for as many new rows as so many updates bring, once there is less than half of that."""
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
        self.governed = GovernedRules([spec.rule])
        self._initializer = initializers.from_spec(spec.initializer)
        self._expiry = None if spec.expiry is None else expiry_from_spec(spec.expiry)
        admission = None if spec.admission is None else admission_from_spec(spec.admission)
        self._apply_rule = row_rule(self.rule)
        self._scalars = Scalars(self.rule)
        self._index = Index(server_slots, admission.count if admission else 1)
        self._slots = len(server_slots)
        self._all_slots = np.arange(self._slots)
        self._width = 1 if self.rule.rows_only else spec.dim
        states = [self._width * _ITEM] * len(self.rule.states())
        last = [_ITEM] if self._expiry else []
        self._slabs = Slabs([spec.dim * _ITEM, *states, *last])
        self._last = len(states) + 1
        self._step: int | None = None
        self._swept = 0
        self._ahead = _PREPARED_FIRST // sum(self._slabs.row_bytes)
        self._slabs.reserve(self._ahead)
        self.unprepared = True
        self.touched = Touched()
        self._updates = self._begun = self._refused = self._expired = self._pulled = self._hits = 0

    @property
    def rule(self) -> Rule:
        """With the settings in force."""
        return self.governed.rules[0]

    def set(self, values: dict[str, SettingValue]) -> None:
        """Change settings of the rule, as `Rule.with_settings`."""
        self.governed.set(0, values)
        self._scalars = Scalars(self.rule)

    def declared(self, spec: TableSpec) -> str:
        """A member declares this table, which is no other one; what a person should know of it, or "".

        Raises:
            RegistrationError: a new setting needs other states. Nothing changed.
        """
        told = self.governed.declare(f"table {spec.name!r}", [spec.rule])
        self._scalars = Scalars(self.rule)
        return told

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
        self._see(step)

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def apply(
        self,
        updates: Sequence[Gradients],
        divisor: float,
        step: int,
        updates_of_schedule: int,
        weights: Array | None = None,
    ) -> None:
        """Apply one commit: for each id the sum of its gradients, divided, through the rule once.

        Args:
            updates: for each worker, in rank order, int64[n] ids without repeats and float32[n, dim]
                gradients.
            divisor: what sums are divided by; rules that always add ignore it.
            step: version of this commit, never less than that of an earlier call.
            updates_of_schedule: commits before this one, which schedules are evaluated at.
            weights: float32[workers], what each gradient is multiplied by before they are added up; None: 1.
                Rules that always add ignore them.

        Raises:
            EnvironmentFailure: no more rows can be held; nothing changed.
        """
        self.governed.begin()
        updates = self._weighted(updates, weights)
        ids, sources, bounds = self._traced(updates)
        if isinstance(self._expiry, AfterSteps):
            self._end_expired(ids, self._index.find(ids)[0], step)
        self._slabs.reserve(self._index.high_water + (1 + _PUSHES_AHEAD) * len(ids))  # room to prepare
        rows, counts, fresh, refused = self._index.claim(ids)
        self._begin_rows(ids[fresh], rows[fresh])
        self._begun += len(fresh)
        if len(fresh):
            self._ahead = min(_PUSHES_AHEAD * len(fresh), _PREPARED // sum(self._slabs.row_bytes))
            self.unprepared |= self._slabs.prepared - self._index.high_water < self._ahead // 2
        lines, which = self._scalars.look_up(updates_of_schedule, counts)
        scale = 1.0 if self.rule.always_sum else float(divisor)
        addresses, shift = self._slabs.addresses, self._slabs.shift
        self._apply_rule(rows, sources, bounds, scale, addresses, shift, self.spec.dim, lines, which)
        self._see(step)
        self._updates += 1
        self._refused += refused
        self.touched.add(ids, step, len(self._index))
        self._end_rows(rows, step)

    def reduce(self, updates: Sequence[Gradients], weights: Array | None = None) -> Gradients:
        """Ids once each, and their gradients summed in rank order: what `apply` adds up, for a standby."""
        updates = self._weighted(updates, weights)
        if len(updates) == 1:
            return updates[0]
        ids, inverses = unite([part for part, _ in updates])
        sums = np.empty((len(ids), self.spec.dim), dtype=np.float32)
        combine(zip(inverses, (gradients for _, gradients in updates), strict=True), sums)
        return ids, sums

    def prepare(self) -> None:
        """Have memory ready for as many new rows as the next updates may bring, up to `_PREPARED` bytes.

        A push then does not wait for the system to give it memory, which on a virtual machine whose host
        gives it at its first use takes some milliseconds a MB. May be called at any time by one thread, also
        beside another one's call: it reads where the table ends, and changes no row. Blocks, without the
        interpreter's lock.
        """
        self.unprepared = False
        if self._ahead:
            self._slabs.prepare(lambda: self._index.high_water, self._ahead)
        if self._begun:
            self._index.prepare()

    def _weighted(self, updates: Sequence[Gradients], weights: Array | None) -> Sequence[Gradients]:
        if weights is None or self.rule.always_sum:
            return updates
        return [(ids, rows * weight) for (ids, rows), weight in zip(updates, weights, strict=True)]

    def _traced(self, updates: Sequence[Gradients]) -> tuple[Ids, Ids, Ids]:
        """Ids once each, and where their gradients are, in rank order, as a rule's row pass takes them."""
        lists = [(ids, gradients.ctypes.data) for ids, gradients in updates]
        if len(lists) == 1:
            return lists[0][0], np.array([lists[0][1]]), _NO_BOUNDS
        return trace(lists, self.spec.dim * _ITEM)

    def _see(self, step: int) -> None:
        self._step = step if self._step is None else max(self._step, step)

    def _begin_rows(self, ids: Ids, rows: Rows) -> None:
        if not len(ids):
            return
        begin(ids, self._slabs.place(0, rows), self.spec.dim, self._initializer, self.spec.seed)
        for slab, value in enumerate(self.rule.states().values(), start=1):
            fill(self._slabs.place(slab, rows), self._width, value)

    def width_of(self, state: bool) -> int:
        """Floats of a row as `assign` takes it."""
        return self.spec.dim + (self._width * len(self.rule.states()) + 1 if state else 0)

    def check_state(self, rows: Array) -> None:
        """Refuse rows with states for `assign` whose counts cannot be.

        Raises:
            UsageError: a count below 0.
        """
        counts = rows[:, -1].copy().view(np.int32)
        if len(counts) and int(counts.min()) < 0:
            raise UsageError(f"table {self.spec.name!r}: a row cannot have had {counts.min()} updates")

    def assign(self, ids: Ids, rows: Array, state: bool, step: int) -> None:
        """Set the rows of int64[n] ids, which differ; those without one get one, whatever admission says.

        Args:
            rows: float32[n, width_of(state)]: values, then with `state` each state and the count of updates,
                as int32. Without, states are initial ones and the next update is the first.
            step: version of this change, to which expiry counts from here on.

        Raises:
            EnvironmentFailure: no more rows can be held; nothing changed.
        """
        rows = rows.copy()  # members may change what they share
        dim, width = self.spec.dim, self._width
        self._slabs.reserve(self._index.high_water + len(ids))
        counts = rows[:, -1].copy().view(np.int32).clip(min=0) if state else np.zeros(len(ids), np.int32)
        places = self._index.put(ids, counts)
        scatter(places, self._slabs, dim, np.ascontiguousarray(rows[:, :dim]))
        for slab, initial in enumerate(self.rule.states().values(), start=1):
            if state:
                begin_at = dim + width * (slab - 1)
                part = np.ascontiguousarray(rows[:, begin_at : begin_at + width])
                scatter(places, self._slabs, width, part, slab)
            else:
                fill(self._slabs.place(slab, places), width, initial)
        self._see(step)
        self.touched.add(ids, step, len(self._index))
        self._end_rows(places, step)

    def delete(self, ids: Ids, step: int) -> int:
        """Forget int64[n] ids: rows, states, counts, and updates counted before admission.

        Returns how many had a row that had not expired by version `step`. A later push starts from the
        initial value.
        """
        if isinstance(self._expiry, AfterSteps):
            self._end_expired(ids, self._index.find(ids)[0], step)
        self._see(step)
        self.touched.add(ids, step, len(self._index))
        return self._index.remove(ids)

    # ── as plain arrays ─────────────────────────────────────────────────────────────────────────

    def cut(self, have: int, step: int) -> TableCut:
        """The rows at version `step` for a follower that has those at version `have`, -1 for none; copies.

        Blocks for a pass over what was touched since, or over the table where that is not known.
        """
        touched = self.touched.after(have) if have >= 0 else None
        if touched is None:
            ids, rows, _ = self._index.entries(self._all_slots)
        else:
            ids, rows = touched, self._index.find(touched)[0]
        there = rows >= 0
        if isinstance(self._expiry, AfterSteps):
            there &= self._ages(rows, step) <= self._expiry.steps
        deleted = _NO_IDS if touched is None else ids[~there]
        ids, rows = ids[there], rows[there]
        values = np.empty((len(rows), self.spec.dim), dtype=np.float32)
        gather(rows, self._slabs, self.spec.dim, values)
        last = None
        if isinstance(self._expiry, AfterSteps):
            last = np.empty(len(rows), dtype=np.int32)
            gather(rows, self._slabs, 1, last, self._last)
        return TableCut(-1 if touched is None else have, ids, values, deleted, last)

    def snapshot(self, step: int | None = None) -> TableSnapshot:
        """The rows, and what admission counted, as copies; rows that expired by version `step` are not among
        them, by default the last version seen here. Blocks for a pass over the table.
        """
        ids, rows, counts = self._index.entries(self._all_slots)
        step = self._step if step is None else step
        if isinstance(self._expiry, AfterSteps) and step is not None:
            living = self._ages(rows, step) <= self._expiry.steps
            ids, rows, counts = ids[living], rows[living], counts[living]
        parts = [np.empty((len(rows), size // _ITEM), dtype=np.float32) for size in self._slabs.row_bytes]
        for slab, part in enumerate(parts):
            gather(rows, self._slabs, part.shape[1], part, slab)
        pending_ids, pending_counts = self._index.pending()
        last = parts[self._last].reshape(-1).view(np.int32) if self._expiry else _NO_LAST
        return TableSnapshot(
            spec=self.spec,
            rule=self.governed.specs[0],
            ids=ids,
            counts=counts,
            last=last,
            values=parts[0],
            states=dict(zip(self.rule.states(), parts[1 : self._last], strict=True)),
            pending_ids=pending_ids,
            pending_counts=pending_counts,
            updates=self._updates,
            program=self.governed.record(),
        )

    @classmethod
    def from_snapshot(cls, snapshot: TableSnapshot, server_slots: range) -> Table:
        """The table that goes on from there; its statistics begin anew but for `updates`.

        Args:
            snapshot: one, or what several have of `server_slots`, in any order of slots. Copied.

        Raises:
            ProtocolError: arrays that do not fit each other or the table, an id of another server, or one
                that stands there twice.
            EnvironmentFailure: more rows than a server can hold.
            RegistrationError, ConfigurationError: as of `Table`.
        """
        table = cls(snapshot.spec, server_slots)
        table.governed.restore([snapshot.rule], snapshot.program)
        table._scalars = Scalars(table.rule)
        table._updates = snapshot.updates
        table._fill(snapshot)
        return table

    def _fill(self, snapshot: TableSnapshot) -> None:
        n, m = len(snapshot.ids), len(snapshot.pending_ids)
        ids = self._fitting("ids", snapshot.ids, np.int64, n)
        counts = self._fitting("counts", snapshot.counts, np.int32, n)
        pending_ids = self._fitting("pending_ids", snapshot.pending_ids, np.int64, m)
        pending_counts = self._fitting("pending_counts", snapshot.pending_counts, np.int32, m)
        slabs = [self._fitting("values", snapshot.values, np.float32, n, self.spec.dim)]
        for name in self.rule.states():
            state = snapshot.states.get(name, _NOTHING)
            slabs.append(self._fitting(f"state {name!r}", state, np.float32, n, self._width))
        if self._expiry:
            slabs.append(self._fitting("last", snapshot.last, np.int32, n))
        if n and int(counts.min()) < 0:
            raise ProtocolError(f"table {self.spec.name!r}: a row has {counts.min()} updates: it is damaged")
        self._index.fill(ids, counts)
        self._index.fill_pending(pending_ids, pending_counts)
        self._slabs.reserve(n)
        for slab, part in enumerate(slabs):
            scatter(np.arange(n, dtype=np.int32), self._slabs, part.size // max(n, 1), part, slab)

    def _fitting(self, name: str, array: NDArray[Any], dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        """The array as kernels take it."""
        if array.dtype != dtype or array.shape != shape:
            raise ProtocolError(
                f"table {self.spec.name!r}: {name} of a snapshot is {array.dtype}{list(array.shape)}, "
                f"expected {np.dtype(dtype)}{list(shape)}: it is another table's, or damaged"
            )
        return np.require(array, requirements=["C", "W"])

    # ── rows that end ───────────────────────────────────────────────────────────────────────────

    def _ages(self, rows: Rows, step: int) -> NDArray[np.uint32]:
        """Versions since the last applied gradient: exact, since swept rows are never 2³² versions old."""
        return ages(rows, self._slabs, self._last, step)

    def _end_expired(self, ids: Ids, rows: Rows, step: int) -> None:
        """Drop those of `ids`, which have `rows`, that expired."""
        assert isinstance(self._expiry, AfterSteps)
        expired = ids[self._ages(rows, step) > self._expiry.steps]
        if len(expired):
            self._drop(expired, step)

    def _drop(self, expired: Ids, step: int) -> None:
        self.touched.add(expired, step, len(self._index))
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
        swept = self._index.entries(np.arange(self._swept, stop))
        self._end_expired(swept.ids, swept.rows, step)
        self._swept = stop % self._slots

    def _trim(self, expiry: LeastRecentlyUsed, step: int) -> None:
        slots = np.flatnonzero(self._index.used > expiry.share)
        if not len(slots):
            return
        ids, rows, _ = self._index.entries(slots)
        bounds = np.append(0, np.cumsum(self._index.used[slots], dtype=np.int64))
        self._drop(oldest(ids, self._ages(rows, step), bounds, expiry.kept), step)

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def count(self, step: int) -> int:
        """Rows that exist at version `step`, not before the last seen; with `AfterSteps` a pass over them."""
        if not isinstance(self._expiry, AfterSteps):
            return len(self._index)
        rows = self._index.entries(self._all_slots).rows
        return int(np.count_nonzero(self._ages(rows, step) <= self._expiry.steps))

    def __len__(self) -> int:
        """`count` at the last version seen; of a table from a snapshot, its rows until one is."""
        return len(self._index) if self._step is None else self.count(self._step)

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
            begun=self._begun,
            pulled=self._pulled,
            hits=self._hits,
        )
