"""Rows that are set: pretrained ones under any rule, with or without a state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tables import ALL_SLOTS, make, pull, push, spec

import headwater as hw
from examples import examples
from headwater import messages as m
from headwater.errors import GradientError, ProtocolError, UsageError
from headwater.kernels.index import Index
from headwater.shard import Shard, StagedRows
from headwater.shard.digest import digests
from headwater.shard.table import Table

IDS = np.arange(-50, 50)
RULES = [
    hw.SGD(lr=0.5),
    hw.SGD(lr=0.5, momentum=0.9),
    hw.Adagrad(lr=0.5, initial_accumulator_value=0.1),
    hw.RowwiseAdagrad(lr=0.5),
    hw.RMSprop(lr=0.5, centered=True),
    hw.Adam(lr=0.5),
    hw.AdamW(lr=0.5),
    hw.Ftrl(lr=0.5),
    hw.Accumulate(),
    hw.Assign(),
]


def alone(function, **options):
    """Run `function(worker)` as the only worker of a cluster, in this thread."""
    with hw.Cluster(workers=1, patience=5, deadline=60, **options) as cluster, cluster.worker() as worker:
        return function(worker)


def vectors(dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((len(IDS), dim)).astype(np.float32)


# ── in training ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("options", [{}, {"servers": 3}, {"servers": 2, "transport": "tcp"}])
def test_assigned_rows_are_there_and_train_on_as_rows_that_began_with_them(rule, options):
    def work(worker):
        begun = worker.table("begun", 3, rule, initializer=hw.initializers.Constant(0.25))
        table = worker.table("assigned", 3, rule, initializer=hw.Normal(std=1.0))
        table.push(IDS[:30], np.ones((30, 3)))
        worker.step()
        version = worker.version
        table.assign(IDS, np.full((len(IDS), 3), 0.25))
        assert worker.version == version + 1
        assert (table.pull(IDS) == 0.25).all()
        for k in range(3):
            for one in (begun, table):
                one.push(IDS, vectors(seed=k))
            worker.step()
        assert (table.pull(IDS) == begun.pull(IDS)).all()
        return len(table)

    assert alone(work, **options) == len(IDS)


def test_every_worker_pulls_what_one_has_assigned():
    def work(worker):
        table = worker.table("t", 3, hw.Adam(lr=0.1))
        if worker.rank == 1:
            table.assign(IDS.reshape(10, 10), vectors().reshape(10, 10, 3))
        worker.barrier()
        return bool((table.pull(IDS) == vectors()).all())

    assert hw.run(work, workers=2, servers=2, engine="inline", patience=5, deadline=60).values == [True] * 2


@pytest.mark.parametrize("rule", [hw.Adam(lr=0.5), hw.RowwiseAdagrad(lr=0.5), hw.SGD(lr=0.5, momentum=0.9)])
def test_states_that_are_assigned_go_on(rule):
    """A second table gets what a first one has, states and counts too."""
    table, fresh = Table(spec(rule, dim=2), ALL_SLOTS), Table(spec(rule, dim=2), ALL_SLOTS)
    for k in range(3):
        ids = IDS[: 40 + 20 * k].astype(np.int64)
        table.apply([(ids, vectors(2, k)[: len(ids)])], 1, k, k)
    kept = table.snapshot()
    order = np.argsort(kept.ids)
    parts = [kept.values[order], *(state[order] for state in kept.states.values())]
    bits = kept.counts[order].astype(np.int32).reshape(-1, 1).view(np.float32)
    rows = np.ascontiguousarray(np.hstack([*parts, bits]))
    assert rows.shape[1] == fresh.width_of(True)
    fresh.assign(kept.ids[order], rows, True, 3)
    for one in (table, fresh):
        one.apply([(IDS.astype(np.int64), vectors(2, 9))], 1, 4, 3)
    assert (pull(table, IDS) == pull(fresh, IDS)).all()
    assert np.array_equal(np.sort(table.snapshot().counts), np.sort(fresh.snapshot().counts))


def test_states_travel_with_rows():
    def work(worker):
        table = worker.table("t", 2, hw.Adam(lr=1.0, betas=(0.5, 0.5), eps=0.0))
        state = {"exp_avg": np.ones((1, 2)), "exp_avg_sq": np.full((1, 2), 4.0), "step": 3}
        table.assign([7], np.zeros((1, 2)), state)
        table.push([7], np.ones((1, 2)))
        worker.step()
        average, square = (0.5 * 1 + 0.5) / (1 - 0.5**4), (0.5 * 4 + 0.5) / (1 - 0.5**4)
        np.testing.assert_allclose(table.pull([7]), -average / np.sqrt(square), rtol=1e-6)
        rowwise = worker.table("rowwise", 2, hw.RowwiseAdagrad(lr=1.0, eps=0.0))
        rowwise.assign([7, 8], np.zeros((2, 2)), {"sum": [8.0, 15.0], "step": [1, 2]})
        rowwise.push([7, 8], np.ones((2, 2)))
        worker.step()
        np.testing.assert_allclose(rowwise.pull([7, 8]), [[-1 / 3] * 2, [-1 / 4] * 2], rtol=1e-6)

    for transport in ("unix", "tcp"):
        alone(work, transport=transport, servers=2)


def test_assigned_rows_need_no_admission_and_expire_from_then_on():
    def work(worker):
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate())
        table = worker.table("t", 2, hw.Accumulate(), admission=hw.AfterCount(3), expiry=hw.AfterSteps(2))

        def update_others(times):
            for _ in range(times):
                model.push({"w": np.ones(1)})
                worker.step()

        table.push([1, 2], np.ones((2, 2)))
        worker.step()
        update_others(4)
        table.assign([2, 3], np.full((2, 2), 5.0))
        update_others(2)
        assert (len(table), table.pull([1, 2, 3]).tolist()) == (2, [[0, 0], [5, 5], [5, 5]])
        update_others(1)
        assert (len(table), table.pull([2]).tolist()) == (0, [[0, 0]])
        table.push([2], np.ones((1, 2)))
        worker.step()
        assert len(table) == 0  # what admission had counted of it was forgotten

    alone(work)


def test_the_least_recently_used_rows_make_room_for_assigned_ones():
    def work(worker):
        table = worker.table("t", 1, hw.Accumulate(), expiry=hw.LeastRecentlyUsed(4096))
        table.assign(np.arange(100_000), np.ones((100_000, 1)))
        return len(table)

    assert 0 < alone(work) < 20_000


def test_prefetched_rows_are_those_that_were_assigned_since():
    def work(worker):
        table = worker.table("t", 1, hw.SGD(lr=1.0))
        table.prefetch([1, 2])
        worker.step()
        table.assign([1], np.full((1, 1), 5.0))
        return table.pull([1, 2]).reshape(-1).tolist()

    for sync in ("sync", "async", "ssp:1"):
        assert alone(work, sync=sync) == [5.0, 0.0]


def test_assigned_rows_are_in_checkpoints(tmp_path):
    def work(worker):
        table = worker.table("t", 3, hw.Adam(lr=0.1))
        if not len(table):
            table.assign(IDS, vectors())
        rows = table.pull(IDS)
        table.push(IDS, np.ones((len(IDS), 3)))
        worker.step()
        return rows

    options = {"workers": 1, "engine": "inline", "checkpoint": tmp_path}
    first = hw.run(work, servers=2, **options).values[0]
    again = hw.run(work, servers=3, resume=True, **options).values[0]
    assert (first == vectors()).all()
    np.testing.assert_allclose(again, first - 0.1, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.5], np.ones((1, 2))), UsageError, "ids must be integers"),
        (([7, 8, 7], np.ones((3, 2))), UsageError, "takes each id once, 7 is there twice"),
        (([7], np.ones((1, 3))), GradientError, r"must have shape \(1, 2\), got \(1, 3\)"),
        (([7], [["a", "b"]]), GradientError, "real dtype"),
        (([7], np.ones((1, 2)), "keep"), GradientError, "'reset' or the states by name, got 'keep'"),
        (
            ([7], np.ones((1, 2)), {"sum": np.ones((1, 2))}),
            GradientError,
            "no state 'sum', its rule has 'exp",
        ),
        (([7], np.ones((1, 2)), {"exp_avg": np.ones((1, 2))}), GradientError, "'exp_avg_sq' is missing"),
        (
            ([7], np.ones((1, 2)), {"exp_avg": np.ones((1, 2)), "exp_avg_sq": np.ones(2)}),
            GradientError,
            r"state 'exp_avg_sq' of table 't' must have shape \(1, 2\), got \(2,\)",
        ),
        (
            ([7], np.ones((1, 2)), {"exp_avg": np.ones((1, 2)), "exp_avg_sq": np.ones((1, 2)), "step": -1}),
            GradientError,
            "'step' must be whole numbers ≥ 0, got -1",
        ),
    ],
)
def test_rows_that_cannot_be_assigned_are_refused_and_nothing_changes(arguments, error, text):
    def work(worker):
        table = worker.table("t", 2, hw.Adam(lr=0.1))
        table.assign([], np.ones((0, 2)))
        version = worker.version
        with pytest.raises(error, match=text):
            table.assign(*arguments)
        assert (len(table), worker.version) == (0, version)

    alone(work)


# ── pure ────────────────────────────────────────────────────────────────────────────────────────


@examples(40)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(-9, 9), unique=True, max_size=12)), max_size=8))
def test_any_order_of_pushes_and_assignments_does_what_a_dictionary_would(done):
    table, plain = make(dim=1), {}
    for step, (assigns, ids) in enumerate(done):
        if assigns:
            values = np.full((len(ids), 1), 100.0 + step, np.float32)
            table.assign(np.array(ids, np.int64), values, False, step)
            plain.update(dict.fromkeys(ids, 100.0 + step))
        else:
            push(table, ids, 1.0, step)
            plain.update({id: plain.get(id, 0.0) + 1.0 for id in ids})
    assert pull(table, list(plain)).reshape(-1).tolist() == list(plain.values())
    assert len(table) == len(plain)


def test_an_index_puts_ids_and_forgets_what_was_pending():
    index = Index(range(4096), needed=3)
    ids = np.arange(1000)
    assert index.claim(ids[:500]).refused == 500
    rows = index.put(ids, np.arange(1000, dtype=np.int32))
    assert sorted(rows.tolist()) == list(range(1000))
    assert index.pending()[0].tolist() == []
    assert index.claim(ids).counts.tolist() == list(range(1, 1001))
    assert (index.put(ids[::2].copy(), np.zeros(500, np.int32)) == rows[::2]).all()
    assert len(index) == 1000


def test_a_standby_has_the_rows_that_were_assigned():
    table = m.TableSpec("t", 2, hw.Adam(lr=0.1).to_spec(), hw.Zeros().to_spec(), 0, None, None)
    shard = Shard(0, 1, "mean")
    shard.hold(1, m.RegisterTable(1, table))
    shard.process(m.Registered(1, m.ExchangeId(1, 1), "t", "table"))
    snapshot, _ = shard.attach_standby()
    standby = Shard.restore(snapshot, "mean")
    rows = np.ones((2, 7), np.float32)
    rows[:, -1] = np.array([4, 5], np.int32).view(np.float32)
    for number, state in ((2, True), (3, False)):
        width = 7 if state else 2
        staged = StagedRows(0, np.array([7, 8 + number], np.int64), rows[:, :width].copy())
        shard.hold(1, m.AssignRows(number, m.Rows(0, 2, 0, 0), width, state), rows=[staged])
        standby.follow(shard.prepare(m.Assigned(number, number - 1, m.ExchangeId(1, number))))
        staged.rows[:] = 77.0
        for one in (shard, standby):
            one.commit(number)
    for one in (shard, standby):
        kept = one.snapshot().tables[0]
        assert dict(zip(kept.ids.tolist(), kept.counts.tolist(), strict=True)) == {7: 0, 10: 5, 11: 0}
        assert (kept.values == 1.0).all()
    assert digests(shard.snapshot()) == digests(standby.snapshot())
    negative = np.full((1, 7), np.array([-1], np.int32).view(np.float32)[0])
    with pytest.raises(UsageError, match="cannot have had -1 updates"):
        shard.hold(
            1, m.AssignRows(4, m.Rows(0, 1, 0, 0), 7, True), rows=[StagedRows(0, np.array([7]), negative)]
        )
    with pytest.raises(ProtocolError):
        shard.hold(
            1, m.AssignRows(4, m.Rows(5, 0, 0, 0), 2, False), rows=[StagedRows(5, IDS[:0], negative[:0])]
        )
