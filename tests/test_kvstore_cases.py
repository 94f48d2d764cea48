"""KVStore: cases of MXNet's tests beside those of test_kvstore.py, as closed forms.

Rules of Headwater subtract: a push of g with rate r adds -r · g, so values below have the other sign.
"""

import numpy as np
import pytest
from stores import COUNTS, S, equal, in_all, scripted

import headwater as hw

RATE = 2
U = (3, 5)
"""Shape of keys whose pushes are random."""


@scripted
def test_one_bit_codes_of_random_pushes_are_those_of_a_plain_one(kv):
    """A10: each push adds rate · n · decode(g), what is lost is kept for the next."""
    kv.set_optimizer(hw.SGD(lr=RATE))
    kv.set_gradient_compression({"type": "1bit", "threshold": 0})
    kv.init(1002, np.zeros(U, np.float32))
    chance, residual, before = np.random.default_rng(123), np.zeros(U, np.float32), np.zeros(U)
    for _ in range(7):
        gradient = chance.uniform(-1, 1, U).astype(np.float32)
        kv.push(1002, gradient)
        after = kv.pull(1002)
        residual = residual + gradient
        sent = np.where(residual > 0, np.float32(1), np.float32(-1))
        residual = residual - sent
        assert np.array_equal(after - before, -kv.num_workers * RATE * sent)
        before = after


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize(("workers", "servers"), COUNTS)
def test_one_bit_ones_go_up_and_down_at_any_threshold(threshold, workers, servers):
    """F4: ±rate · n a push."""

    def body(kv):
        kv.set_optimizer(hw.SGD(lr=RATE))
        kv.set_gradient_compression({"type": "1bit", "threshold": threshold})
        kv.init(9, np.zeros(S, np.float32))
        for number, push in enumerate([1, 1, 1, -1, -1, -1], 1):
            kv.push(9, np.full(S, push, np.float32))
            assert equal(kv.pull(9), -RATE * workers * (number if push > 0 else 6 - number))

    in_all(body, workers, servers)


@scripted
def test_one_bit_codes_keep_what_they_lose(kv):
    """F5: pushes of 2, 0, -2 add 1, 1, -1 each."""
    kv.set_optimizer(hw.SGD(lr=RATE))
    kv.set_gradient_compression({"type": "1bit", "threshold": 0})
    kv.init("w", np.zeros(S, np.float32))
    for push, wanted in ((2, 1), (0, 2), (-2, 1)):
        kv.push("w", np.full(S, push, np.float32))
        assert equal(kv.pull("w"), -RATE * kv.num_workers * wanted)


@scripted
def test_two_bit_codes_keep_what_they_lose_in_float32(kv):
    """F7, F8: 0.4, 0.2, 0.2, 0.2 send 0, t, 0, t and leave exactly nothing: each push of -t then sends -t.

    A residual in float64 is 1e-16 above nothing and fails.
    """
    t = 0.5
    kv.set_optimizer(hw.SGD(lr=RATE))
    kv.set_gradient_compression({"type": "2bit", "threshold": t})
    kv.init(7, np.zeros(S, np.float32))
    for push, wanted in ((0.4, 0), (t - 0.3, 1), (0.2, 1), (t - 0.3, 2), *((-t, 1 - i) for i in range(10))):
        kv.push(7, np.full(S, push, np.float32))
        assert equal(kv.pull(7), -RATE * kv.num_workers * t * wanted)


@scripted
def test_values_of_several_devices_are_summed_before_they_leave(kv):
    """C1: rate · g · n(n + 1)/2 · (i + 1) for g devices, by push and pull and by pushpull."""
    n, devices = kv.num_workers, 2
    kv.set_optimizer(hw.SGD(lr=1.0))
    kv.init(["9", "10"], [np.ones(S, np.float32)] * 2)
    ones = [np.full(S, -RATE * (kv.rank + 1), np.float32) for _ in range(devices)]
    for i in range(3):
        wanted = 1 + RATE * devices * n * (n + 1) // 2 * (i + 1)
        kv.push("9", ones)
        assert equal(kv.pull("9"), wanted)
        assert equal(kv.pushpull("10", [one.copy() for one in ones]), wanted)  # in place without `out`


@scripted
def test_random_values_of_keys_alone_and_in_lists_add_up(kv):
    """F1, F2: w = Σ lr · Σ of all devices' values, to 1e-6."""
    n, lr = kv.num_workers, 0.1
    kv.set_optimizer(hw.SGD(lr=lr))
    keys = [3, 5, 7]
    kv.init(keys, [np.zeros(U, np.float32)] * 3)
    chance, expected = np.random.default_rng(5), np.zeros((3, *U))
    for i in range(4):
        values = chance.standard_normal((n, 3, 2, *U)).astype(np.float32)
        expected -= lr * values.astype(np.float64).sum(axis=(0, 2))
        own = [list(of_key) for of_key in values[kv.rank]]
        if i % 2:
            kv.push(keys, own)
            found = kv.pull(keys)
        else:
            for key, several in zip(keys, own, strict=True):
                kv.push(key, several)
            found = [kv.pull(key) for key in keys]
        assert np.abs(found - expected).sum() / np.abs(expected).sum() < 1e-6


@scripted
def test_keys_of_both_kinds_and_those_that_nobody_pushes(kv):
    """E1, E2, E4: without an optimizer the sum of all pushes; rows by repeated ids; the other key stays."""
    n = kv.num_workers
    ints, texts = {"one": 3, "other": 5}, {"one": "a", "other": "b"}
    names = ints if n % 2 else texts
    kv.init(list(names.values()), [np.zeros((4, 4), np.float32)] * 2)
    kv.push(names["one"], [np.ones((4, 4), np.float32)] * 4)
    assert equal(kv.pull(names["one"]), 4 * n)
    assert equal(kv.pull(names["other"]), 0)
    ids = np.random.default_rng(kv.rank).integers(0, 4, (2, 2))
    rows = kv.row_sparse_pull(names["one"], ids)
    assert rows.shape == (2, 2, 4)
    assert equal(rows, 4 * n)
