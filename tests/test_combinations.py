"""Combinations of vectors and sums over them, against plain NumPy: to the bit, however a range is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater.kernels.combinations import DOT, LARGEST, TOTAL, BlockSum, Combination, combine
from headwater.spec.layout import LINE, PAGE

VECTORS = 4


def plain(arrays, combinations, sums):
    """The same with arrays for everything, block by block; scratch blocks are arrays of their own."""
    scratch = {}

    def of(place):
        return scratch[place] if isinstance(place, int) else place

    for one in combinations:
        total = np.zeros(len(arrays[0]))
        for source, coefficient in zip(one.sources, one.coefficients, strict=True):
            total = total + of(source).astype(np.float64) * coefficient
        if isinstance(one.out, int):
            scratch[one.out] = total.astype(np.float32)
        else:
            one.out[:] = total.astype(np.float32)
    found = []
    for one in sums:
        a, b = of(one.one).astype(np.float64), of(one.other).astype(np.float64)
        lines = {DOT: a * b, TOTAL: np.abs(a), LARGEST: np.abs(a)}[one.kind].reshape(-1, PAGE // LINE, LINE)
        lanes = np.zeros((len(lines), LINE))
        join = np.maximum if one.kind == LARGEST else np.add
        for i in range(PAGE // LINE):
            lanes = join(lanes, lines[:, i])
        while lanes.shape[1] > 1:
            lanes = join(lanes[:, 0::2], lanes[:, 1::2])
        found.append(lanes[:, 0])
    return np.array(found).reshape(len(sums), len(arrays[0]) // PAGE)


places = st.integers(0, VECTORS - 1)
programs = st.lists(
    st.tuples(st.integers(-2, VECTORS - 1), st.lists(st.tuples(places, st.sampled_from([1.0, -0.3, 1e20]))))
)
folds = st.lists(st.tuples(st.sampled_from([DOT, TOTAL, LARGEST]), places, st.lists(places, max_size=9)))
"""Runs of sums with the same first vector, which are read side by side where they are products."""


@examples(15)
@given(programs, folds, st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_they_are_their_definition_to_the_bit(program, wanted, blocks, seed, strange):
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal(blocks * PAGE).astype(np.float32) for _ in range(VECTORS)]
    if strange and blocks:
        for value in (np.nan, np.inf, -0.0):
            arrays[random.integers(VECTORS)][random.integers(blocks * PAGE)] = value

    def calls(arrays):
        # A negative place is a scratch block, which what follows reads in place of the first vector.
        latest, combinations = list(arrays), []
        for out, terms in program:
            sources, coefficients = [latest[k] for k, _ in terms], [c for _, c in terms]
            block = len(combinations)
            combinations.append(Combination(block if out < 0 else arrays[out], sources, coefficients))
            if out < 0:
                latest[0] = block
            else:
                latest[out] = arrays[out]
        return combinations, [
            BlockSum(kind, latest[a], latest[b]) for kind, a, others in wanted for b in others
        ]

    expected = [array.copy() for array in arrays]
    with np.errstate(all="ignore"):
        sums = plain(expected, *calls(expected))
    combinations, folded = calls(arrays)
    found = combine(blocks * PAGE, combinations, folded)
    assert np.array_equal(found, sums, equal_nan=True)
    for mine, other in zip(arrays, expected, strict=True):
        assert np.array_equal(mine, other, equal_nan=True)


def test_products_with_the_same_vector_are_read_side_by_side_and_no_others():
    random = np.random.default_rng(7)
    a, b, c, d = arrays = [random.standard_normal(3 * PAGE).astype(np.float32) for _ in range(4)]
    pairs = [
        (a, b),
        (a, c),
        (a, d),
        (b, c),
        (b, d),
        (b, a),
        (b, b),
        (b, c),
        (c, a),
        (d, a),
        (d, b),
        (d, c),
        (d, d),
    ]
    sums = [BlockSum(DOT, *pair) for pair in pairs]
    sums[4:4] = [BlockSum(TOTAL, b, b), BlockSum(LARGEST, b, b)]
    copies = [BlockSum(one.kind, 0, one.other) for one in sums if one.one is d]
    scratch = [Combination(0, [d, a], [1.0, 0.5])]
    assert np.array_equal(combine(3 * PAGE, (), sums), plain(arrays, (), sums))
    mixed = [*sums, *copies]
    assert np.array_equal(combine(3 * PAGE, scratch, mixed), plain(arrays, scratch, mixed))


def test_arrays_that_do_not_fit_are_refused():
    good, short, wide = (np.zeros(PAGE, np.float32), np.zeros(3, np.float32), np.zeros(PAGE))
    for other in (short, wide):
        with pytest.raises(ValueError, match="contiguous float32"):
            combine(PAGE, [Combination(good, [other], [1.0])], [])
    with pytest.raises(ValueError, match="a coefficient for each source"):
        combine(PAGE, [Combination(good, [good], [])], [])
