"""A program that runs again: same results of meetings, its own epoch, and what it kept."""

import threading

import numpy as np
import pytest

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError, MeetingError, StalledError, UsageError
from headwater.log import programs as kept_programs
from headwater.worker import Worker, plain
from headwater.worker import program as worker_program


def joined(cluster, rank=0):
    return Worker(cluster.address, rank)


def die(worker):
    """End a worker as a crash does: its connections close, nobody is told."""
    worker._session.close()
    worker._close()


def model_of(worker):
    return worker.model("m", {"w": np.zeros(1, np.float32)}, hw.Accumulate())


def step(worker, model):
    model.push({"w": np.ones(1)})
    return worker.step()


def side_by_side(*calls):
    """Run these at the same time; what each returned or raised."""
    found = [None] * len(calls)

    def body(place):
        try:
            found[place] = calls[place]()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            found[place] = error

    threads = [threading.Thread(target=body, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


# ── meetings ────────────────────────────────────────────────────────────────────────────────────


def test_a_sum_says_who_contributed():
    def train(worker):
        if worker.rank == 2:
            return None
        found = worker.sum(x=worker.rank + 1, y=2)
        assert found == {"x": 3.0, "y": 4.0}
        return found.contributors, found.ranks

    result = hw.run(train, workers=3, engine="inline", deadline=30)
    assert result.values == [(2, (0, 1)), (2, (0, 1)), None]


def test_everybody_gathers_and_gets_the_broadcast():
    def train(worker):
        told = worker.broadcast({"epoch": 3, "order": np.arange(4)} if worker.rank == 1 else None, root=1)
        assert told["epoch"] == 3
        assert told["order"].tolist() == [0, 1, 2, 3]
        found = worker.gather(scores=np.full(worker.rank + 1, worker.rank, np.int16), one=worker.rank)
        assert (found.contributors, found.ranks) == (3, (0, 1, 2))
        assert [array.dtype for array in found["scores"]] == [np.int16] * 3
        return np.concatenate(found["scores"]).tolist(), [int(one) for one in found["one"]]

    for servers in (1, 2):
        result = hw.run(train, workers=3, servers=servers, engine="inline", deadline=30)
        assert result.values == [([0, 1, 1, 2, 2, 2], [0, 1, 2])] * 3


def test_what_is_too_long_for_one_exchange_takes_several(monkeypatch):
    monkeypatch.setattr("headwater.worker.meetings._TOGETHER", 3000)
    sizes = [0, 7, 4000]

    def train(worker):
        found = worker.gather(x=np.arange(sizes[worker.rank]))
        assert worker.broadcast(found["x"][2] if worker.rank == 0 else None).tolist() == list(range(4000))
        assert worker.sum(one=1)["one"] == 3, "all have had the same number of meetings"
        return [array.tolist() for array in found["x"]]

    result = hw.run(train, workers=3, engine="inline", deadline=30)
    assert result.values == [[list(range(size)) for size in sizes]] * 3


def meets(worker):
    """Meetings of every kind, and what they came to."""
    found = []
    for number in range(3):
        found.append(dict(worker.sum(number=number, rank=worker.rank)))
        worker.barrier()
        found.append([int(one) for one in worker.gather(rank=10 * number + worker.rank)["rank"]])
        found.append(worker.broadcast(("from", number, worker.generation)))
    return found


@pytest.mark.parametrize("done", [1, 5, 11])
def test_a_restarted_worker_gets_the_results_of_its_meetings_again(done):
    """The second incarnation of rank 1 contributes other numbers: what was gathered then counts."""

    def interrupted(worker):
        found = []
        for made, kind in zip(range(done), ["sum", "barrier", "gather", "broadcast"] * 3, strict=False):
            number = made // 4
            if kind == "sum":
                found.append(dict(worker.sum(number=number, rank=worker.rank)))
            elif kind == "barrier":
                worker.barrier()
            elif kind == "gather":
                found.append([int(one) for one in worker.gather(rank=10 * number + worker.rank)["rank"]])
            else:
                found.append(worker.broadcast(("from", number, worker.generation)))
        return found

    with hw.Cluster(workers=2, servers=2, deadline=30) as cluster:
        first, second = joined(cluster, 0), joined(cluster, 1)
        begun = threading.Event()

        def begins():
            found = interrupted(second)
            begun.set()
            return found

        def waits_and_goes_on():
            found = meets(first)
            first.leave()
            return found

        def comes_back():
            assert begun.wait(20)
            third = None
            die(second)
            while third is None:
                try:
                    third = joined(cluster, 1)
                except hw.errors.RefusedError:
                    continue  # the death is not known yet
            assert third.restarted
            found = meets(third)
            third.leave()
            return found

        whole, part, again = side_by_side(waits_and_goes_on, begins, comes_back)
    assert again == whole, "what was missed is what the others had"
    assert part == whole[: len(part)]


def test_workers_at_two_places_never_pair_and_are_named():
    def train(worker):
        with worker:
            return worker.sum(loss=1.0) if worker.rank == 0 else worker.sum(right=1.0)

    def counts(worker):
        with worker:
            for _ in worker.epochs(2):
                worker.sum(loss=1.0)
                if worker.rank == 1:
                    worker.sum(loss=1.0)

    with hw.Cluster(workers=2, patience=30, deadline=60) as cluster:
        first, second = cluster.worker(), cluster.worker()
        for error in side_by_side(lambda: train(first), lambda: train(second)):
            assert isinstance(error, StalledError)
            assert "worker 0 waits in sum of loss (meeting 1)" in str(error)
            assert "worker 1 waits in sum of right (meeting 1)" in str(error)
    with hw.Cluster(workers=2, patience=30, deadline=60) as cluster:
        first, second = cluster.worker(), cluster.worker()
        for error in side_by_side(lambda: counts(first), lambda: counts(second)):
            assert isinstance(error, StalledError)
            assert "worker 0 waits in sum of loss (meeting 2, epoch 1)" in str(error)
            assert "worker 1 waits in sum of loss (meeting 2, epoch 0)" in str(error)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_last_split_and_a_meeting_that_wait_for_each_other_fail_at_once_and_name_both(servers):
    with hw.Cluster(workers=2, servers=servers, sync="async", patience=30, deadline=60) as cluster:
        first, second = joined(cluster, 0), joined(cluster, 1)
        reading, held = second.batches(np.arange(8), 4), first.batches(np.arange(8), 4)
        next(reading)
        next(held)
        for error in side_by_side(second.barrier, lambda: next(held)):
            assert isinstance(error, StalledError)
            assert "worker 1 has samples 0–3 of epoch 0" in str(error)
            assert "worker 1 waits in barrier (meeting 1) for worker 0" in str(error)
        first.leave()
        second.leave()


def test_meetings_inside_of_a_loop_over_leased_splits_are_no_deadlock():
    def train(worker):
        for number, _ in enumerate(worker.batches(np.arange(64), 1)):
            worker.step()
            if number < 4:
                worker.barrier()
        return worker.sum(one=1)["one"]

    result = hw.run(train, workers=3, sync="async", engine="inline", deadline=30)
    assert result.values == [3.0] * 3


def test_a_program_that_makes_other_meetings_than_before_is_told_so():
    with hw.Cluster(workers=1, deadline=30) as cluster:
        worker = joined(cluster)
        worker.sum(loss=1.0)
        worker.barrier()
        die(worker)
        worker = _again(cluster)
        with pytest.raises(
            MeetingError, match=r"worker 0 .* barrier \(meeting 1\).* in sum of loss \(meeting 1\)"
        ):
            worker.barrier()
        worker.leave()


def _again(cluster, rank=0):
    """The next worker with a rank whose last one has just died."""
    while True:
        try:
            return joined(cluster, rank)
        except hw.errors.RefusedError:
            continue


def test_a_sum_of_all_waits_for_a_dead_rank_and_fails_for_one_that_has_finished(caplog):
    with hw.Cluster(workers=2, patience=0.2, deadline=30) as cluster:
        first, second = joined(cluster, 0), joined(cluster, 1)
        die(second)

        def comes_back():
            third = _again(cluster, 1)
            while "sum of x of all workers (meeting 1) waits for worker 1" not in caplog.text:
                pass
            found = third.sum(of="all", x=2)
            third.leave()
            return found

        one, other = side_by_side(lambda: first.sum(of="all", x=1), comes_back)
        assert one == other == {"x": 3.0}
        assert one.contributors == 2
        with pytest.raises(
            StalledError, match=r"of all workers \(meeting 2\) needs worker 1, which has finished"
        ):
            first.sum(of="all", x=1)
        first.leave()


def test_a_broadcast_waits_for_its_root():
    with hw.Cluster(workers=2, patience=30, deadline=30) as cluster:
        first, second = joined(cluster, 0), joined(cluster, 1)
        die(first)

        def comes_back():
            third = _again(cluster, 0)
            found = third.broadcast("from the root")
            third.leave()
            return found

        assert side_by_side(lambda: second.broadcast(None), comes_back) == ["from the root"] * 2
        second.leave()


def test_results_that_no_rank_can_ask_for_again_are_forgotten_and_the_rest_is_bounded(monkeypatch):
    with hw.Cluster(workers=1, deadline=30) as cluster:
        worker = joined(cluster)
        worker.sum(before=1)
        for epoch in worker.epochs(6):
            worker.sum(loss=epoch)
        worker.sum(after=1)
        results = _server(cluster)._results
        assert list(results) == [1, 8], "those of the loop are passed for good"
        monkeypatch.setattr(kept_programs, "RESULTS_BYTES", 1000)
        for _ in range(20):
            worker.sum(after=1)
        assert 1 < len(results) < 5
        die(worker)
        worker = _again(cluster)
        with pytest.raises(MeetingError, match=r"kept no more: loop over worker.epochs"):
            worker.sum(before=1)
        worker.leave()


def _server(cluster):
    (server,) = cluster._engine._servers
    return server.machine.shard._state.programs


# ── epochs ──────────────────────────────────────────────────────────────────────────────────────


def trains(worker, dies_at=None, epochs=4):
    """An ordinary loop; with `dies_at` it dies after so many steps. What it did since it began."""
    model, did = model_of(worker), []
    worker.sum(before=1)
    for epoch in worker.epochs(epochs):
        for batch in worker.batches(np.arange(12), 2, shuffle=True, seed=epoch):
            step(worker, model)
            did.append((epoch, batch.tolist()))
            if worker.steps == dies_at:
                die(worker)
                return did
        did.append((epoch, worker.sum(of="all", steps=worker.steps)["steps"]))
        worker.keep(
            best=max(worker.kept.get("best", 0), epoch), history=[*worker.kept.get("history", []), epoch]
        )
    did.append(dict(worker.sum(after=worker.steps)))
    worker.leave()
    return did


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("steps", [1, 5, 6, 7, 13, 24])
def test_a_restarted_program_begins_with_the_epoch_in_which_it_was(steps, mode):
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        whole = trains(joined(cluster))
    with hw.Cluster(workers=1, sync=mode, deadline=30) as cluster:
        begun = trains(joined(cluster), dies_at=steps)
        worker = _again(cluster)
        assert (worker.restarted, worker.steps) == (True, steps)
        rest = trains(worker)
        kept = _server(cluster).kept(0)
    assert begun + rest == whole
    assert worker_program._fields(kept).keys() == {"best", "history"}


def test_loops_after_and_inside_of_each_other_are_all_continued():
    def program(worker, most):
        model = model_of(worker)
        for outer in worker.epochs(2):
            for inner in worker.epochs(3):
                for batch in worker.batches(np.arange(4), 2):
                    step(worker, model)
                    yield outer, inner, batch.tolist()
            worker.barrier()
        for last in worker.epochs(2):
            for batch in worker.batches(np.arange(4), 2):
                step(worker, model)
                yield last, batch.tolist()

    def taken(worker, most):
        found, running = [], program(worker, most)
        for one in running:
            found.append(one)
            if len(found) == most:
                break
        die(worker)
        return found

    with hw.Cluster(workers=1, deadline=30) as cluster:
        whole = taken(joined(cluster), 99)
    assert len(whole) == 16
    for first in range(1, 16):
        with hw.Cluster(workers=1, deadline=30) as cluster:
            assert taken(joined(cluster), first) + taken(_again(cluster), 99) == whole


def test_a_loop_over_epochs_that_was_left_is_left_again():
    def program(worker):
        model, did = model_of(worker), []
        for epoch in worker.epochs(10):
            for _ in worker.batches(np.arange(4), 2):
                step(worker, model)
                did.append(epoch)
            if worker.sum(steps=worker.steps)["steps"] >= 6:
                break
        did.append(worker.sum(after=len(did))["after"])
        step(worker, model)
        return did

    with hw.Cluster(workers=1, deadline=30) as cluster:
        worker = joined(cluster)
        assert program(worker) == [0, 0, 1, 1, 2, 2, 6]
        die(worker)
        worker = _again(cluster)
        assert program(worker) == [6]
        assert worker.steps == 8
        worker.leave()


def test_a_program_that_comes_to_its_loop_another_way_is_told_so():
    with hw.Cluster(workers=1, deadline=30) as cluster:
        worker = joined(cluster)
        for epoch in worker.epochs(3):
            worker.sum(loss=epoch)
        die(worker)
        worker = _again(cluster)
        with pytest.raises(MeetingError):
            worker.barrier()
        with pytest.raises(UsageError, match="recorded after 0 meetings, now it begins after 1"):
            next(worker.epochs(3))
        with pytest.raises(ConfigurationError, match="must be an integer ≥ 0"):
            worker.epochs(1.5)
        worker.leave()


# ── what is kept ────────────────────────────────────────────────────────────────────────────────


def test_what_was_kept_is_that_of_the_last_recorded_step():
    with hw.Cluster(workers=1, servers=2, deadline=30) as cluster:
        worker = joined(cluster)
        model = model_of(worker)
        assert (worker.kept, worker.restarted, worker.steps) == ({}, False, 0)
        worker.keep(epoch=1, weights=np.arange(3.0))
        step(worker, model)
        worker.keep(epoch=2, best=0.5)
        assert worker.kept["epoch"] == 2
        die(worker)
        worker = _again(cluster)
        assert (worker.kept["epoch"], worker.kept["weights"].tolist()) == (1, [0, 1, 2])
        assert "best" not in worker.kept
        assert (worker.restarted, worker.steps) == (True, 1)
        worker.leave()


@pytest.mark.parametrize("recorded_by", ["end", "meeting", "leave"])
def test_what_is_kept_travels_with_whatever_the_log_records_next(recorded_by):
    with hw.Cluster(workers=1, deadline=30) as cluster:
        worker = joined(cluster)
        model_of(worker)
        worker.keep(last=recorded_by)
        if recorded_by == "end":
            list(worker.batches(np.arange(4), 2))
        elif recorded_by == "meeting":
            worker.barrier()
        if recorded_by == "leave":
            worker.leave()
        else:
            die(worker)
        worker = _again(cluster)
        assert worker.kept == {"last": recorded_by}
        worker.leave()


def test_what_is_kept_is_resumed_and_so_are_steps_meetings_and_epochs(tmp_path):
    def train(worker):
        model, did = model_of(worker), []
        did.append((worker.restarted, worker.steps, worker.kept))
        for epoch in worker.epochs(worker.settings["epochs"]):
            for _ in worker.batches(np.arange(8), 2, seed=epoch):
                step(worker, model)
            did.append((epoch, dict(worker.sum(rank=worker.rank, epoch=epoch))))
            worker.keep(done=epoch + 1, at=np.full(2, worker.steps))
        return did

    options = {"workers": 2, "servers": 2, "engine": "inline", "checkpoint": tmp_path, "deadline": 30}
    hw.run(train, settings={"epochs": 2}, **options)
    resumed = hw.run(train, settings={"epochs": 3}, resume=True, **{**options, "servers": 3})
    for did in resumed.values:
        restarted, steps, kept = did[0]
        assert (restarted, steps, kept["done"], kept["at"].tolist()) == (True, 4, 2, [4, 4])
        assert did[1:] == [(2, {"rank": 1.0, "epoch": 4.0})]
    assert hw.load_checkpoint(resumed.checkpoint)["m"]["w"].tolist() == [12.0]


def test_what_cannot_be_kept_is_named_and_nothing_changes():
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        worker.keep(good=1)
        with pytest.raises(UsageError, match=r"state\['rule'\]\[1\] is a function: expected plain data"):
            worker.keep(good=2, state={"rule": (1, die)})
        with pytest.raises(UsageError, match=r"at most 4,194,304 are kept \(large 5,"):
            worker.keep(good=2, large=np.zeros(5 << 20, np.uint8))
        assert worker.kept == {"good": 1}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**63),
        2**200,
        1.5,
        float("inf"),
        "text",
        b"bytes",
        [1, (2, [3, ("x",)])],
        {"a": {1: "one", (2, 3): None}, "b": []},
        np.float32(2.5),
        np.int64(-3),
        np.bool_(True),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.zeros((0, 3)),
        np.array(["a", "bc"]),
        np.random.default_rng(3).bit_generator.state,
    ],
    ids=str,
)
def test_plain_data_and_arrays_come_back_as_what_they_were(value):
    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert all(same(one[key], other[key]) for key in one)
        elif isinstance(one, list | tuple):
            assert len(one) == len(other)
            assert all(same(a, b) for a, b in zip(one, other, strict=True))
        elif isinstance(one, np.ndarray):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        else:
            assert one == other
        return True

    assert same(plain.decode(plain.encode(value, "value")), value)


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    for tensor in (
        torch.arange(3),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor(1.5),
    ):
        found = plain.decode(plain.encode({"x": tensor}, "value"))["x"]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    state = torch.get_rng_state()
    assert torch.equal(plain.decode(plain.encode(state, "rng")), state)


def test_what_is_kept_travels_once():
    program = worker_program.Program(m.Recalled(None, 0, 0, False))
    assert program.unsent() is None
    program.keep({"loss": 1.0})
    sent = program.unsent()
    program.keep({"best": 2.0})
    program.recorded(sent)
    assert plain.decode(program.unsent()) == {"loss": 1.0, "best": 2.0}, (
        "this is newer than what was recorded"
    )
    program.recorded(program.unsent())
    assert program.unsent() is None
    assert program.kept == {"loss": 1.0, "best": 2.0}
