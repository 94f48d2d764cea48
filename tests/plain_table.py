"""A table as a plain dictionary: what `headwater.shard.table.Table` is tested against."""

from dataclasses import dataclass, field

import numpy as np
import plain_kernels as reference

from headwater.spec import initializers, lifetime, rules
from headwater.spec.lifetime import AfterSteps, LeastRecentlyUsed
from headwater.spec.placement import mix, slots_of

BUCKETS, PLACES = 16, 8


@dataclass
class Row:
    value: np.ndarray
    states: list
    count: int
    last: int


@dataclass
class PlainTable:
    """Rows by id; pending counts by (slot, bucket), the last pushed first."""

    spec: object
    rows: dict = field(default_factory=dict)
    pending: dict = field(default_factory=dict)
    refused: int = 0

    def __post_init__(self):
        self.rule = rules.from_spec(self.spec.rule)
        self.initializer = initializers.from_spec(self.spec.initializer)
        admission, expiry = self.spec.admission, self.spec.expiry
        self.needed = lifetime.admission_from_spec(admission).count if admission else 1
        self.expiry = lifetime.expiry_from_spec(expiry) if expiry else None

    def living(self, step):
        if not isinstance(self.expiry, AfterSteps):
            return self.rows
        return {i: row for i, row in self.rows.items() if step - row.last <= self.expiry.steps}

    def initial(self, i):
        return self.initializer.rows(self.spec.seed, np.array([i]), self.spec.dim)[0]

    def pull(self, ids, step):
        living = self.living(step)
        rows = [living[i].value if i in living else self.initial(i) for i in ids]
        return np.array(rows, dtype=np.float32).reshape(len(ids), self.spec.dim)

    def apply(self, updates, divisor, step, updates_of_schedule):
        self.rows = self.living(step)
        sums = {}
        for ids, gradients in updates:
            for i, gradient in zip(ids, gradients, strict=True):
                sums[i] = sums[i] + gradient if i in sums else gradient
        for i, total in sums.items():
            if i not in self.rows and self.admits(i):
                states = [
                    np.full(self.spec.dim, value, dtype=np.float32) for value in self.rule.states().values()
                ]
                self.rows[i] = Row(self.initial(i), states, 0, step)
            if i in self.rows:
                self.update(self.rows[i], total, divisor, step, updates_of_schedule)
        if isinstance(self.expiry, LeastRecentlyUsed):
            self.trim()

    def update(self, row, total, divisor, step, updates_of_schedule):
        row.count += 1
        row.last = step
        divisor = 1 if self.rule.always_sum else divisor
        scalars = self.rule.scalars(updates_of_schedule, row.count)
        reference.update(self.rule, [total], divisor, row.value, row.states, scalars, [])

    def admits(self, i):
        if self.needed == 1:
            return True
        bucket = self.pending.setdefault(self.bucket(i), [])
        count = 1 + next((count for other, count in bucket if other == i), 0)
        bucket[:] = [(other, n) for other, n in bucket if other != i]
        if count >= self.needed:
            return True
        self.refused += 1
        bucket.insert(0, (i, count))
        del bucket[PLACES:]
        return False

    def bucket(self, i):
        hashed = int(mix(np.array([i]).view(np.uint64))[0])
        return hashed % 4096, hashed >> 12 & (BUCKETS - 1)

    def trim(self):
        ids = np.array(list(self.rows), dtype=np.int64)
        slots = slots_of(ids)
        for slot in np.unique(slots):
            mine = sorted(ids[slots == slot].tolist(), key=lambda i: (self.rows[i].last, i))
            if len(mine) > self.expiry.share:
                for i in mine[: len(mine) - self.expiry.kept]:
                    del self.rows[i]

    def delete(self, ids, step):
        self.rows = self.living(step)
        before = len(self.rows)
        for i in ids:
            self.rows.pop(i, None)
            bucket = self.pending.get(self.bucket(i), [])
            bucket[:] = [(other, n) for other, n in bucket if other != i]
        return before - len(self.rows)
