"""Sums of squares: the kernel against its plain reference, and one tree however a vector is cut."""

import math

import numpy as np
import plain_kernels as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import addresses, numbers

from examples import examples
from headwater.kernels import square_up
from headwater.log.norms import norm, scale, subtrees
from headwater.spec.layout import LINE, PAGE, ranges


def same_doubles(ours, theirs):
    """Equal to the bit, but that any NaN equals any other."""
    same = ours.view(np.int64) == theirs.view(np.int64)
    return bool(np.all(same | (np.isnan(ours) & np.isnan(theirs))))


counts = st.integers(0, 200).map(lambda lines: LINE * lines)


@examples(60)
@given(
    counts,
    st.integers(0, 70).map(lambda lines: LINE * lines),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.01]),
    st.integers(0, 2**32),
)
def test_squares_have_the_bits_of_the_plain_ones(n, first, workers, special, seed):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, special) for _ in range(workers)]
    lanes = generator.random((-(-(first + n) // PAGE) + 1, LINE))
    expected = lanes.copy()
    square_up(addresses(gradients), 3.0, first, n, lanes)
    reference.square_up(gradients, 3.0, first, n, expected)
    assert same_doubles(lanes, expected)


@examples(30)
@given(counts, counts, st.integers(1, 3), st.integers(0, 2**32))
def test_squares_do_not_depend_on_how_elements_are_cut(one, other, workers, seed):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, one + other, 0.0) for _ in range(workers)]
    whole, parts = np.zeros((8, LINE)), np.zeros((8, LINE))
    square_up(addresses(gradients), 1.0, 0, one + other, whole)
    square_up(addresses(gradients), 1.0, 0, one, parts)
    square_up(addresses([gradient[one:] for gradient in gradients]), 1.0, one, other, parts)
    assert same_doubles(whole, parts)


def test_squares_of_nothing_and_parts_of_lines_are_refused():
    gradient, lanes = np.ones(2 * PAGE, np.float32), np.zeros((1, LINE))
    for by, first, n in (([], 0, LINE), ([gradient], 0, 8), ([gradient], 8, LINE), ([gradient], LINE, PAGE)):
        with pytest.raises(ValueError, match=r"gradient|whole lines"):
            square_up(addresses(by), 1.0, first, n, lanes)
    assert not lanes.any()


@examples(200)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32))
def test_the_norm_has_the_same_bits_for_any_number_of_servers(pages, servers, seed):
    blocks = np.random.default_rng(seed).lognormal(sigma=8, size=pages)
    whole = norm(subtrees(blocks, 0))
    nodes = []
    for start, stop in ranges(pages * PAGE, servers):
        part = subtrees(blocks[start // PAGE : stop // PAGE], start // PAGE)
        assert len(part) <= 2 * math.ceil(math.log2(pages + 1))
        nodes += part
    assert norm(np.random.default_rng(seed).permutation(np.array(nodes, dtype=object))) == whole
    assert math.isclose(whole, math.sqrt(math.fsum(blocks)), rel_tol=1e-12)


def test_a_norm_of_nothing_is_0_and_one_that_is_not_finite_says_so():
    assert norm([]) == 0.0
    assert norm(subtrees(np.array([1.0, math.inf, 2.0]), 0)) == math.inf
    assert math.isnan(norm(subtrees(np.array([1.0, math.nan, 2.0]), 0)))


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (3.0, 1.0), (math.inf, 0.0)])
def test_a_gradient_is_scaled_down_and_never_up(norm, factor):
    assert scale(4.0, norm) == factor


def test_the_factor_is_that_of_torch():
    assert scale(2.5, 5.0) == 2.5 / 5.000001
    assert math.isnan(scale(2.5, math.nan))
