"""Moments: numpy's mean and std under any split, order and merge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tl_headnorm.stats import Moments

SHAPE = (2, 3)
samples = arrays(
    np.float64,
    st.tuples(st.integers(0, 12), st.just(SHAPE[0]), st.just(SHAPE[1])),
    elements=st.floats(-1e6, 1e6),
)


def assert_same(a, b, scale=1e6):
    np.testing.assert_array_equal(a.n, b.n)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(a.M2, b.M2, rtol=1e-9, atol=1e-12 * scale**2)


@given(samples)
def test_one_pass_equals_numpy(x):
    moments = Moments.empty(SHAPE)
    moments.update(x)
    assert (moments.n == len(x)).all()
    if len(x) > 0:
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-8)
    if len(x) > 1:
        np.testing.assert_allclose(moments.std(), x.std(0, ddof=1), rtol=1e-9, atol=1e-7)


@given(samples, st.lists(st.integers(0, 12), max_size=4))
def test_any_split_equals_one_pass(x, cuts):
    merged = Moments.empty(SHAPE)
    for part in np.split(x, sorted(min(c, len(x)) for c in cuts)):
        merged = merged.merge(Moments.of(part))
    assert_same(merged, Moments.of(x))


@given(samples, samples, samples)
def test_merge_is_associative_and_commutative(x, y, z):
    a, b, c = Moments.of(x), Moments.of(y), Moments.of(z)
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(samples)
def test_empty_is_the_identity(x):
    moments = Moments.of(x)
    for merged in (moments.merge(Moments.empty(SHAPE)), Moments.empty(SHAPE).merge(moments)):
        np.testing.assert_array_equal(merged.mean, moments.mean)
        np.testing.assert_array_equal(merged.M2, moments.M2)


def test_a_shard_of_one_sample_is_kept():
    x = np.arange(24.0).reshape(4, *SHAPE)
    merged = Moments.of(x[:3]).merge(Moments.of(x[3:]))
    assert_same(merged, Moments.of(x))
    assert (merged.n == 4).all()


def test_ddof_and_too_few_samples():
    one = Moments.of(np.ones((1, *SHAPE)))
    assert np.isnan(one.std()).all()
    assert np.isnan(Moments.empty(SHAPE).mean_or_nan()).all()
    two = Moments.of(np.stack([np.zeros(SHAPE), np.full(SHAPE, 2.0)]))
    np.testing.assert_allclose(two.std(), np.sqrt(2))
    np.testing.assert_allclose(two.std(ddof=0), 1)


def test_nan_means_not_measured():
    x = np.ones((3, *SHAPE))
    x[1, 0, 0] = np.nan
    moments = Moments.of(x)
    assert moments.n[0, 0] == 2
    assert moments.mean[0, 0] == 1


def test_stays_exact_where_the_textbook_formula_breaks():
    """Data at 1e8 with a spread of 1: sum of squares minus square of the sum loses everything."""
    rng = np.random.default_rng(0)
    x = 1e8 + rng.normal(size=(5000, *SHAPE))
    ours = Moments.empty(SHAPE)
    for part in np.array_split(x, 313):
        ours.update(part)
    truth = x.std(0, ddof=1)
    np.testing.assert_allclose(ours.std(), truth, rtol=1e-9)
    np.testing.assert_allclose(ours.mean, x.mean(0), rtol=1e-14)

    n, total, squares = len(x), x.sum(0), (x**2).sum(0)
    with np.errstate(invalid="ignore"):
        naive = np.sqrt((squares - total**2 / n) / (n - 1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(naive, truth, rtol=1e-2)
