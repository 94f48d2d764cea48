"""Whatever happens to a table, in any order, it is what a plain dictionary would be, also after snapshots."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_table import PlainTable
from small_tables import ALL_SLOTS, POOL, TWO_SLOTS, make, pull, push, spec

from examples import examples
from headwater.errors import ProtocolError
from headwater.shard.table import Table
from headwater.spec.initializers import Constant, Normal
from headwater.spec.lifetime import AfterCount, AfterSteps, LeastRecentlyUsed
from headwater.spec.placement import SLOTS, slots_of, slots_of_server
from headwater.spec.rules import SGD, Accumulate, Adagrad, Adam, Ftrl, RowwiseAdagrad
from headwater.spec.schedules import Linear

KINDS = [
    spec(Accumulate(), initializer=Normal()),
    spec(SGD(Linear(0.5, over=6)), initializer=Normal()),
    spec(Adam(lr=0.1), initializer=Normal()),
    spec(Adam(lr=Linear(0.5, over=6)), expiry=AfterSteps(2)),
    spec(Accumulate(), initializer=Normal(), expiry=AfterSteps(3), admission=AfterCount(2)),
    spec(Accumulate(), admission=AfterCount(3)),
    spec(Accumulate(), initializer=Constant(5), expiry=LeastRecentlyUsed(SLOTS * 33 + 7)),
    spec(Ftrl(lr=0.1), admission=AfterCount(2), expiry=LeastRecentlyUsed(SLOTS * 33 + 7)),
]
CUTS = [[TWO_SLOTS], [range(5, 6), range(6, 7)]]
"""Two slots on one server, or on two."""


def joined(snapshots, slots):
    """What several snapshots have of some slots."""
    ids = np.concatenate([snapshot.ids for snapshot in snapshots])
    pending = np.concatenate([snapshot.pending_ids for snapshot in snapshots])
    mine, waiting = np.isin(slots_of(ids), slots), np.isin(slots_of(pending), slots)

    def part(name, which=mine):
        return np.concatenate([getattr(snapshot, name) for snapshot in snapshots])[which]

    first = snapshots[0]
    return replace(
        first,
        ids=ids[mine],
        counts=part("counts"),
        last=part("last") if first.spec.expiry else first.last,
        values=part("values"),
        states={name: np.concatenate([s.states[name] for s in snapshots])[mine] for name in first.states},
        pending_ids=pending[waiting],
        pending_counts=part("pending_counts", waiting),
    )


class Servers:
    """The tables of the servers that hold `TWO_SLOTS`, and the same as a dictionary."""

    def __init__(self, kind):
        self.tables = [Table(kind, slots) for slots in CUTS[0]]
        self.cut = CUTS[0]
        self.plain = PlainTable(kind)
        self.refused = self.step = self.commits = 0

    def recut(self, cut):
        """Go on from snapshots, on as many servers as `cut` says."""
        self.refused += self._now_refused()
        snapshots = [table.snapshot(self.step) for table in reversed(self.tables)]
        for table, slots in zip(self.tables, self.cut, strict=True):
            table.delete(POOL[np.isin(slots_of(POOL), slots)], self.step)  # snapshots share nothing with it
        self.cut = cut
        self.tables = [Table.from_snapshot(joined(snapshots, slots), slots) for slots in cut]

    def apply(self, updates):
        self.step += 1
        for table, slots in zip(self.tables, self.cut, strict=True):
            here = [np.isin(slots_of(ids), slots) for ids, _ in updates]
            parts = [(ids[at], rows[at]) for (ids, rows), at in zip(updates, here, strict=True)]
            table.apply(parts, len(updates), self.step, table.updates)
        lists = [(ids.tolist(), rows) for ids, rows in updates]
        self.plain.apply(lists, len(updates), self.step, self.commits)
        self.commits += 1

    def delete(self, ids):
        deleted = [
            table.delete(ids[np.isin(slots_of(ids), slots)], self.step)
            for table, slots in zip(self.tables, self.cut, strict=True)
        ]
        assert sum(deleted) == self.plain.delete(ids.tolist(), self.step)

    def check(self, ids):
        """That rows of `ids` and how many rows there are is what the dictionary says."""
        expected = self.plain.pull(ids.tolist(), self.step)
        for table, slots in zip(self.tables, self.cut, strict=True):
            at = np.isin(slots_of(ids), slots)
            assert (pull(table, ids[at], self.step) == expected[at]).all()
        assert sum(map(len, self.tables)) == len(self.plain.living(self.step))
        assert sum(table.count(self.step) for table in self.tables) == len(self.plain.living(self.step))

    def check_all(self):
        self.check(POOL)
        assert self.refused + self._now_refused() == self.plain.refused
        assert {table.updates for table in self.tables} == {self.commits}

    def _now_refused(self):
        return sum(table.statistics().refused for table in self.tables)


some_ids = st.lists(st.integers(0, len(POOL) - 1), max_size=60, unique=True)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("pull"), some_ids),
        st.tuples(st.just("apply"), st.lists(some_ids, min_size=1, max_size=3)),
        st.tuples(st.just("grow"), st.integers(0, 3)),
        st.tuples(st.just("delete"), some_ids),
        st.tuples(st.just("wait"), st.integers(1, 5)),
        st.tuples(st.just("recut"), st.sampled_from(CUTS)),
    ),
    max_size=20,
)


@examples(200)
@given(st.sampled_from(KINDS), operations, st.integers(0, 99))
def test_any_interleaving_does_what_a_dictionary_would_do(kind, done, seed):
    servers, generator = Servers(kind), np.random.default_rng(seed)
    for name, argument in done:
        if name == "wait":
            servers.step += argument
        elif name == "recut":
            servers.recut(argument)
        elif name == "delete":
            servers.delete(POOL[argument])
        elif name == "pull":
            servers.check(POOL[argument])
        else:
            lists = [range(argument * 85, argument * 85 + 85)] if name == "grow" else argument
            servers.apply([
                (POOL[list(ids)], generator.normal(size=(len(ids), 2)).astype(np.float32)) for ids in lists
            ])  # fmt: skip
    servers.check_all()


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", [Accumulate(), Adam(lr=0.1), Adagrad(), RowwiseAdagrad()], ids=repr)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2), (2, 5)])
def test_training_goes_on_from_snapshots_to_the_bit_on_any_number_of_servers(rule, before, after):
    kind = spec(rule, 5, Normal(), AfterCount(2), AfterSteps(3))
    generator = np.random.default_rng(0)
    batches = [generator.permutation(np.arange(-3000, 3000))[:4000] for _ in range(8)]
    gradients = generator.normal(size=(8, 4000, 5)).astype(np.float32)
    cuts = [[slots_of_server(i, servers) for i in range(servers)] for servers in (before, after)]
    through, cut_tables = Table(kind, ALL_SLOTS), [Table(kind, slots) for slots in cuts[0]]
    slots_now = cuts[0]
    for step in range(8):
        if step == 4:
            snapshots = [table.snapshot() for table in cut_tables]
            slots_now = cuts[1]
            cut_tables = [Table.from_snapshot(joined(snapshots, slots), slots) for slots in slots_now]
        ids, rows = batches[step], gradients[step]
        through.apply([(ids, rows)], 1, step, step)
        for table, slots in zip(cut_tables, slots_now, strict=True):
            at = np.isin(slots_of(ids), slots)
            table.apply([(ids[at], rows[at])], 1, step, table.updates)
    final = joined([table.snapshot() for table in cut_tables], ALL_SLOTS)
    expected = through.snapshot()
    order, wanted = np.argsort(final.ids), np.argsort(expected.ids)
    for name in ("ids", "counts", "last", "values"):
        assert (getattr(final, name)[order] == getattr(expected, name)[wanted]).all()
    for name, state in expected.states.items():
        assert (final.states[name][order] == state[wanted]).all()
    assert final.pending_ids.tolist() == expected.pending_ids.tolist()
    assert final.pending_counts.tolist() == expected.pending_counts.tolist()


def test_a_snapshot_stands_in_the_order_of_slots_and_keeps_the_settings_of_now():
    table = make(SGD(0.5), slots=range(100, 4000))
    ids = np.arange(20_000)
    push(table, ids[np.isin(slots_of(ids), range(100, 4000))])
    table.set({"lr": 0.25})
    snapshot = table.snapshot()
    assert (np.diff(slots_of(snapshot.ids)) >= 0).all()
    assert snapshot.values.flags.c_contiguous
    assert Table.from_snapshot(snapshot, range(100, 4000)).rule == SGD(0.25)
    assert snapshot.spec == table.spec


def test_an_empty_table_has_an_empty_snapshot():
    table = make(Adam(), admission=AfterCount(2), expiry=AfterSteps(3))
    again = Table.from_snapshot(table.snapshot(), ALL_SLOTS)
    assert len(again) == 0
    push(again, [5], step=1)
    push(again, [5], step=2)
    assert len(again) == 1


def test_expired_rows_are_in_no_snapshot():
    table = make(expiry=AfterSteps(2), dim=1)
    push(table, np.arange(1000), step=0)
    push(table, [7], step=2)
    pull(table, [7], step=3)
    snapshot = table.snapshot()
    assert snapshot.ids.tolist() == [7]
    again = Table.from_snapshot(snapshot, ALL_SLOTS)
    assert len(again) == 1
    assert pull(again, [7], step=4).item() == 2
    assert (again.count(4), again.count(5)) == (1, 0)


def test_ids_of_a_restored_index_are_found_and_its_memory_is_within_bounds():
    table = make(dim=1)
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 400_000)
    push(table, ids)
    again = Table.from_snapshot(table.snapshot(), ALL_SLOTS)
    assert (pull(again, ids) == 1).all()
    assert again.statistics().resident / len(again) <= 4 + 36
    assert again.delete(ids[::2].copy(), 0) == 200_000
    push(again, ids)
    assert (pull(again, ids)[:, 0] == np.where(np.arange(400_000) % 2, 2, 1)).all()


def test_arrays_that_may_not_be_written_can_be_restored():
    table = make(Adam(), admission=AfterCount(2), dim=3)
    push(table, [1, 2])
    push(table, [2, 3])
    snapshot = table.snapshot()
    for array in (snapshot.ids, snapshot.counts, snapshot.values, snapshot.pending_ids):
        array.flags.writeable = False
    again = Table.from_snapshot(snapshot, ALL_SLOTS)
    assert (pull(again, [1, 2, 3]) == pull(table, [1, 2, 3])).all()


def _damaged(**changes):
    return lambda snapshot: replace(snapshot, **{k: change(snapshot) for k, change in changes.items()})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_damaged(ids=lambda s: s.ids[:-1]), "values of a snapshot|counts of a snapshot"),
        (_damaged(counts=lambda s: s.counts.astype(np.int64)), "counts of a snapshot"),
        (_damaged(counts=lambda s: -s.counts), "has -[0-9]+ updates"),
        (_damaged(values=lambda s: s.values[:, :1]), "values of a snapshot"),
        (_damaged(states=lambda s: {}), "state 'exp_avg' of a snapshot"),
        (_damaged(last=lambda s: s.last[:0]), "last of a snapshot"),
        (_damaged(ids=lambda s: np.full_like(s.ids, s.ids[0])), "stands twice"),
        (_damaged(ids=lambda s: s.ids + 1), "belongs to another server"),
        (_damaged(pending_counts=lambda s: s.pending_counts + 1), "cannot wait"),
        (_damaged(pending_ids=lambda s: np.full_like(s.pending_ids, s.pending_ids[0])), "cannot wait"),
        (_damaged(pending_ids=lambda s: s.pending_ids + 1), "belongs to another server"),
        (_damaged(spec=lambda s: replace_spec(s.spec, admission=None)), "cannot wait"),
    ],
)
def test_a_damaged_snapshot_is_refused_with_the_reason(damage, reason):
    table = make(Adam(), slots=TWO_SLOTS, admission=AfterCount(2), expiry=AfterSteps(3))
    push(table, POOL[:20], step=1)
    push(table, POOL[10:30], step=2)
    with pytest.raises(ProtocolError, match=reason):
        Table.from_snapshot(damage(table.snapshot()), TWO_SLOTS)


def replace_spec(old, **changes):
    return type(old)(**{name: changes.get(name, getattr(old, name)) for name in old.__struct_fields__})
