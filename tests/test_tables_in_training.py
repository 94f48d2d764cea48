"""Tables of whole clusters: what every mode promises of rows, in closed forms, and what is refused."""

import gc
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater import messages as m
from headwater.errors import (
    ConfigurationError,
    GradientError,
    NonFiniteError,
    ProtocolError,
    RegistrationError,
    UsageError,
)
from headwater.wire.channel import Outgoing
from headwater.worker.pulls import Ahead

DIM = 3
EXTREMES = [-(2**63), 2**63 - 1, 0, -1, 1]


def train(function, **options):
    return hw.run(function, engine="inline", patience=5, deadline=60, **options)


def constant(ids, value):
    return np.full((len(ids), DIM), value, np.float32)


# ── closed forms ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["sync", "async", "ssp:1"])
@pytest.mark.parametrize(
    ("workers", "servers", "transport"), [(1, 1, "unix"), (2, 2, "tcp"), (3, 5, "unix"), (4, 3, "unix")]
)
def test_what_workers_push_for_shared_and_own_ids_adds_up_exactly(mode, workers, servers, transport):
    steps = 4

    def work(worker):
        table = worker.table("sums", DIM, hw.Accumulate())
        own = [1000 + worker.rank, -5000 - worker.rank]
        shared = [*EXTREMES, 7, 7]  # 7 counts twice
        for _ in range(steps):
            table.push(shared, constant(shared, worker.rank + 1))
            table.push(own, constant(own, 1))
            table.push(own, constant(own, 1))
            worker.step()
        worker.barrier()
        total = steps * workers * (workers + 1) // 2
        assert (table.pull(EXTREMES) == total).all()
        assert (table.pull(7) == 2 * total).all()
        everybodys = np.array([[1000 + r, -5000 - r] for r in range(workers)])
        assert (table.pull(everybodys) == 2 * steps).all()
        assert len(table) == len(EXTREMES) + 1 + 2 * workers

    train(work, workers=workers, servers=servers, sync=mode, transport=transport)


def test_synchronous_gradients_of_an_id_are_summed_over_workers_and_divided_by_all_contributors():
    def work(worker):
        table = worker.table("means", DIM, hw.SGD(lr=0.5))
        if worker.rank < 3:
            table.push([1], constant([1], 8))
        if worker.rank == 0:
            table.push([2], constant([2], 16))
        if worker.rank < 3:  # the fourth has a turn without a gradient, and does not count
            worker.step()
            assert (table.pull([1]) == -0.5 * 8).all()
            assert (table.pull([2]) == -0.5 * 16 / 3).all()
        else:
            worker.step()

    train(work, workers=4, servers=2)


def test_a_step_carries_models_and_tables_as_one_version():
    def work(worker):
        model = worker.model("dense", {"w": np.zeros(5, np.float32)}, hw.Accumulate())
        table = worker.table("rows", DIM, hw.Accumulate())
        for k in range(1, 5):
            model.push({"w": np.ones(5)})
            table.push([3, 4], constant([3, 4], 1))
            assert worker.step().version == k
            assert (model.pull()["w"] == 2 * k).all()
            assert (table.pull([4, 3]) == 2 * k).all()

    assert train(work, workers=2, servers=3).version == 4


def _bits(servers, seed, transport="unix"):
    def work(worker):
        delays, draws = random.Random(f"{seed} {worker.rank}"), np.random.default_rng(worker.rank)
        table = worker.table(
            "rows",
            DIM,
            hw.Adam(lr=0.01),
            initializer=hw.Normal(std=1),
            admission=hw.AfterCount(2),
            expiry=hw.AfterSteps(4),
        )
        for _ in range(12):
            ids = draws.integers(-20, 20, 30)
            table.pull(ids)
            threading.Event().wait(delays.random() * 0.002)
            table.push(ids, draws.standard_normal((30, DIM)))
            worker.step()
        return table.pull(np.arange(-20, 20)).tobytes()

    values = train(work, workers=3, servers=servers, transport=transport).values
    assert len(set(values)) == 1
    return values[0]


def test_synchronous_tables_have_the_same_bits_for_any_number_of_servers_and_order_of_arrival():
    expected = _bits(1, 0)
    assert all(_bits(servers, seed) == expected for servers, seed in [(1, 1), (2, 2), (3, 3), (5, 4)])
    assert _bits(2, 5, "tcp") == expected


def test_a_pulled_unknown_id_has_the_value_that_its_first_push_starts_from():
    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate(), initializer=hw.Uniform(-1, 1), seed=3)
        before = table.pull(EXTREMES)
        assert len(table) == 0
        assert len(np.unique(before)) == before.size
        table.push(EXTREMES, constant(EXTREMES, 4))
        worker.step()
        assert (table.pull(EXTREMES) == before + np.float32(4)).all()
        assert len(table) == len(EXTREMES)

    train(work, workers=1, servers=3)


def test_a_gradient_that_admission_refuses_or_that_comes_after_expiry_changes_no_other_row():
    def work(worker):
        options = {"admission": hw.AfterCount(2), "expiry": hw.AfterSteps(2)}
        table = worker.table("rows", DIM, hw.Accumulate(), **options)
        for step in range(1, 7):
            ids = [1, 2] if step <= 2 else [1, 100 + step]  # each of 103, 104, … comes once
            table.push(ids, np.repeat(np.array(ids, np.float32)[:, None], DIM, axis=1))
            worker.step()
        assert (table.pull(1) == 5).all()  # all but the first
        assert (table.pull([103, 104, 105, 106, 2]) == 0).all()  # never admitted, or expired
        assert len(table) == 1
        table.push([2], constant([2], 9))  # expired, so admission counts anew
        worker.step()
        assert (table.pull(2) == 0).all()
        table.push([2], constant([2], 9))
        worker.step()
        assert (table.pull(2) == 9).all()

    train(work, workers=1, servers=2)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_deleted_ids_start_from_their_initial_values_again(transport):
    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate(), initializer=hw.Uniform(0, 1))
        initial = table.pull([1, 2])
        table.push([1, 2], constant([1, 2], 1))
        worker.step()
        version = worker.version
        assert table.delete([[2, 2, 55]]) == 1
        assert worker.version == version + 1
        assert (table.pull([1, 2]) == np.stack([initial[0] + np.float32(1), initial[1]])).all()
        assert len(table) == 1
        assert bool(table)

    train(work, workers=1, servers=3, transport=transport)


@pytest.mark.parametrize("servers", [1, 2, 7])
def test_deleting_counts_the_rows_that_have_not_expired_whatever_was_swept(servers):
    def work(worker):
        model = worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate())
        table = worker.table("rows", 2, hw.Accumulate(), expiry=hw.AfterSteps(5))

        def update_others(times):
            for _ in range(times):
                model.push({"w": np.ones(1)})
                worker.step()

        table.push(np.arange(300), np.ones((300, 2)))
        worker.step()
        update_others(3)
        table.push(np.arange(100), np.ones((100, 2)))
        worker.step()
        update_others(2)
        assert (len(table), table.delete(np.arange(50, 300))) == (100, 50)
        update_others(4)
        assert (len(table), table.delete(np.arange(300))) == (0, 0)

    train(work, workers=1, servers=servers)


def test_the_rate_of_a_table_changes_with_the_next_step_and_schedules_count_its_own_updates():
    def work(worker):
        plain = worker.table("plain", DIM, hw.SGD(lr=1.0))
        decaying = worker.table("decaying", DIM, hw.SGD(lr=hw.StepDecay(1.0, every=2, factor=0.5)))
        plain.set(lr=0.25)
        plain.push([1], constant([1], -4))
        worker.step()
        assert (plain.pull(1) == 1).all()
        for _ in range(4):
            decaying.push([1], constant([1], -4))
            worker.step()
        assert (decaying.pull(1) == 4 + 4 + 2 + 2).all()

    train(work, workers=1, servers=2)


# ── rows that are asked for ahead ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("mode", ["sync", "ssp:2", "async"])
def test_prefetched_rows_are_those_that_a_pull_after_the_step_gives(mode, transport):
    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate())
        for k in range(1, 9):
            table.push([1, 2], constant([1, 2], 1))
            table.prefetch([2, 1, 9])
            worker.step()
            version = worker.version
            rows = table.pull([2, 1, 9])
            assert worker.version == version  # no exchange was made
            assert table.read_version == version
            assert (rows[2] == 0).all()
            assert (rows[:2] >= k).all()
            if mode == "sync":
                assert (rows[:2] == 2 * k).all()

    train(work, workers=2, servers=2, sync=mode, transport=transport)


def test_settings_are_those_of_the_table_that_they_are_for():
    """Of the second of two, in a step that carries both."""

    def work(worker):
        first, second = (worker.table(name, 1, hw.SGD(lr=1.0)) for name in ("first", "second"))
        second.set(lr=0.5)
        for table in (first, second):
            table.push([1], [[1.0]])
        worker.step()
        return first.pull([1]).item(), second.pull([1]).item(), first.rule.lr, second.rule.lr

    assert train(work, workers=1, servers=2).values == [(-1.0, -0.5, 1.0, 0.5)]


def test_what_others_assign_or_delete_after_a_step_is_not_in_what_came_with_it():
    asked, changed = threading.Event(), threading.Event()

    def work(worker):
        table = worker.table("rows", 1, hw.Accumulate())
        table.push([1, 2], [[1.0], [1.0]])
        if worker.rank == 0:
            table.prefetch([1, 2])
        worker.step()
        if worker.rank == 1:
            assert asked.wait(30)
            table.assign([1], [[9.0]])
            table.delete([2])
            changed.set()
            return None
        asked.set()
        assert changed.wait(30)
        return [table.pull([1, 2]).ravel().tolist() for _ in range(2)]

    for mode in ("sync", "async"):
        asked.clear()
        changed.clear()
        ahead, anew = train(work, workers=2, servers=2, sync=mode).values[0]
        assert ahead == [2.0, 2.0] or mode == "async"
        assert anew == [9.0, 0.0]


def test_a_prefetch_is_used_once_and_only_where_the_worker_has_seen_nothing_later():
    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate())
        for k in range(1, 4):
            table.prefetch([1, 1, 2])
            table.push([1], constant([1], 1))
            worker.step()
            number = exchanges(worker)
            assert (table.pull([1, 1, 2])[:2] == k).all()
            assert exchanges(worker) == number
            assert (table.pull([1, 1, 2])[:2] == k).all()
            assert exchanges(worker) == number + 1  # asked anew
        table.prefetch([1])
        worker.step()
        table.assign([1], np.full((1, DIM), 9, np.float32))
        assert (table.pull([1]) == 9).all()

    for mode in ("sync", "ssp:1", "async"):
        train(work, workers=1, servers=2, sync=mode)


# ── several tables at once ──────────────────────────────────────────────────────────────────────


def exchanges(worker):
    return worker._session.machine.number


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_several_tables_are_pulled_in_one_exchange_with_the_rows_that_each_would_give(transport):
    def work(worker):
        tables = [worker.table(name, dim, hw.Accumulate()) for name, dim in (("a", 2), ("b", 5), ("c", 1))]
        batches = [np.array([[3, 1], [1, 7]]), np.array([], np.int64), np.arange(40) % 7]
        for table in tables:
            table.push(np.arange(8), np.arange(8 * table.dim, dtype=np.float32).reshape(8, -1))
        worker.step()
        before = exchanges(worker)
        pulled = worker.pull(dict(zip(tables, batches, strict=True)))
        assert exchanges(worker) == before + 1
        for (table, rows), ids in zip(pulled.items(), batches, strict=True):
            assert rows.shape == (*ids.shape, table.dim)
            assert table.read_version == worker.version
            assert (rows == table.pull(ids)).all()
        assert worker.pull({}) == {}

    train(work, workers=1, servers=2, transport=transport)


def test_tables_pulled_together_are_of_one_version_beside_a_worker_that_steps():
    def work(worker):
        one, other = (worker.table(name, 1, hw.Accumulate()) for name in ("one", "other"))
        if worker.rank == 0:
            for _ in range(200):
                for table in (one, other):
                    table.push([1, 2, 3], np.ones((3, 1), np.float32))
                worker.step()
            return 0
        seen = 0.0
        for k in range(60):
            if k % 3 == 0:  # rows that a step brought are used for both tables, or for neither
                one.prefetch([1, 2, 3])
                worker.step()
            pulled = worker.pull({one: [1, 2, 3], other: [3, 1]})
            values = {value for rows in pulled.values() for value in rows.ravel().tolist()}
            assert len(values) == 1, values
            assert values >= {max(seen, *values)}
            seen = max(values)
        return seen

    train(work, workers=2, servers=2, sync="async")


def test_the_programs_of_the_page_on_tables_run():
    page = (Path(__file__).parent.parent / "docs" / "tables.md").read_text()
    results = []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        names = {"__name__": "page"}
        exec(compile(block, "tables.md", "exec"), names)
        results.append(train(names["train"], workers=2, servers=2).values)
    assert results[0] == [3, 3]
    assert max(results[1]) < 0.5


def test_rows_that_came_ahead_and_nobody_pulled_are_not_kept():
    def work(worker):
        table = worker.table("t", 2, hw.SGD(lr=1.0))
        for step in range(5):
            table.local.bring([(table.local, [step])])
            table.local.bring([(table.local, [step + 100])])
            worker.step()
        return sum(type(one) is Ahead for one in gc.get_objects())

    assert train(work, workers=1, servers=1, sync="sync").values == [0]


def test_rows_of_all_tables_that_were_prefetched_need_no_exchange():
    def work(worker):
        tables = [worker.table(name, 1, hw.Accumulate()) for name in "ab"]
        for k in range(1, 4):
            for table in tables:
                table.push([k, 0], np.ones((2, 1), np.float32))
                table.prefetch([0, k])
            before = exchanges(worker)
            worker.step()
            pulled = worker.pull({table: [0, k] for table in tables})
            assert exchanges(worker) == before + 1
            assert [rows.ravel().tolist() for rows in pulled.values()] == [[k, 1], [k, 1]]

    for mode in ("sync", "ssp:1", "async"):
        train(work, workers=1, servers=2, sync=mode)


def test_what_was_prefetched_is_not_used_after_anything_else_happened():
    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate())
        table.push([1], constant([1], 1))
        table.prefetch([1])
        worker.step()
        worker.barrier()
        if worker.rank == 0:
            table.delete([1])
        worker.barrier()
        assert (table.pull([1]) == 0).all()

    train(work, workers=2, servers=2)


def test_a_scratch_window_grows_while_rows_are_staged_and_on_their_way():
    many = np.arange(200_000)

    def work(worker):
        table = worker.table("rows", DIM, hw.Accumulate())
        table.prefetch([5])
        table.push([5], constant([5], 1))
        table.push(many, constant(many, 1))
        worker.step()
        assert (table.pull(many).sum(axis=1) == DIM * (1 + (many == 5))).all()
        return len(table)

    for mode in ("sync", "async"):
        assert train(work, workers=1, servers=2, sync=mode).values == [200_000]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cluster():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=30) as cluster:
        yield cluster


@pytest.fixture
def worker(cluster):
    with cluster.worker() as worker:
        yield worker


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1.5], "integers"),
        (np.array(["a"], object), "integers"),
        (np.array([2**63], np.uint64), "int64"),
        ([True], "integers"),
    ],
)
def test_ids_that_are_not_int64_are_refused(worker, ids, text):
    table = worker.table("rows", DIM, hw.Accumulate())
    for call in (table.pull, table.delete, table.prefetch, lambda ids: table.push(ids, constant(ids, 1))):
        with pytest.raises(UsageError, match=text):
            call(ids)
    worker.step()
    assert len(table) == 0


@pytest.mark.parametrize("shape", [(2, DIM + 1), (3, DIM), (2,), (2, DIM, 1)])
def test_gradients_that_do_not_fit_are_refused_and_nothing_is_staged(worker, shape):
    table = worker.table("rows", DIM, hw.Accumulate())
    with pytest.raises(GradientError, match=r"\(2, 3\)"):
        table.push([1, 2], np.zeros(shape))
    worker.step()
    assert len(table) == 0


def test_rows_with_nan_are_refused_and_what_was_staged_before_stays(worker):
    table = worker.table("rows", DIM, hw.Accumulate())
    table.push([1], constant([1], 1))
    with pytest.raises(NonFiniteError, match="'rows'"):
        table.push([1, 2], constant([1, 2], np.nan))
    worker.step()
    assert (table.pull([1, 2])[:, 0] == [1, 0]).all()


def test_rows_with_nan_make_an_empty_turn_where_they_are_skipped(worker):
    table = worker.table("rows", DIM, hw.Accumulate(), nonfinite="skip")
    table.push([1], constant([1], np.inf))
    assert worker.step().contributors == 0
    assert len(table) == 0
    assert worker.statistics().skipped == 1


def test_no_ids_at_all_are_no_error(worker):
    table = worker.table("rows", DIM, hw.Accumulate())
    assert table.pull([]).shape == (0, DIM)
    assert table.pull(np.empty((4, 0), np.int64)).shape == (4, 0, DIM)
    table.push([], np.empty((0, DIM)))
    table.prefetch([])
    assert worker.step().contributors == 0
    assert table.delete([]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 2.0}, "dim"),
        ({"dim": 1 << 20}, "dim"),
        ({"rule": "adam"}, "rule"),
        ({"initializer": 0.5}, "initializer"),
        ({"seed": 2**64}, "seed"),
        ({"admission": 3}, "admission"),
        ({"expiry": hw.AfterCount(3)}, "expiry"),
    ],
)
def test_a_table_that_cannot_be_is_refused(worker, options, text):
    options = {"dim": DIM, "rule": hw.Accumulate(), **options}
    with pytest.raises(RegistrationError, match=text):
        worker.table("rows", options.pop("dim"), options.pop("rule"), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hw.AfterCount(0),
        lambda: hw.AfterSteps(0),
        lambda: hw.LeastRecentlyUsed(10),
        lambda: hw.Normal(std=-1),
        lambda: hw.Uniform(float("nan"), 1),
    ],
)
def test_impossible_policies_are_refused_where_they_are_made(make):
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ({"dim": 4}, "dim 3, got dim 4"),
        ({"rule": hw.SGD(lr=1)}, "rule Accumulate, got SGD"),
        ({"initializer": hw.Normal(std=1)}, "initializer"),
        ({"seed": 1}, "seed 0, got seed 1"),
        ({"admission": hw.AfterCount(2)}, "admission None, got admission AfterCount"),
        ({"expiry": hw.AfterSteps(2)}, "expiry"),
    ],
)
def test_a_table_declared_differently_by_another_worker_is_refused_and_both_are_named(second, text):
    def work(worker):
        options = {"dim": DIM, "rule": hw.Accumulate()}
        if worker.rank == 1:
            worker.barrier()
            options |= second
            with pytest.raises(RegistrationError, match=text):
                worker.table("rows", options.pop("dim"), options.pop("rule"), **options)
            assert len(worker.table("rows", DIM, hw.Accumulate())) == 0
        else:
            worker.table("rows", options.pop("dim"), options.pop("rule"), **options)
            worker.barrier()

    train(work, workers=2, servers=2)


def test_settings_that_a_rule_cannot_have_are_refused(worker):
    table = worker.table("rows", DIM, hw.SGD(lr=1))
    for wrong in ({"lr": -1}, {"momentum": 0.9}, {"rate": 1}):
        with pytest.raises(ConfigurationError):
            table.set(**wrong)


def _rows(table=0, count=1, ids=0, rows=64):
    return m.Rows(table, count, ids, rows)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda n: m.PullRows(n, (_rows(table=7),)),
        lambda n: m.PullRows(n, (_rows(count=-1),)),
        lambda n: m.PullRows(n, (_rows(count=2**40),)),
        lambda n: m.PullRows(n, (_rows(ids=2**62),)),
        lambda n: m.PullRows(n, (_rows(rows=2),)),
        lambda n: m.CountRows(n, 7),
        lambda n: m.Step(n, 1, 0, (), (), False, pushed=(_rows(), _rows())),
    ],
)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_requests_for_rows_that_are_not_there_end_their_connection_only(request_of, transport):
    with hw.Cluster(workers=1, servers=1, patience=5, deadline=30, transport=transport) as cluster:
        with cluster.worker() as wrong:
            wrong.table("rows", DIM, hw.Accumulate()).pull([1])
            with pytest.raises(ProtocolError):
                wrong._session.call(lambda server, number: Outgoing(request_of(number)), "wrong")
        with cluster.worker() as other:
            table = other.table("rows", DIM, hw.Accumulate())
            table.push([1], constant([1], 1))
            other.step()
            assert (table.pull([1]) == 1).all()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_ids_of_another_server_end_the_connection_only(transport):
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=30, transport=transport) as cluster:
        with cluster.worker() as wrong:
            table = wrong.table("rows", DIM, hw.Accumulate())
            table._session.finish()
            _, plan = table.local.plan(np.arange(100))
            plan.ids[:] = plan.ids[::-1].copy()
            with pytest.raises(ProtocolError):
                table.pull(np.arange(100))
        with cluster.worker() as other:
            assert len(other.table("rows", DIM, hw.Accumulate())) == 0


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_worker_s_memory_for_rows_does_not_grow_with_its_steps(mode, transport):
    cluster = hw.Cluster(workers=1, servers=2, sync=mode, transport=transport, deadline=20)
    with cluster, cluster.worker() as worker:
        table = worker.table("rows", 16, hw.SGD(lr=1.0))
        sizes = set()
        for step in range(40):
            ids = np.arange(step, step + 2000)
            table.pull(ids[:100])
            table.prefetch(ids + 1)
            table.push(ids, np.ones((2000, 16), np.float32))
            worker.step()
            table.pull(ids + 1)
            table.delete(ids[:3])
            sizes.add(len(worker._rows._scratch.memory))
            assert worker._rows.used == 0, "whatever was taken is given back"
        assert len(sizes) == 1
