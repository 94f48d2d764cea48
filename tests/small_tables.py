"""Tables to test with: their specs, and pulls and pushes of single values."""

import numpy as np

from headwater.messages import TableSpec
from headwater.shard.table import Table
from headwater.spec.initializers import Zeros
from headwater.spec.placement import SLOTS, slot_bounds, slots_of
from headwater.spec.rules import Accumulate

INT64 = np.iinfo(np.int64)
ALL_SLOTS = range(SLOTS)
TWO_SLOTS = range(5, 7)
_pool = np.concatenate([np.arange(-400_000, 400_000), [INT64.min, INT64.max, INT64.min + 1, INT64.max - 1]])
POOL = _pool[np.isin(slots_of(_pool), TWO_SLOTS)]
"""About 400 ids of two slots: one slot then grows several times."""


def servers_of(ids, servers):
    """int64[...]: the server that holds each id."""
    return np.searchsorted(slot_bounds(servers), slots_of(ids), side="right") - 1


def spec(rule, dim=2, initializer=None, admission=None, expiry=None, seed=3):
    return TableSpec(
        name="users",
        dim=dim,
        rule=rule.to_spec(),
        initializer=(initializer or Zeros()).to_spec(),
        seed=seed,
        admission=admission.to_spec() if admission else None,
        expiry=expiry.to_spec() if expiry else None,
    )


def make(rule=None, slots=ALL_SLOTS, **settings):
    return Table(spec(rule or Accumulate(), **settings), slots)


def pull(table, ids, step=0):
    out = np.full((len(ids), table.spec.dim), np.nan, dtype=np.float32)
    table.pull(np.asarray(ids, dtype=np.int64), out, step)
    return out


def push(table, ids, value=1.0, step=0):
    ids = np.asarray(ids, dtype=np.int64)
    table.apply([(ids, np.full((len(ids), table.spec.dim), value, dtype=np.float32))], 1, step, 0)
