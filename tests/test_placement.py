"""Ids: which server they live on, and how a worker arranges them for the servers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tables import servers_of

from headwater.errors import UsageError
from headwater.kernels.arrange import arrange, trace, unite
from headwater.spec.placement import SLOTS, mix, slot_bounds, slots_of, slots_of_server

INT64 = np.iinfo(np.int64)
ids_lists = st.lists(
    st.one_of(st.integers(-20, 20), st.integers(int(INT64.min), int(INT64.max))), max_size=200
)


def test_the_hash_is_that_of_splitmix64():
    # first three outputs of splitmix64 seeded with 0 (Steele et al. 2014, as in many libraries' tests)
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, 2 * golden % 2**64, 3 * golden % 2**64], dtype=np.uint64)
    assert [hex(value) for value in mix(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 7])
def test_servers_hold_contiguous_slots_and_every_slot_has_one(servers):
    slots = [slot for i in range(servers) for slot in slots_of_server(i, servers)]
    assert slots == list(range(SLOTS))
    ids = np.arange(-5000, 5000)
    for index in range(servers):
        mine = servers_of(ids, servers) == index
        held = slots_of_server(index, servers)
        assert set(np.unique(slots_of(ids[mine]))) <= set(held)
        assert slot_bounds(servers)[index] == held.start


def test_consecutive_and_strided_ids_spread_evenly():
    for ids in (np.arange(1 << 16), np.arange(1 << 16) * 4096, -np.arange(1 << 16) * (1 << 40)):
        counts = np.bincount(slots_of(ids), minlength=SLOTS)
        assert counts.min() > 0
        assert counts.max() < 45  # mean 16


@given(ids_lists, st.integers(1, 5))
def test_a_plan_has_each_id_once_in_the_order_of_the_servers(ids, servers):
    plan = arrange(np.array(ids, dtype=np.int64), servers)
    assert sorted(plan.ids.tolist()) == sorted(set(ids))
    assert plan.ids[plan.inverse].tolist() == ids
    assert plan.bounds.tolist()[0] == 0
    assert plan.bounds.tolist()[-1] == len(plan.ids)
    for index in range(servers):
        part = plan.ids[plan.bounds[index] : plan.bounds[index + 1]]
        assert (servers_of(part, servers) == index).all()
    assert (np.diff(slots_of(plan.ids)) >= 0).all()


@given(ids_lists)
def test_the_order_of_ids_does_not_depend_on_the_number_of_servers(ids):
    given_ids = np.array(ids, dtype=np.int64)
    assert (arrange(given_ids, 1).ids == arrange(given_ids, 4).ids).all()
    slots = slots_of(given_ids)
    expected = []
    for slot in np.unique(slots):
        expected += dict.fromkeys(given_ids[slots == slot].tolist())
    assert arrange(given_ids, 3).ids.tolist() == expected


@given(ids_lists)
def test_gradients_of_repeats_are_summed_in_order_of_occurrence(ids):
    plan = arrange(ids, 2)
    gradients = np.random.default_rng(len(ids)).normal(size=(len(ids), 3)).astype(np.float32)
    sums = np.full((len(plan.ids), 3), np.nan, dtype=np.float32)
    plan.combine(gradients, sums)
    expected = {}
    for i, gradient in zip(ids, gradients, strict=True):
        expected[i] = expected[i] + gradient if i in expected else gradient
    for i, total in zip(plan.ids.tolist(), sums, strict=True):
        assert (total == expected[i]).all()


def test_answers_come_back_in_the_shape_of_the_ids():
    ids = np.array([[7, -1, 7], [INT64.min, INT64.max, -1]])
    plan = arrange(ids, 3)
    rows = np.stack([plan.ids.astype(np.float32), -plan.ids.astype(np.float32)], axis=1)
    out = plan.scatter(rows)
    assert out.shape == (2, 3, 2)
    assert (out[..., 0] == ids.astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_no_ids_make_an_empty_plan(shape):
    plan = arrange(np.zeros(shape, dtype=np.int32), 2)
    assert plan.scatter(np.empty((0, 4), dtype=np.float32)).shape == (*shape, 4)
    assert plan.bounds.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "ids", [[1.0], np.array([True]), np.array(["a"]), [None], np.array([2**63], dtype=np.uint64)]
)
def test_what_is_no_id_is_refused(ids):
    with pytest.raises(UsageError, match=r"ids must"):
        arrange(ids, 1)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64, np.int64])
def test_any_integer_type_will_do(dtype):
    assert arrange(np.array([3, 1, 3], dtype=dtype), 1).ids.dtype == np.int64


def test_lists_are_united_in_order_of_first_appearance():
    ids, inverses = unite([np.array([5, -3]), np.array([], dtype=np.int64), np.array([9, 5, INT64.min])])
    assert ids.tolist() == [5, -3, 9, INT64.min]
    assert [inverse.tolist() for inverse in inverses] == [[0, 1], [], [2, 0, 3]]


@given(st.lists(st.lists(st.integers(-9, 9), unique=True, max_size=15), min_size=1, max_size=4))
def test_items_of_united_ids_are_traced_in_the_order_of_their_lists(lists):
    given_lists = [(np.array(ids, dtype=np.int64), 1000 * k) for k, ids in enumerate(lists)]
    ids, sources, bounds = trace(given_lists, 8)
    assert ids.tolist() == list(dict.fromkeys(i for one in lists for i in one))
    for k, i in enumerate(ids.tolist()):
        expected = [1000 * n + 8 * one.index(i) for n, one in enumerate(lists) if i in one]
        assert sources[bounds[k] : bounds[k + 1]].tolist() == expected


def test_more_ids_than_can_be_numbered_are_refused_before_memory_is_taken():
    endless = np.broadcast_to(np.int64(7), (2**31 - 1,))
    with pytest.raises(UsageError, match="in several calls"):
        unite([endless])


def test_all_ids_in_one_slot_and_one_bucket_of_the_hash_table_are_told_apart():
    pool = np.arange(400_000)
    ids = pool[slots_of(pool) == 17]
    plan = arrange(np.concatenate([ids, ids[::-1]]), 2)
    assert plan.ids.tolist() == ids.tolist()
