"""KVStore: what MXNet's own tests assert, as closed forms, for any number of workers and servers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import B, S, equal, in_all, scripted
from waiting import wait_until

import headwater as hw
from headwater.errors import ConfigurationError, GradientError, UsageError
from headwater.runtime.inquiry import ask

# ── A: dist_sync_kvstore.py ─────────────────────────────────────────────────────────────────────


@scripted
def test_pushes_are_summed_over_workers_and_added_by_the_server(kv):
    """A1: w = 1 + rate · n(n + 1)/2 · (i + 1) with w += rate · g."""
    n, rate = kv.num_workers, 2
    kv.set_optimizer(hw.SGD(lr=1.0))
    for key, shape in ((3, S), (99, B)):
        kv.init(key, np.ones(shape, np.float32))
        for i in range(3):
            kv.push(key, -rate * np.full(shape, kv.rank + 1, np.float32))
            assert equal(kv.pull(key), 1 + rate * n * (n + 1) // 2 * (i + 1))


@scripted
def test_halves_are_exact_where_their_values_are(kv):
    """A2."""
    n = kv.num_workers
    kv.set_optimizer(hw.SGD(lr=1.0))
    kv.init([4, 100], [np.ones(S, np.float16), np.ones((100, 30), np.float16)])
    for i in range(2):
        kv.push([4, 100], [np.full(s, -2 * (kv.rank + 1), np.float16) for s in (S, (100, 30))])
        for value in kv.pull([4, 100]):
            assert value.dtype == np.float16
            assert equal(value, 1 + n * (n + 1) * (i + 1))


@scripted
def test_rows_are_pushed_and_pulled_alone(kv):
    """A3, A4, A5: a row that r pushes to gets rate · Σ (r + 1); an empty push changes nothing."""
    n, rate = kv.num_workers, 2
    kv.set_optimizer(hw.SGD(lr=1.0))
    kv.init(9, np.ones(S, np.float32))
    for i in range(3):
        kv.row_sparse_push(9, [kv.rank % 2], np.full((1, 3), -rate * (kv.rank + 1), np.float32))
        wanted = np.random.default_rng(kv.rank).integers(0, 2, (1, 2))
        rows = kv.row_sparse_pull(9, wanted)
        assert rows.shape == (1, 2, 3)
        for row, q in zip(rows[0], wanted[0], strict=True):
            assert equal(row, 1 + rate * (i + 1) * sum(r + 1 for r in range(n) if r % 2 == q))
    before = kv.pull(9)
    kv.row_sparse_push(9, np.empty(0, np.int64), np.empty((0, 3), np.float32))
    assert np.array_equal(kv.row_sparse_pull(9, [0, 1]), before)
    assert kv.row_sparse_pull(9, []).shape == (0, 3)


@scripted
def test_rows_of_repeated_ids_are_summed(kv):
    kv.set_optimizer(hw.SGD(lr=1.0))
    kv.init("rows", np.zeros((4, 2), np.float32))
    kv.row_sparse_push("rows", [[1, 1], [3, 1]], -np.ones((2, 2, 2), np.float32))
    assert kv.pull("rows").tolist() == [[x * kv.num_workers] * 2 for x in (0, 3, 0, 1)]


@scripted
def test_one_bit_pushes(kv):
    """A6, A7, A8: init is not compressed; ones add rate · n, minus ones take it away again."""
    n, rate = kv.num_workers, 2
    kv.set_optimizer(hw.SGD(lr=rate))
    kv.set_gradient_compression({"type": "1bit", "threshold": 0})
    kv.init([1000, 1001], [np.zeros(S, np.float32), np.ones(S, np.float32)])
    assert equal(kv.pull(1000), 0)
    assert equal(kv.pull(1001), 1)
    kv.push(1000, -np.ones(S, np.float32))
    assert equal(kv.pull(1000), rate * n)
    kv.push(1000, np.ones(S, np.float32))
    assert equal(kv.pull(1000), 0)


@scripted
def test_two_bit_pushes_send_what_was_kept_once_it_is_enough(kv):
    """A11 to A14: below the threshold nothing arrives, then what was kept; every push is rate · n · t."""
    n, rate, t = kv.num_workers, 2, 0.5
    kv.set_optimizer(hw.SGD(lr=rate))
    kv.set_gradient_compression({"type": "2bit", "threshold": t})
    kv.init(1000, np.zeros(B, np.float32))
    seen = []
    for push in (0, t - 0.1, 0.2, t, -t, -0.4, -0.3):
        kv.push(1000, np.full(B, -push, np.float32))
        value = kv.pull(1000)
        assert equal(value, value.flat[0])
        seen.append(float(value.flat[0]) / (rate * n * t))
    assert seen == [0, 0, 1, 2, 2, 1, 0]


@scripted
def test_random_compressed_pushes_are_those_of_a_plain_two_bit_code(kv):
    """A15, with both signs."""
    n, rate, t = kv.num_workers, 2, np.float32(0.5)
    kv.set_optimizer(hw.SGD(lr=rate))
    kv.set_gradient_compression({"type": "2bit"})
    kv.init(1002, np.zeros(S, np.float32))
    chance, residual, before = np.random.default_rng(123), np.zeros(S, np.float32), np.zeros(S)
    for _ in range(7):
        gradient = chance.uniform(-1, 1, S).astype(np.float32)
        kv.push(1002, gradient)
        after = kv.pull(1002)
        residual = residual + gradient
        sent = np.where(residual >= t, t, np.where(residual <= -t, -t, np.float32(0)))
        residual = residual - sent
        assert after - before == pytest.approx(-n * rate * sent, abs=1e-5)
        before = after


@scripted
def test_many_keys_are_initialised_one_by_one(kv):
    """A16, C2, D2."""
    for i in range(10):
        kv.init(200 + i, np.full(S, i, np.float32 if i % 2 else np.float16))
        assert equal(kv.pull(200 + i), i)
        assert equal(kv.broadcast(300 + i, np.full(S, i, np.float32)), i)


# ── without an optimizer ────────────────────────────────────────────────────────────────────────


@scripted
def test_without_an_optimizer_the_sum_takes_the_place_of_the_value(kv):
    """D1, E3 to E6: of two devices' ones · (r + 1), at every repeat."""
    n = kv.num_workers
    kv.broadcast("a", np.zeros(S, np.float32))
    for _ in range(3):
        ones = [np.full(S, kv.rank + 1, np.float32) for _ in range(2)]
        kv.pushpull("a", ones, out=ones)
        assert all(equal(one, n * (n + 1)) for one in ones)
    kv.push(["a"], [[np.full(S, 2.0, np.float32)] * 4])
    assert equal(kv.pull(["a"])[0], 8 * n)


@scripted
def test_a_push_that_was_not_pulled_leaves_before_the_next(kv):
    n = kv.num_workers
    kv.set_optimizer(hw.SGD(lr=1.0))
    kv.init(1, np.zeros(S, np.float32))
    for _ in range(4):
        kv.push(1, -np.ones(S, np.float32))
    assert equal(kv.pull(1), 4 * n)


# ── optimizers ──────────────────────────────────────────────────────────────────────────────────


@scripted
def test_an_optimizer_may_be_set_after_keys_were_used(kv):
    n = kv.num_workers
    kv.init("w", np.full(S, 5, np.float32))
    assert equal(kv.pull("w"), 5)
    kv.push("w", np.ones(S, np.float32))
    kv.set_optimizer("sgd", lr=0.5)
    kv.push("w", np.ones(S, np.float32))
    assert equal(kv.pull("w"), n - 0.5 * n)


def test_optimizers_of_torch_and_names_become_rules():
    def body(kv):
        parameter = [torch.nn.Parameter(torch.zeros(1))]
        kv.set_optimizer(torch.optim.SGD(parameter, lr=0.25, momentum=0.5))
        kv.init(0, np.zeros(1, np.float32))
        seen = []
        for _ in range(3):
            kv.push(0, np.ones(1, np.float32))
            seen.append(float(kv.pull(0)[0]))
        for wrong in ("adamax", object(), torch.optim.Adamax(parameter)):
            with pytest.raises(ConfigurationError):
                kv.set_optimizer(wrong)
        with pytest.raises(ConfigurationError, match="SGD has no setting 'rate'"):
            kv.set_optimizer("sgd", rate=1)
        return seen

    (seen,) = in_all(body)
    assert seen == [-0.25, -0.625, -1.0625]


def test_states_of_the_optimizer_are_saved_and_loaded(tmp_path):
    def body(kv):
        with pytest.raises(UsageError, match="no optimizer was set"):
            kv.save_optimizer_states("nowhere")
        kv.set_optimizer(hw.SGD(lr=1.0, momentum=0.5))
        kv.init([1, 2], [np.zeros(3, np.float32)] * 2)
        push = lambda: kv.push([1, 2], [np.ones(3, np.float32)] * 2)  # noqa: E731
        push()
        kv.pull([1, 2])
        kv.save_optimizer_states(str(tmp_path / "states"), dump_optimizer=True)
        push()
        value = kv.pull(1)
        push()
        expected = float((kv.pull(1) - value)[0])
        kv.load_optimizer_states(str(tmp_path / "states"))
        before = kv.pull(1)
        push()
        return expected, float((kv.pull(1) - before)[0])

    ((third, again),) = in_all(body)
    assert third == -1.75, "the third update of a momentum of ½"
    assert again == -1.5, "the second one, from the states that were saved after the first"


# ── asynchronous ────────────────────────────────────────────────────────────────────────────────


def test_asynchronous_pushes_are_all_counted_once():
    """w = 1 + rate · Σ of everything pushed, after a barrier."""

    def body(kv):
        kv.set_optimizer(hw.SGD(lr=2.0))
        kv.init(7, np.ones(B, np.float32))
        for i in range(5):
            kv.push(7, np.full(B, -(kv.rank + 1) * (i + 1), np.float32))
            kv.pull(7)
        kv.barrier()
        return kv.pull(7)

    for value in in_all(body, workers=3, servers=2, sync="async"):
        assert equal(value, 1 + 2 * (1 + 2 + 3) * (1 + 2 + 3 + 4 + 5))


# ── many keys as one step ───────────────────────────────────────────────────────────────────────


def test_a_batch_makes_many_keys_one_step():
    def body(worker):
        kv = hw.kvstore.create(worker)
        kv.set_optimizer(hw.SGD(lr=1.0))
        kv.init([1, 2, 3], [np.zeros(S, np.float32)] * 3)
        kv.pull([1, 2, 3])
        before = worker.version
        outs = [np.empty(S, np.float32) for _ in range(3)]
        with kv.batch():
            kv.push([1, 2, 3], [-np.full(S, i, np.float32) for i in (1, 2, 3)])
            kv.pull([1, 2, 3], out=outs)
        with pytest.raises(UsageError, match="pass out="), kv.batch():
            kv.pull(1)
        with pytest.raises(UsageError, match="inside of batch"), kv.batch(), kv.batch():
            pass
        return worker.version - before, [float(out[0, 0]) for out in outs]

    for value in hw.run(body, workers=2, servers=2, engine="inline").values:
        assert value == (1, [2, 4, 6])


# ── what it is, and what it refuses ─────────────────────────────────────────────────────────────


def test_a_store_says_what_it_is():
    def body(kv):
        kv.barrier()
        assert kv.is_capable("Optimizer")
        with pytest.raises(ConfigurationError, match="'optimizer'"):
            kv.is_capable("teleport")
        return kv.type, kv.rank, kv.num_workers, kv.num_dead_node()

    assert in_all(body, workers=2) == [("dist_sync", 0, 2, 0), ("dist_sync", 1, 2, 0)]


def test_a_worker_that_has_finished_is_not_dead():
    def body(kv):
        if kv.rank == 1:
            return 0
        wait_until(lambda: 1 in ask(kv._worker.address, kv._worker.security).finished)
        return kv.num_dead_node()

    assert in_all(body, workers=2) == [0, 0]


def test_bad_calls_are_refused_by_name_and_change_nothing():
    """E11 and MXNet's other refusals."""

    def body(worker):
        with pytest.raises(ConfigurationError, match="pass one of dist_sync"):
            hw.kvstore.create(worker, "local")
        with pytest.raises(ConfigurationError, match="needs a cluster with sync='async'"):
            hw.kvstore.create(worker, "dist_async")
        kv = hw.kvstore.create(worker)
        kv.init(3, np.zeros(S, np.float32))
        ones = np.ones(S, np.float32)
        for call, error, what in (
            (lambda: kv.push(4, ones), UsageError, "key 4 was not initialised: call init first"),
            (lambda: kv.pull(4), UsageError, "initialised are 3"),
            (lambda: kv.init(3, ones), UsageError, "key 3 has been initialised"),
            (lambda: kv.init("a", ones), UsageError, "'a' is of another type than 3"),
            (lambda: kv.push("3", ones), UsageError, "another type"),
            (lambda: kv.pull("3"), UsageError, "another type"),
            (lambda: kv.row_sparse_pull("3", [0]), UsageError, "another type"),
            (lambda: kv.push(True, ones), UsageError, "integers or texts"),
            (lambda: kv.push(3, ones[:1]), GradientError, r"has shape \(2, 3\), got \(1, 3\)"),
            (lambda: kv.push(3, ones.astype(int)), GradientError, "expected floating point"),
            (lambda: kv.push([3, 3], [ones]), UsageError, "2 keys and 1"),
            (lambda: kv.push(3, ones * np.nan), hw.errors.NonFiniteError, "comes to NaN or infinity"),
            (lambda: kv.row_sparse_push(3, [2], ones[:1]), GradientError, "rows 0 to 1, got ids from 2 to 2"),
            (lambda: kv.row_sparse_push(3, [-1], ones[:1]), GradientError, "from -1 to -1"),
            (lambda: kv.row_sparse_push(3, [0.5], ones[:1]), GradientError, "must be integers"),
            (lambda: kv.row_sparse_push(3, [0, 1], ones[:1]), GradientError, r"expected \(2, 3\)"),
            (lambda: kv.push([3, 4], [ones, ones]), UsageError, "key 4 was not initialised"),
            (lambda: kv.init([5, 3], [ones, ones]), UsageError, "key 3 has been initialised"),
            (lambda: kv.init([5, 5], [ones, ones]), UsageError, "key 5 has been initialised"),
            (lambda: kv.push(3, []), GradientError, r"got \(0,\)"),
            (lambda: kv.push(3, [[1.0], [2.0, 3.0]]), GradientError, "key 3"),
            (lambda: kv.push(3, None), GradientError, "key 3"),
            (lambda: kv.pull(None), UsageError, "integers or texts, got None"),
            (lambda: kv.pull({3: 1}), UsageError, "integers or texts"),
            (lambda: kv.pull(3, out=np.zeros((4, 2, 3))), GradientError, r"got out= of shape \(4, 2, 3\)"),
            (lambda: kv.pull(3, out=7), GradientError, "got out= a int"),
            (lambda: kv.row_sparse_pull(3, [0], out=ones), GradientError, r"got out= of shape \(2, 3\)"),
            (lambda: kv.row_sparse_pull(3, [[0], [1, 2]]), GradientError, "row ids of key 3"),
            (lambda: kv.row_sparse_push(3, [0], [[np.inf] * 3]), hw.errors.NonFiniteError, "key 3"),
            (lambda: kv.set_gradient_compression({"type": "4bit"}), ConfigurationError, "'2bit' or '1bit'"),
            (
                lambda: kv.set_gradient_compression({"type": "2bit", "threshold": 0}),
                ConfigurationError,
                "> 0",
            ),
        ):
            with pytest.raises(error, match=what):
                call()
        kv.set_gradient_compression({"type": "2bit"})
        with pytest.raises(hw.errors.NonFiniteError, match="comes to NaN"):
            kv.push(3, ones * np.nan)  # and what compression keeps stays a number
        with pytest.raises(ConfigurationError, match="cannot be changed"):
            kv.set_gradient_compression({"type": "1bit"})
        with pytest.raises(UsageError, match="does not go with gradient compression"):
            kv.pushpull(3, ones)
        with pytest.raises(UsageError, match="does not go with row_sparse_push"):
            kv.row_sparse_push(3, [0], ones[:1])
        kv.push(np.int64(3), ones)
        return kv.pull(3)

    (value,) = hw.run(body, workers=1, engine="inline").values
    assert equal(value, 0.5)


def test_the_programs_of_the_page_for_newcomers_run():
    page = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
    names = {"__name__": "page"}
    results = []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block.replace("hw.run(train,", 'hw.run(train, engine="inline",'), "page", "exec"), names)
        results.append(names["result"].values)
    for value in results[0]:
        assert value == pytest.approx(np.full((2, 3), 1 - 10 * 0.1 * 3), rel=1e-5)
    assert max(results[1]) < 1
