"""Whole clusters of threads: what section by section of the guarantees promises, in closed forms."""

import itertools
import random
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw

MODES = ["sync", "async", "ssp:2"]

SIZES = {
    "tiny": {"scalar": (), "one": (1,)},
    "odd": {"a": (3, 5), "b": (1023,), "c": (7, 11, 13), "empty": (0, 4)},
    "large": {"big": (300_001,), "small": (2,)},
}


def train(function, **options):
    return hw.run(function, engine="inline", patience=5, deadline=60, **options)


def zeros(shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def filled(shapes, value):
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def assert_all(values, expected):
    for name, array in values.items():
        assert (array == expected).all(), f"{name}: {np.unique(array)[:5]} instead of {expected}"


@pytest.mark.parametrize(
    ("workers", "servers", "size", "transport"),
    [
        (1, 1, "odd", "unix"),
        (2, 2, "large", "unix"),
        (3, 2, "tiny", "unix"),
        (3, 3, "odd", "tcp"),
        (7, 5, "odd", "unix"),
        (2, 2, "large", "tcp"),
        (7, 1, "large", "unix"),
    ],
)
def test_synchronous_sum_is_exact_on_every_worker_after_each_pull(workers, servers, size, transport):
    shapes = SIZES[size]

    def work(worker):
        model = worker.model("sums", filled(shapes, 1), hw.Accumulate())
        for k in range(1, 6):
            model.push(filled(shapes, worker.rank + 1))
            result = worker.step()
            assert result == hw.StepResult(k, True, workers, 0)
            assert_all(model.pull(), 1 + k * workers * (workers + 1) // 2)

    result = train(work, workers=workers, servers=servers, transport=transport)
    assert result.version == 5
    assert_all(result.parameters["sums"], 1 + 5 * workers * (workers + 1) // 2)


@pytest.mark.parametrize("mode", ["async", "ssp:1"])
@pytest.mark.parametrize(("workers", "servers", "transport"), [(1, 1, "unix"), (3, 2, "tcp"), (7, 3, "unix")])
def test_asynchronous_sum_is_exact_at_the_end(mode, workers, servers, transport):
    shapes = SIZES["odd"]

    def work(worker):
        model = worker.model("sums", filled(shapes, 1), hw.Accumulate())
        for _ in range(6):
            model.push(filled(shapes, worker.rank + 1))
            worker.step()
        worker.barrier()
        assert_all(model.pull(), 1 + 6 * workers * (workers + 1) // 2)

    result = train(work, workers=workers, servers=servers, sync=mode, transport=transport)
    assert result.version == 6 * workers


def _bits(servers, delay_seed, transport="unix"):
    """Parameters after some steps whose arrival order the seed shuffles."""
    shapes = {"w": (50, 41), "b": (700,), "rare": (3,)}

    def work(worker):
        delays = random.Random(f"{delay_seed} {worker.rank}")
        gradients = np.random.default_rng(worker.rank)
        model = worker.model("net", filled(shapes, 0.5), hw.Adam(lr=0.01))
        for k in range(6):
            threading.Event().wait(delays.random() * 0.004)
            names = shapes if (k + worker.rank) % 3 == 0 else ["w", "b"]
            model.push({n: gradients.standard_normal(shapes[n]).astype(np.float32) for n in names})
            worker.step()

    result = train(work, workers=3, servers=servers, transport=transport)
    return b"".join(array.tobytes() for _, array in sorted(result.parameters["net"].items()))


def test_synchronous_training_gives_the_same_bits_for_any_number_of_servers_and_order_of_arrival():
    expected = _bits(1, 0)
    assert all(_bits(servers, seed) == expected for servers, seed in [(1, 1), (2, 2), (3, 3), (5, 4)])
    assert _bits(2, 5, "tcp") == expected


@pytest.mark.parametrize("mode", [*MODES, "sync:quorum=1"])
def test_every_pull_is_one_version_on_all_servers_under_continuous_pushes(mode):
    """Two workers add 1 with every step and pull between, and an observer reads all the while."""
    over = threading.Event()

    def work(worker):
        model = worker.model("v", zeros({"v": (9000,)}), hw.Accumulate())
        while not over.is_set():
            model.push(filled({"v": (9000,)}, 1))
            worker.step()
            values = model.pull()["v"]
            assert values.min() == values.max(), "an answer mixes versions"
            check(values[0], worker.version)

    def check(value, version):
        fewest, most = {"sync": (2, 2), "sync:quorum=1": (1, 2)}.get(mode, (1, 1))
        alone = over.is_set()  # in its last round a worker may be: the other has ended
        assert fewest * version - alone <= value <= most * version, (value, version)

    with hw.Cluster(workers=2, servers=3, sync=mode, engine="inline", patience=5, deadline=60) as cluster:
        for rank in range(2):
            cluster.start_worker(rank, work)
        wait_until(lambda: cluster.statistics().version > 5, watch=cluster)
        for _ in range(20):
            version, parameters = cluster.parameters()
            values = parameters["v"]["v"]
            assert values.min() == values.max(), "an answer mixes versions"
            check(values[0], version)
        over.set()
        assert [cluster.next_outcome(30).failure for _ in range(2)] == [None, None]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_bounded_staleness_answers_contain_all_own_steps_and_all_but_the_bound_of_the_others(bound):
    workers, steps = 3, 12
    names = {f"of {rank}": (5,) for rank in range(workers)}

    def work(worker):
        delays = random.Random(worker.rank)
        model = worker.model("counts", zeros(names), hw.Accumulate())
        for clock in range(1, steps + 1):
            threading.Event().wait(delays.random() * 0.003 * (worker.rank + 1))
            model.push({f"of {worker.rank}": np.ones(5, np.float32)})
            worker.step()
            seen = {name: values[0] for name, values in model.pull().items()}
            assert seen[f"of {worker.rank}"] == clock
            assert min(seen.values()) >= clock - bound

    train(work, workers=workers, servers=2, sync=f"ssp:{bound}")


def test_an_asynchronous_worker_does_not_wait_for_one_that_never_steps():
    fast_is_done = threading.Event()

    def work(worker):
        model = worker.model("v", zeros({"v": (4,)}), hw.Accumulate())
        if worker.rank == 1:
            for _ in range(20):
                model.push({"v": np.ones(4)})
                worker.step()
            fast_is_done.set()
        assert fast_is_done.wait(30)

    assert train(work, workers=2, sync="async").version == 20


@pytest.mark.parametrize("mode", MODES)
def test_uneven_data_then_barrier_then_evaluation_on_rank_0_never_hangs(mode):
    samples = np.arange(37, dtype=np.float32)

    def work(worker):
        model = worker.model("sum", zeros({"sum": (1,)}), hw.Accumulate())
        for batch in worker.batches(samples, 4 + 3 * worker.rank, epochs=2):
            model.push({"sum": [batch.sum()]})
            worker.step()
        worker.barrier()
        return float(model.pull()["sum"][0]) if worker.rank == 0 else None

    assert train(work, workers=3, servers=2, sync=mode).values == [2 * samples.sum(), None, None]


@pytest.mark.parametrize("mode", MODES)
def test_epochs_in_loops_of_their_own_and_sums_between_them(mode):
    def work(worker):
        model = worker.model("n", zeros({"n": (1,)}), hw.Accumulate())
        totals = []
        for epoch in range(3):
            for batch in worker.batches(np.arange(11), 2, seed=epoch, shuffle=True):
                model.push({"n": [len(batch)]})
                worker.step()
            totals.append(worker.sum(seen=worker.rank + epoch))
        worker.barrier()
        return totals, float(model.pull()["n"][0])

    expected = ([{"seen": 3.0 + 3 * epoch} for epoch in range(3)], 33.0)
    assert train(work, workers=3, sync=mode).values == [expected] * 3


def test_stop_ends_everybodys_batches_at_one_version():
    def work(worker):
        worker.model("v", zeros({"v": (1,)}), hw.Accumulate())
        for _ in worker.batches(np.arange(1000), 2):
            worker.step()
            if worker.rank == 1 and worker.version == 7:
                worker.stop()
        return worker.version

    assert train(work, workers=3, servers=2).values == [8, 8, 8]


def test_settings_travel_with_a_step_and_the_lowest_rank_wins():
    def work(worker):
        model = worker.model("v", zeros({"v": (1,)}), hw.SGD(lr=1.0))
        values = []
        for k in range(3):
            if k == 1:
                model.set(lr=0.5 if worker.rank == 1 else 0.25)
            model.push({"v": [-1.0]})
            worker.step()
            values.append(float(model.pull()["v"][0]))
        return values

    assert train(work, workers=2).values == [[1.0, 1.25, 1.5]] * 2


def test_groups_have_settings_of_their_own():
    def work(worker):
        model = worker.model(
            "net",
            zeros({"w": (3,), "b": (2,)}),
            hw.SGD(lr=1.0),
            groups=[hw.Group(["b"], hw.SGD(lr=0.125, momentum=0.5))],
        )
        for _ in range(2):
            model.push({"w": -np.ones(3), "b": -np.ones(2)})
            worker.step()
        model.set(group=1, lr=1.0)
        model.push({"b": np.zeros(2)})
        worker.step()
        return {name: float(values[0]) for name, values in model.pull().items()}

    assert train(work, workers=1, servers=2).values == [{"w": 2.0, "b": 0.125 + 0.125 * 1.5 + 0.75}]


def test_a_tensor_that_nobody_carries_is_untouched_and_one_that_some_carry_is_divided_by_all():
    def work(worker):
        model = worker.model(
            "net", filled({"a": (2,), "b": (2,), "c": (2,)}, 1), hw.AdamW(lr=0.1, weight_decay=0.5)
        )
        before = model.pull(copy=True)
        model.push({"a": np.ones(2)})
        if worker.rank == 0:
            model.push({"b": np.ones(2)})
        result = worker.step()
        assert result.contributors == 2
        after = model.pull()
        assert (after["c"] == before["c"]).all()
        return result.version

    assert train(work, workers=2).values == [1, 1]

    def mean(worker):
        model = worker.model("net", zeros({"a": (2,)}), hw.SGD(lr=1.0))
        if worker.rank < 2:
            model.push({"a": np.full(2, -4.0)})
        contributors = worker.step().contributors
        return contributors, float(model.pull()["a"][0])

    assert train(mean, workers=3).values == [(2, 4.0)] * 3


def test_pushes_before_a_step_add_up_and_the_pushed_arrays_stay_as_they_were():
    def work(worker):
        model = worker.model("v", zeros({"v": (4,)}), hw.Accumulate())
        pushed = np.arange(4, dtype=np.float32)
        for _ in range(3):
            model.push({"v": pushed})
        worker.step()
        values = model.pull()["v"]
        assert (pushed == np.arange(4)).all()
        assert not values.flags.writeable
        return values.tolist()

    assert train(work, workers=1).values == [[0.0, 3.0, 6.0, 9.0]]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_assign_sets_values_for_everybody_and_is_a_version_of_its_own(transport):
    def work(worker):
        model = worker.model("v", zeros({"v": (3000,), "w": (2,)}), hw.Accumulate())
        worker.barrier()
        if worker.rank == 1:
            model.assign({"v": np.full(3000, 5.0)})
        worker.barrier()
        assert_all({"v": model.pull()["v"]}, 5)
        assert_all({"w": model.pull()["w"]}, 0)
        return worker.version

    assert train(work, workers=2, servers=2, transport=transport).values == [1, 1]


def test_two_models_leave_in_one_step():
    def work(worker):
        first = worker.model("first", zeros({"v": (5,)}), hw.Accumulate())
        second = worker.model("second", zeros({"v": (2000,)}), hw.SGD(lr=1.0))
        assert worker.model("first", zeros({"v": (5,)}), hw.Accumulate()) is first
        first.push({"v": np.ones(5)})
        second.push({"v": -np.ones(2000)})
        assert worker.step().version == 1
        assert_all(first.pull(), worker.workers)
        assert_all(second.pull(), 1)

    result = train(work, workers=2, servers=2)
    assert set(result.parameters) == {"first", "second"}


def test_initial_values_are_those_of_the_lowest_rank():
    def work(worker):
        model = worker.model("v", {"v": np.full(3, worker.rank + 10.0, np.float32)}, hw.Accumulate())
        return float(model.pull()["v"][0])

    assert train(work, workers=3, servers=2).values == [10.0] * 3


def test_workers_can_join_from_one_thread_and_through_the_address():
    with hw.Cluster(workers=2, sync="async") as cluster:
        first, second = cluster.worker(), hw.connect(cluster.address)
        assert (first.rank, second.rank) == (0, 1)
        models = [worker.model("v", zeros({"v": (2,)}), hw.Accumulate()) for worker in (first, second)]
        for worker, model in itertools.product((first, second), models):
            if model._session is worker._session:
                model.push({"v": np.ones(2)})
                worker.step()
        assert_all(models[0].pull(), 2)
        late = cluster.worker()
        assert_all(late.model("v", zeros({"v": (2,)}), hw.Accumulate()).pull(), 2)
        for worker in (late, second, first):
            worker.leave()
            worker.leave()
        assert cluster.parameters()[0] == 2


def test_many_clusters_live_in_one_process():
    with hw.Cluster(workers=1) as first, hw.Cluster(workers=1, servers=2) as second:
        with first.worker() as one, second.worker() as two:
            for worker, value in ((one, 1), (two, 2)):
                model = worker.model("v", zeros({"v": (3,)}), hw.Accumulate())
                model.push({"v": np.full(3, value)})
                worker.step()
        assert_all(first.parameters()[1]["v"], 1)
        assert_all(second.parameters()[1]["v"], 2)


def test_arrays_got_from_a_worker_stay_valid_after_it_left():
    with hw.Cluster(workers=1) as cluster:
        with cluster.worker() as worker:
            values = worker.model("v", filled({"v": (5000,)}, 3), hw.Accumulate()).pull()
        assert_all(values, 3)
    assert_all(values, 3)


def test_half_precision_parameters_and_double_gradients_are_converted():
    def work(worker):
        model = worker.model("v", {"v": np.ones(3, np.float16)}, hw.SGD(lr=1.0))
        model.push({"v": np.full(3, -0.5, np.float64)})
        worker.step()
        return model.pull()["v"].dtype, model.pull()["v"].tolist()

    assert train(work, workers=1).values == [(np.float32, [1.5] * 3)]


def test_anything_with_dlpack_can_be_pushed():
    class OnlyDlpack:
        def __init__(self, array):
            self._array = array

        def __dlpack__(self, **options):
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self._array.__dlpack_device__()

    def work(worker):
        model = worker.model("v", zeros({"v": (3,)}), hw.Accumulate())
        model.push({"v": OnlyDlpack(np.ones(3, np.float32))})
        worker.step()
        return model.pull()["v"].tolist()

    assert train(work, workers=1).values == [[1.0] * 3]


def test_a_death_retires_the_worker_and_the_others_go_on():
    with hw.Cluster(workers=2) as cluster:
        first, second = cluster.worker(), cluster.worker()
        models = [worker.model("v", zeros({"v": (2,)}), hw.Accumulate()) for worker in (first, second)]
        second._session.close()
        models[0].push({"v": np.ones(2)})
        assert first.step().contributors == 1
        assert_all(models[0].pull(), 1)
        first.leave()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_the_rules_state_can_be_read_by_tensor_name(transport):
    def work(worker):
        shapes = {"w": (3000,), "b": (2,), "idle": (1,)}
        model = worker.model("net", zeros(shapes), hw.Adam(betas=(0.5, 0.75)))
        for names in (["w", "b"], ["w"]):
            model.push({name: np.ones(sizes[name]) for name in names})
            worker.step()
        return model.state()

    sizes = {"w": 3000, "b": 2}
    state = train(work, workers=1, servers=3, transport=transport).values[0]
    assert {name: one["step"] for name, one in state.items()} == {"w": 2, "b": 1, "idle": 0}
    assert_all({"w": state["w"]["exp_avg"]}, 0.75)
    assert_all({"w": state["w"]["exp_avg_sq"]}, 0.4375)
    assert_all({"b": state["b"]["exp_avg"], "idle": state["idle"]["exp_avg"] + 0.5}, 0.5)
    assert state["b"]["exp_avg_sq"].shape == (2,)


def test_a_pull_is_current_whatever_else_was_exchanged_since_the_last_read():
    with (
        hw.Cluster(workers=2, sync="async") as cluster,
        cluster.worker() as reader,
        cluster.worker() as writer,
    ):
        mine = [reader.model(name, zeros({"v": (2,)}), hw.Accumulate()) for name in ("a", "b")]
        theirs = [writer.model(name, zeros({"v": (2,)}), hw.Accumulate()) for name in ("a", "b")]
        reader.step()
        for model in theirs:
            model.push({"v": np.ones(2)})
        writer.step()
        for model in mine:
            assert_all(model.pull(), 1)
            assert model.read_version == 2


def test_staleness_counts_from_the_version_that_was_read():
    with (
        hw.Cluster(workers=2, sync="async") as cluster,
        cluster.worker() as reader,
        cluster.worker() as writer,
    ):
        mine, theirs = (worker.model("a", zeros({"v": (2,)}), hw.Accumulate()) for worker in (reader, writer))
        for _ in range(3):
            theirs.push({"v": np.ones(2)})
            writer.step()
        reader.stop()
        mine.push({"v": np.ones(2)})
        assert reader.step().staleness == 3
        assert reader.step().staleness == 0
