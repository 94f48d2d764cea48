"""A server's part of a table: in closed forms, and at its edges."""

import threading

import numpy as np
import pytest
from plain_table import PlainTable
from small_tables import ALL_SLOTS, INT64, POOL, TWO_SLOTS, make, pull, push, spec

from headwater.errors import ConfigurationError, ProtocolError, RegistrationError
from headwater.kernels.arrange import arrange
from headwater.kernels.index import PAGE, Index
from headwater.kernels.slabs import Slabs
from headwater.messages import RuleSpec, TableSpec
from headwater.shard.table import Table
from headwater.spec.initializers import Constant, Normal, Zeros
from headwater.spec.lifetime import AfterCount, AfterSteps, LeastRecentlyUsed
from headwater.spec.placement import SLOTS, slots_of, slots_of_server
from headwater.spec.rules import SGD, Accumulate, Adagrad, Adam

# ── closed forms ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_known_integers_add_up_on_any_number_of_servers(servers, workers):
    tables = [make(slots=slots_of_server(i, servers), dim=3) for i in range(servers)]
    rates = [make(SGD(0.5), slots=slots_of_server(i, servers), dim=3) for i in range(servers)]
    n, rounds = 500, 4
    for step in range(rounds):
        for index in range(servers):
            updates = []
            for rank in range(workers):
                ids = np.arange(rank * 100, rank * 100 + n) - 250
                given_ids = np.concatenate([ids, ids[::2]])  # repeats add up at the worker
                plan = arrange(given_ids, servers)
                sums = np.empty((len(plan.ids), 3), dtype=np.float32)
                plan.combine(np.repeat(given_ids[:, None], 3, axis=1).astype(np.float32), sums)
                here = slice(plan.bounds[index], plan.bounds[index + 1])
                updates.append((plan.ids[here], sums[here]))
            tables[index].apply(updates, workers, step, step)
            rates[index].apply(updates, 1 << (workers - 1), step, step)
    ids = np.arange(-250, n + 100 * (workers - 1) - 250)
    expected = np.zeros(len(ids))
    for rank in range(workers):
        mine = slice(rank * 100, rank * 100 + n)
        expected[mine] += ids[mine] * np.where(np.arange(n) % 2 == 0, 2, 1) * rounds
    plan = arrange(ids, servers)
    for part, factor in ((tables, 1.0), (rates, -0.5 / (1 << (workers - 1)))):
        rows = np.concatenate([
            pull(part[i], plan.ids[plan.bounds[i] : plan.bounds[i + 1]], rounds) for i in range(servers)
        ])  # fmt: skip
        assert (plan.scatter(rows) == (expected * factor)[:, None]).all()
        assert sum(map(len, part)) == len(ids)


@pytest.mark.parametrize("admission", [None, AfterCount(2)], ids=str)
@pytest.mark.parametrize("expiry", [None, AfterSteps(3), LeastRecentlyUsed(SLOTS)], ids=str)
def test_the_bits_are_the_same_for_any_number_of_servers(admission, expiry):
    kind = spec(Adam(lr=0.1), 3, Normal(std=0.1), admission, expiry)
    generator = np.random.default_rng(1)
    batches = [generator.zipf(1.2, size=3000).astype(np.int64) % 20_000 - 500 for _ in range(8)]
    gradients = [generator.normal(size=(3000, 3)).astype(np.float32) for _ in batches]
    everything = np.arange(-500, 20_000)
    results = []
    for servers in (1, 3):
        tables = [Table(kind, slots_of_server(i, servers)) for i in range(servers)]
        for step in range(0, 8, 2):
            plans = [arrange(batches[step + rank], servers) for rank in range(2)]
            parts = []
            for rank, plan in enumerate(plans):
                sums = np.empty((len(plan.ids), 3), dtype=np.float32)
                plan.combine(gradients[step + rank], sums)
                parts.append(sums)
            for i in reversed(range(servers)):
                here = [slice(plan.bounds[i], plan.bounds[i + 1]) for plan in plans]
                updates = [(p.ids[h], s[h]) for p, h, s in zip(plans, here, parts, strict=True)]
                tables[i].apply(updates, 2, 1 + step, step // 2)
        plan = arrange(everything, servers)
        rows = [pull(tables[i], plan.ids[plan.bounds[i] : plan.bounds[i + 1]], 8) for i in range(servers)]
        results.append(plan.scatter(np.concatenate(rows)))
    assert (results[0].view(np.int32) == results[1].view(np.int32)).all()


def test_gradients_of_an_id_are_summed_in_rank_order_before_they_are_divided():
    table = make(SGD(1.0), dim=1)
    gradients = np.float32([1e8, 1.0, -1e8])  # float addition is not associative: the order shows
    table.apply([(np.array([7]), g.reshape(1, 1)) for g in gradients], 3, 1, 0)
    in_order = ((gradients[0] + gradients[1]) + gradients[2]) / np.float32(3)
    other_order = ((gradients[0] + gradients[2]) + gradients[1]) / np.float32(3)
    assert in_order != other_order
    assert pull(table, [7]).item() == -in_order


def test_rules_count_the_updates_of_each_row():
    table = make(Adagrad(lr=1.0, lr_decay=1.0, eps=0.0), dim=1)
    for step in range(3):
        push(table, [1, 2][: 2 - step % 2], step=step)
    push(table, [3], step=9)
    first = [-(1 / k) / np.sqrt(k) for k in (1, 2, 3)]
    np.testing.assert_allclose(pull(table, [1, 2, 3])[:, 0], [sum(first), sum(first[:2]), -1.0], rtol=1e-6)


def test_scalars_can_be_changed_and_counts_stay():
    table = make(Adagrad(lr=1.0, lr_decay=1.0, eps=0.0), dim=1)
    push(table, [1])
    table.set({"lr": 2.0})
    push(table, [1])
    np.testing.assert_allclose(pull(table, [1]).item(), -1 - 2 / 2 / np.sqrt(2), rtol=1e-6)


# ── rows that begin and end ─────────────────────────────────────────────────────────────────────


def test_a_pulled_unknown_id_stores_nothing_and_its_first_push_starts_from_what_was_pulled():
    table = make(initializer=Normal(), dim=5)
    ids = np.arange(1000)
    before = pull(table, ids)
    assert len(table) == 0
    assert (pull(table, ids) == before).all()
    push(table, ids, 0.5)
    assert (pull(table, ids) == before + np.float32(0.5)).all()
    assert len(table) == 1000


def test_all_int64_are_ids():
    table = make(dim=1)
    ids = [INT64.min, INT64.min + 1, -1, 0, 1, INT64.max - 1, INT64.max]
    table.apply([(np.array(ids), np.arange(1.0, 8.0, dtype=np.float32).reshape(7, 1))], 1, 0, 0)
    assert pull(table, ids)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pull(table, [2, -2])[:, 0].tolist() == [0, 0]


def test_no_ids_change_nothing():
    table = make(expiry=AfterSteps(1), admission=AfterCount(2))
    push(table, [])
    assert pull(table, []).shape == (0, 2)
    assert table.delete(np.array([], dtype=np.int64), 0) == 0
    assert len(table) == 0


def test_a_deleted_id_starts_anew_and_its_row_and_entry_are_used_again():
    table = make(Adam(lr=0.1), slots=TWO_SLOTS, initializer=Normal())
    push(table, POOL)
    fresh = pull(table, POOL)
    push(table, POOL)
    resident = table.statistics().resident
    for _ in range(20):
        assert table.delete(POOL, 0) == len(POOL)
        assert len(table) == 0
        push(table, POOL)
        assert (pull(table, POOL) == fresh).all()
    assert table.statistics().resident <= resident + 2 * 4 * len(POOL)  # the list of free rows


def test_deleting_absent_ids_does_nothing():
    table = make(slots=TWO_SLOTS)
    push(table, POOL[:50])
    assert table.delete(POOL[25:100], 0) == 25
    assert (pull(table, POOL) == np.where(np.arange(len(POOL)) < 25, 1, 0)[:, None]).all()


def test_a_gradient_refused_by_admission_changes_no_other_row():
    table = make(admission=AfterCount(3), initializer=Constant(10), dim=1)
    known, new = np.arange(100), np.arange(1000, 1100)
    for step in range(3):
        push(table, known, 1.0, step)
    before = pull(table, known)
    mixed = np.stack([known, new], axis=1).reshape(-1)
    gradients = np.where(mixed < 1000, 0.0, 7.0).astype(np.float32).reshape(-1, 1)
    table.apply([(mixed, gradients)], 1, 4, 0)
    assert (pull(table, known) == before).all()
    assert (pull(table, new) == 10).all()
    assert len(table) == 100
    assert table.statistics().refused == 2 * 100 + 100


def test_the_count_th_update_makes_the_row_and_is_the_first_applied():
    table = make(admission=AfterCount(3), dim=1)
    values = []
    for step in range(5):
        push(table, [42], 10.0**step, step)
        values.append(pull(table, [42]).item())
    assert values == [0, 0, 100, 1100, 11100]


def test_workers_that_push_an_id_in_one_update_count_once():
    table = make(admission=AfterCount(2), dim=1)
    one = np.array([5]), np.ones((1, 1), dtype=np.float32)
    table.apply([one, one, one], 3, 1, 0)
    assert len(table) == 0
    table.apply([one, one, one], 3, 2, 0)
    assert pull(table, [5]).item() == 3


def test_admission_remembers_a_bounded_number_of_ids_and_admits_none_early():
    table = make(admission=AfterCount(2), slots=TWO_SLOTS, dim=1)
    ids = np.arange(-(10**6), 10**6)
    ids = ids[np.isin(slots_of(ids), TWO_SLOTS)]
    resident = table.statistics().resident
    assert len(ids) > 900
    push(table, ids)
    assert len(table) == 0
    push(table, ids)
    assert len(table) < len(ids) / 10  # displaced before they came again
    assert table.statistics().resident - resident < 20 * len(table) + 4 * PAGE
    recent = ids[-100:]
    table.delete(recent, 0)
    push(table, recent)
    push(table, recent)
    assert (pull(table, recent) == 1).mean() > 0.9


def test_a_bucket_of_eight_counts_all_of_them_to_the_end():
    kind = spec(Accumulate(), dim=1, admission=AfterCount(3))
    table, plain = Table(kind, TWO_SLOTS), PlainTable(kind)
    buckets = [plain.bucket(i) for i in POOL.tolist()]
    eight = next(ids for b in buckets if len(ids := POOL[[other == b for other in buckets]]) >= 8)[:8]
    for order in (eight, eight[::-1], eight[[3, 0, 7, 1, 6, 2, 5, 4]]):
        for i in order:
            push(table, [i])
    assert pull(table, eight)[:, 0].tolist() == [1] * 8


def test_a_row_expires_exactly_after_its_steps_swept_or_not():
    table = make(expiry=AfterSteps(10), initializer=Constant(100), dim=1)
    push(table, [1, 2], 1.0, step=5)
    assert pull(table, [1], step=15).item() == 101
    assert pull(table, [1], step=16).item() == 100
    assert len(table) == 0
    push(table, [1], 1.0, step=16)
    assert pull(table, [1, 2], step=16)[:, 0].tolist() == [101, 100]
    assert table.statistics().expired >= 1


def test_reading_does_not_keep_a_row():
    table = make(expiry=AfterSteps(3), dim=1)
    push(table, [1], 1.0, step=0)
    values = [pull(table, [1], step).item() for step in range(6)]
    assert values == [1, 1, 1, 1, 0, 0]


def test_expired_rows_are_swept_without_being_touched():
    table = make(expiry=AfterSteps(1))
    push(table, np.arange(20_000), step=0)
    for step in range(2, 70):
        push(table, [-1], step=step)
    assert table.statistics().rows == 1
    assert table.statistics().expired == 20_000


def test_a_gradient_that_arrives_after_expiry_changes_no_other_row():
    table = make(expiry=AfterSteps(2), dim=1, slots=TWO_SLOTS)
    old, kept = POOL[:60], POOL[60:120]
    push(table, old, 5.0, step=0)
    for step in range(1, 4):
        push(table, kept, 1.0, step)
    push(table, old, 7.0, step=4)
    assert (pull(table, old, 4) == 7).all()
    assert (pull(table, kept, 4) == 3).all()


def test_steps_past_the_32nd_bit_expire_as_any_other():
    start = 2**32 - 2
    table = make(expiry=AfterSteps(10), dim=1)
    push(table, [1], 1.0, step=start)
    assert [pull(table, [1], start + k).item() for k in (0, 10, 11)] == [1, 1, 0]


def test_least_recently_used_rows_go_first_and_the_bound_holds():
    table = make(expiry=LeastRecentlyUsed(SLOTS * 2), dim=1)
    ids = np.arange(200_000)
    mine = ids[slots_of(ids) == 9][:4]
    for step, i in enumerate(mine[:2]):
        push(table, [i], step=step)
    push(table, [mine[0]], step=2)
    push(table, [mine[2]], step=3)
    assert pull(table, mine, 3)[:, 0].tolist() == [2, 0, 1, 0]
    push(table, ids, step=4)
    assert len(table) <= SLOTS * 2
    assert table.statistics().expired == (200_000 + 1) - len(table)  # mine[1] was made twice


# ── memory and errors ───────────────────────────────────────────────────────────────────────────


def test_an_entry_takes_at_most_36_bytes_right_after_growth():
    index, most = Index(range(64)), 0.0
    ids = np.arange(3_000_000)
    ids = np.ascontiguousarray(ids[slots_of(ids) < 64])
    for start in range(0, len(ids), 500):
        index.claim(ids[start : start + 500])
        if len(index) > 64 * 200:
            most = max(most, index.nbytes / len(index))
    assert len(index) == len(ids)
    assert most <= 32  # and 4 for its last step, where rows expire
    assert index.find(ids)[1] == len(ids)


def test_an_index_has_pages_only_for_slots_that_have_had_an_entry():
    index, ids = Index(range(SLOTS)), np.arange(3)
    empty = index.nbytes
    assert empty < SLOTS * PAGE / 10
    index.claim(ids)
    assert index.nbytes == empty + 3 * PAGE
    assert sorted(index.entries(np.arange(SLOTS)).ids) == [0, 1, 2]
    index.remove(ids)
    assert index.find(ids)[1] == 0
    assert len(index.entries(np.arange(SLOTS)).ids) == 0
    assert len(index.claim(ids).fresh) == 3
    assert index.find(ids)[1] == 3
    again = Index(range(SLOTS))
    again.fill(ids, np.ones(3, np.int32))
    assert again.find(ids)[1] == 3
    assert again.nbytes == index.nbytes - index._free.nbytes


def test_memory_can_be_prepared_at_any_time_beside_any_call():
    table, stop = make(dim=16, initializer=Constant(3)), threading.Event()

    def prepare():
        while not stop.is_set():
            table.prepare()

    beside = threading.Thread(target=prepare)
    beside.start()
    try:
        for start in range(0, 600_000, 20_000):
            push(table, np.arange(start, start + 20_000))
    finally:
        stop.set()
        beside.join()
    assert (pull(table, np.arange(600_000)) == 4).all()


def test_memory_for_new_rows_is_wanted_from_the_beginning_and_before_it_runs_out():
    table = make(dim=64, initializer=Constant(3))
    slabs = table._slabs
    assert table.unprepared
    table.prepare()
    assert not table.unprepared
    assert 0 < slabs.prepared * sum(slabs.row_bytes) <= 1 << 20
    push(table, np.arange(2000))
    assert table.unprepared
    table.prepare()
    assert slabs.prepared == 2000 + 4 * 2000
    for k, wanted in ((1, False), (2, False), (3, True)):
        push(table, np.arange(k * 2000, (k + 1) * 2000))
        assert table.unprepared is wanted
    table.prepare()
    assert slabs.prepared == 8000 + 4 * 2000
    push(table, np.arange(8000))  # no row is new
    assert not table.unprepared


def test_memory_that_is_prepared_ahead_is_bounded():
    table = make(dim=1024, initializer=Constant(3))
    slabs = table._slabs
    push(table, np.arange(20_000))
    table.prepare()
    assert (slabs.prepared - 20_000) * sum(slabs.row_bytes) <= 32 << 20


def test_rows_that_came_into_use_while_memory_is_prepared_are_left_out():
    slabs, used = Slabs([1024]), iter([0, 5000, 5000, 5000, 5000, 5000, 5000])
    slabs.reserve(10_000)
    asked = []
    slabs.populate = lambda first, rows: asked.append((first, rows))
    slabs.prepare(lambda: next(used), 6000)
    assert asked[0] == (0, 2048)
    assert asked[1] == (5000, 2048)
    assert asked[-1][0] + asked[-1][1] == 11_000
    assert sum(rows for _, rows in asked) == 2048 + 6000


def test_statistics_tell_hits():
    table = make()
    assert table.statistics().hit_ratio == 1
    push(table, [1, 2, 3])
    pull(table, [1, 2, 3, 4])
    found = table.statistics()
    assert (found.rows, found.pulled, found.hits, found.hit_ratio) == (3, 4, 3, 0.75)
    assert (found.name, found.dim, found.rule, found.updates) == ("users", 2, "Accumulate", 1)


def test_ids_of_another_server_are_refused():
    table = make(slots=slots_of_server(1, 3))
    ids = np.arange(100)
    with pytest.raises(ProtocolError, match="belongs to another server"):
        table.check(ids)
    table.check(ids[np.isin(slots_of(ids), slots_of_server(1, 3))])


@pytest.mark.parametrize("dim", [0, -1, 1 << 20])
def test_impossible_dims_are_refused(dim):
    with pytest.raises(RegistrationError, match="dim"):
        make(dim=dim)


@pytest.mark.parametrize(
    "kind",
    [
        lambda: AfterCount(0),
        lambda: AfterSteps(0),
        lambda: AfterSteps(2**31),
        lambda: LeastRecentlyUsed(SLOTS - 1),
        lambda: Table(
            TableSpec("t", 1, RuleSpec("Nothing", {}), Zeros().to_spec(), 0, None, None), ALL_SLOTS
        ),
        lambda: Table(
            TableSpec("t", 1, Accumulate().to_spec(), Zeros().to_spec(), 0, RuleSpec("AfterSteps", {}), None),
            ALL_SLOTS,
        ),
    ],
)
def test_impossible_lifetimes_and_unknown_names_are_refused(kind):
    with pytest.raises(ConfigurationError):
        kind()
