"""Initial rows are a function of (seed, id, column), the same bits everywhere, distributed as they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import ConfigurationError
from headwater.kernels.rows import begin
from headwater.messages import RuleSpec
from headwater.spec import initializers
from headwater.spec.initializers import Constant, Normal, TruncatedNormal, Uniform, Zeros

ALL = [Zeros(), Constant(0.1), Uniform(-0.3, 0.7), Normal(std=0.01), Normal(1, 2), TruncatedNormal(-1, 0.5)]
INT64 = np.iinfo(np.int64)
EXTREMES = np.array([INT64.min, INT64.min + 1, -1, 0, 1, INT64.max - 1, INT64.max])


def kernel(initializer, seed, ids, dim):
    out = np.full((len(ids), dim), np.nan, dtype=np.float32)
    begin(ids, out.ctypes.data + np.arange(len(ids)) * 4 * dim, dim, initializer, seed)
    return out


@pytest.mark.parametrize("initializer", ALL, ids=repr)
@pytest.mark.parametrize("dim", [1, 3, 8, 33])
def test_the_kernel_has_the_bits_of_the_reference(initializer, dim):
    ids = np.concatenate([EXTREMES, np.random.default_rng(dim).integers(INT64.min, INT64.max, 3000)])
    for seed in (0, -5, 2**63 - 1):
        assert (kernel(initializer, seed, ids, dim) == initializer.rows(seed, ids, dim)).all()


@given(st.lists(st.integers(INT64.min, INT64.max), unique=True, min_size=1, max_size=20), st.randoms())
def test_a_row_does_not_depend_on_its_neighbours(ids, random):
    shuffled = random.sample(ids, len(ids))
    rows = dict(zip(ids, Normal().rows(3, np.array(ids), 4), strict=True))
    for i, row in zip(shuffled, kernel(Normal(), 3, np.array(shuffled), 6), strict=True):
        assert (row[:4] == rows[i]).all()


def test_seeds_ids_and_columns_draw_apart():
    ids = np.arange(2000)
    rows = np.concatenate([kernel(Uniform(0, 1), seed, ids, 8) for seed in (0, 1)])
    assert len(np.unique(rows)) > 0.99 * rows.size


def test_moments_are_those_of_the_distribution():
    ids = np.arange(100_000)
    cut = 0.8796256610342398  # standard deviation of a standard normal within ±2
    for initializer, mean, std in [
        (Uniform(-1, 3), 1.0, 4 / math.sqrt(12)),
        (Normal(2, 0.5), 2.0, 0.5),
        (TruncatedNormal(2, 0.5), 2.0, 0.5 * cut),
    ]:
        rows = kernel(initializer, 11, ids, 4).astype(np.float64)
        assert abs(rows.mean() - mean) < 5 * std / math.sqrt(rows.size)
        assert abs(rows.std() / std - 1) < 0.01
        assert abs(np.corrcoef(rows.T) - np.eye(4)).max() < 5 / math.sqrt(len(ids))
    assert abs(rows - 2).max() <= 1.0


def test_normal_quantiles_are_exact_to_float32():
    for z in np.linspace(-6, 6, 121):
        p = 0.5 * math.erfc(-z / math.sqrt(2))
        if 2**-32 < p < 1 - 2**-32:
            got = initializers._quantile(np.array([p]))[0]
            slope = math.sqrt(2 * math.pi) * math.exp(z * z / 2)  # 1 − p is rounded
            assert abs(got - z) <= 1.5e-7 * abs(z) + 4e-16 * slope


@pytest.mark.parametrize("initializer", ALL, ids=repr)
def test_an_initializer_travels_as_a_spec(initializer):
    assert initializers.from_spec(initializer.to_spec()) == initializer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normal(std=-1),
        lambda: TruncatedNormal(std=-1),
        lambda: Uniform(2, 1),
        lambda: Constant(1e39),
        lambda: Constant(math.nan),
        lambda: Normal(mean=math.inf),
        lambda: initializers.from_spec(RuleSpec("Ones", {})),
        lambda: initializers.from_spec(RuleSpec("Normal", {"sigma": 1.0})),
    ],
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
