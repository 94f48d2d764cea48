"""Passes over rows against plain NumPy: the rule of a row, sums of repeats, stamps, and where rows lie."""

import ctypes
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plain_kernels as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater.errors import EnvironmentFailure
from headwater.kernels.rows import ages, combine, fill, gather, oldest, row_rule, spread, stamp
from headwater.kernels.slabs import Slabs
from headwater.spec.rules import SGD, Accumulate, Adagrad, Adam, Ftrl, Lion, RowwiseAdagrad, Yogi

RULES = [
    Accumulate(),
    SGD(0.1, momentum=0.9, nesterov=True),
    Adagrad(0.1),
    Adam(),
    Ftrl(lr=0.1, l1=0.5),
    Yogi(),
    Lion(0.1),
]


@dataclass
class Plain:
    """A few rows spread over several chunks, and their copy in arrays."""

    slabs: Slabs
    rows: np.ndarray
    values: np.ndarray
    states: list[np.ndarray]

    @classmethod
    def make(cls, dim, widths, count, seed):
        slabs = Slabs([4 * dim, *(4 * width for width in widths)])
        stride = (1 << slabs.shift) // 3 + 1
        slabs.reserve(count * stride)
        rows = (np.random.default_rng(seed).permutation(count) * stride).astype(np.int32)
        generator = np.random.default_rng(seed)
        parts = [generator.random((count, width), dtype=np.float32) for width in (dim, *widths)]
        for slab, part in enumerate(parts):
            for place, row in zip(slabs.place(slab, rows), part, strict=True):
                np.ctypeslib.as_array((ctypes.c_float * len(row)).from_address(int(place)))[:] = row
        return cls(slabs, rows, parts[0], parts[1:])

    def read(self, slab, width):
        out = np.empty((len(self.rows), width), dtype=np.float32)
        shifted = Slabs([self.slabs.row_bytes[slab]])
        shifted.shift, shifted.addresses = self.slabs.shift, self.slabs.addresses[slab : slab + 1].copy()
        gather(self.rows, shifted, width, out)
        return out


def beside(gradients):
    """`sources` and `bounds` of gradients that lie one after the other."""
    return np.array([gradients.ctypes.data]), np.empty(0, dtype=np.int64)


@examples(40)
@given(
    st.sampled_from(RULES), st.sampled_from([1, 3, 8, 16, 21, 64]), st.integers(0, 9), st.sampled_from([1, 3])
)
def test_the_rule_of_a_row_gives_the_bits_of_the_plain_one(rule, dim, seed, divisor):
    count = 20
    plain = Plain.make(dim, [dim] * len(rule.states()), count, seed)
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(count, dim)).astype(np.float32)
    counts = generator.integers(1, 5, count)
    lines = np.array([rule.scalars(0, c) for c in range(1, 5)], dtype=np.float32).reshape(4, -1)
    rows = plain.rows.copy()
    skipped = int(generator.integers(0, count))
    rows[skipped] = -1
    places = *beside(gradients), float(divisor), plain.slabs.addresses, plain.slabs.shift, dim
    row_rule(rule)(rows, *places, lines, (counts - 1).astype(np.int32))
    for i in set(range(count)) - {skipped}:
        states, scalars = [state[i] for state in plain.states], rule.scalars(0, int(counts[i]))
        reference.update(rule, [gradients[i]], divisor, plain.values[i], states, scalars, [])
    got = [plain.read(k, dim) for k in range(1 + len(plain.states))]
    assert all(
        (ours == theirs).all() for ours, theirs in zip(got, [plain.values, *plain.states], strict=True)
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 16, 64])
def test_rowwise_adagrad_keeps_the_mean_of_squares_of_a_row(dim):
    rule, count = RowwiseAdagrad(lr=0.1, eps=1e-6), 12
    plain = Plain.make(dim, [1], count, dim)
    gradients = np.random.default_rng(dim).normal(size=(count, dim)).astype(np.float32)
    lines = np.array([rule.scalars(0, 1)], dtype=np.float32)
    places = *beside(gradients), 2.0, plain.slabs.addresses, plain.slabs.shift, dim
    row_rule(rule)(plain.rows, *places, lines, np.empty(0, dtype=np.int32))
    halved = gradients.astype(np.float64) / 2
    sums = plain.states[0].astype(np.float64) + (halved**2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(plain.read(1, 1), sums, rtol=1e-6)
    expected = plain.values - 0.1 * halved / (np.sqrt(sums) + 1e-6)
    np.testing.assert_allclose(plain.read(0, dim), expected, rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_of_equal_elements_is_adagrad():
    rowwise, each = RowwiseAdagrad(lr=0.25), Adagrad(lr=0.25)
    value, gradient = np.float32(1), np.float32(3)
    expected = each.function()(value, gradient, np.float32(0), *map(np.float32, each.scalars(0, 1)))[0]
    squares = gradient * gradient
    assert rowwise.function()(value, gradient, squares, *map(np.float32, rowwise.scalars(0, 1))) == expected
    assert math.isclose(expected, 0.75, rel_tol=1e-6)


@examples(50)
@given(
    st.lists(st.integers(0, 9), max_size=60),
    st.integers(0, 60),
    st.sampled_from([1, 5, 16, 20, 32, 37]),
)
def test_gradients_are_combined_in_order(inverse, cut, dim):
    gradients = np.random.default_rng(7).normal(size=(len(inverse), dim)).astype(np.float32)
    gradients[:3] = -0.0
    gradients[3:4], gradients[4:5] = 0.0, np.nan
    sums = np.full((10, dim), 7, dtype=np.float32)
    places = np.array(inverse, dtype=np.int64)
    combine([(places[:cut], gradients[:cut]), (places[cut:], gradients[cut:])], sums)
    for place in set(inverse):
        first, *others = (gradient for i, gradient in zip(inverse, gradients, strict=True) if i == place)
        assert sum(others, first).tobytes() == sums[place].tobytes()


@examples(50)
@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([1, 5, 16, 20, 48]))
def test_rows_are_spread_to_each_id_that_was_given(inverse, dim):
    rows = np.random.default_rng(7).normal(size=(10, dim)).astype(np.float32)
    out = np.empty((len(inverse), dim), dtype=np.float32)
    spread(np.array(inverse, dtype=np.int64), rows, out)
    assert (out == rows[inverse]).all()


def test_fill_sets_whole_rows_at_their_places():
    plain = Plain.make(5, [], 4, 1)
    fill(plain.slabs.place(0, plain.rows[[1, 3]]), 5, 2.5)
    plain.values[[1, 3]] = 2.5
    assert (plain.read(0, 5) == plain.values).all()


def test_a_row_of_minus_one_is_left_alone_when_gathered():
    plain = Plain.make(4, [], 5, 0)
    out = np.full((5, 4), 9, dtype=np.float32)
    rows = plain.rows.copy()
    rows[[0, 3]] = -1
    gather(rows, plain.slabs, 4, out)
    assert (out[[0, 3]] == 9).all()
    assert (out[[1, 2, 4]] == plain.values[[1, 2, 4]]).all()


def test_ages_are_exact_past_the_turn_of_the_32nd_bit():
    slabs = Slabs([64, 4])
    slabs.reserve(10)
    rows = np.arange(10, dtype=np.int32)
    now = 2**32 - 3
    stamp(rows, slabs, 1, now)
    assert (ages(rows, slabs, 1, now + 10) == 10).all()
    assert ages(np.array([-1], dtype=np.int32), slabs, 1, now + 10).tolist() == [0]


def test_rows_never_move_and_never_overlap():
    slabs = Slabs([4 * 7, 4])
    slabs.reserve(1)
    rows = np.array([0, 5, (1 << slabs.shift) - 1], dtype=np.int32)
    before = [slabs.place(k, rows).tolist() for k in range(2)]
    slabs.reserve(5 << slabs.shift)
    assert [slabs.place(k, rows).tolist() for k in range(2)] == before
    edges = np.array([(c << slabs.shift) + d for c in range(5) for d in (0, 1, -1 % (1 << slabs.shift))])
    places = np.sort(slabs.place(0, edges.astype(np.int32)))
    assert np.diff(places).min() >= 28
    assert (slabs.addresses % 64 == 0).all()


def test_memory_that_the_system_does_not_have_is_an_error_that_says_so():
    slabs = Slabs([1 << 62])
    with pytest.raises(EnvironmentFailure, match="no more memory for a table's rows"):
        slabs.reserve(1)
    assert slabs.addresses.shape == (1, 0)


def test_memory_is_given_before_it_is_written_and_what_is_there_stays():
    plain = Plain.make(16, [16], 30, 0)
    plain.slabs.populate(0, 3 << plain.slabs.shift)
    assert (plain.read(0, 16) == plain.values).all()
    assert (plain.read(1, 16) == plain.states[0]).all()
    slabs = Slabs([64, 4])
    slabs.reserve(2 << slabs.shift)
    before = resident()
    slabs.populate(1000, 1 << slabs.shift)
    slabs.populate(1 << slabs.shift, 10 << slabs.shift)  # there is no room for most of that
    if can_populate():
        assert resident() - before > 0.9 * 68 * (2 << slabs.shift)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def can_populate():
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except OSError:
        return False
    return True


@examples(60)
@given(
    st.lists(
        st.dictionaries(
            st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3),
            st.integers(0, 4) | st.integers(0, 2**32 - 1),
            max_size=12,
        ),
        max_size=4,
    ),
    st.integers(0, 8),
)
def test_the_oldest_of_each_run_are_found_and_of_one_age_the_smallest_ids(runs, kept):
    ids = np.array([id for run in runs for id in run], np.int64)
    how_old = np.array([age for run in runs for age in run.values()], np.uint32)
    bounds = np.cumsum([0, *(len(run) for run in runs)])
    expected = []
    for run in runs:
        in_order = sorted(run, key=lambda id: (-run[id], id))
        expected += in_order[: max(0, len(run) - kept)]
    found = oldest(ids, how_old, bounds, kept).tolist()
    assert len(found) == sum(max(0, len(run) - kept) for run in runs)
    assert sorted(found) == sorted(expected)
