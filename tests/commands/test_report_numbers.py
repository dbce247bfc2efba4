"""Numbers of the report: what is encoded comes back, and what is compared holds its promise."""

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tl_headnorm.commands.report.encoding import encode, samples_that_fit
from tl_headnorm.commands.report.right_vs_wrong import right_minus_wrong
from tl_headnorm.stats import wilson


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=5),
        elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.just(np.nan),
    )
)
@settings(max_examples=60, deadline=None)
def test_encoding_keeps_values_within_its_step(values):
    encoded = encode(values)
    n_samples, n_layers, n_heads = values.shape
    rows = values.astype(np.float64).transpose(1, 2, 0).reshape(-1, n_samples)
    assert len(encoded.text) == n_layers * n_heads * encoded.stride
    for row, wanted in enumerate(rows):
        part = encoded.text[row * encoded.stride : (row + 1) * encoded.stride]
        codes = np.frombuffer(base64.b64decode(part, validate=True), "<u2")[:n_samples]
        assert np.array_equal(codes == 65535, np.isnan(wanted))
        low, high = encoded.low[row], encoded.high[row]
        found = low + codes / 65534 * (high - low)
        step = 0 if np.isnan(high) else (high - low) / 65534
        real = ~np.isnan(wanted)
        assert (np.abs(found - wanted)[real] <= 0.5001 * step + 1e-12 * np.abs(wanted[real])).all()


def test_float16_would_be_coarser_or_overflow():
    """The rival: float16 at the same size has no room above 65504 and a far larger step."""
    values = np.linspace(60_000, 70_000, 999).astype(np.float32)[:, None, None]
    with np.errstate(over="ignore"):
        rival = values.astype(np.float16).astype(np.float64)
    assert not np.isfinite(rival).all()
    encoded = encode(values)
    codes = np.frombuffer(base64.b64decode(encoded.text), "<u2")[:999]
    found = encoded.low[0] + codes / 65534 * (encoded.high[0] - encoded.low[0])
    assert np.abs(found - values.ravel()).max() < 0.1


def test_samples_left_out_are_chosen_at_random_by_the_seed():
    assert np.array_equal(samples_that_fit(10, 4, 2, seed=0), np.arange(10))
    some = samples_that_fit(1000, 4, 2, seed=7, most_bytes=1600)
    assert len(some) == 100
    assert np.array_equal(some, np.unique(some))
    assert np.array_equal(some, samples_that_fit(1000, 4, 2, seed=7, most_bytes=1600))
    assert not np.array_equal(some, samples_that_fit(1000, 4, 2, seed=8, most_bytes=1600))
    assert 350 < some.mean() < 650, "the first hundred would not stand for all"


@pytest.mark.parametrize(("right", "n", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662),
])  # fmt: skip
def test_wilson(right, n, low, high):
    """The third is Newcombe's (1998) example 1 for method 3."""
    found = wilson(right, n)
    assert found == pytest.approx((low, high), abs=6e-5)


def test_difference_is_welch():
    """Against the formula written out, and shuffling finds a planted head and no other."""
    rng = np.random.default_rng(0)
    values = rng.normal(50, 1, (300, 4, 8))
    right = rng.random(300) < 0.3
    values[right, 2, 5] += 1.5
    found = right_minus_wrong(values, right)
    a, b = values[right][:, 2, 5], values[~right][:, 2, 5]
    stderr = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    k = 2 * 8 + 5
    assert found.difference[k] == pytest.approx(a.mean() - b.mean())
    assert found.stderr[k] == pytest.approx(stderr)
    assert found.t[k] == pytest.approx((a.mean() - b.mean()) / stderr)
    assert list(np.flatnonzero(np.abs(found.t) > found.threshold)) == [k]
    assert found.threshold > 2.5, "the bound of one head alone would be 1.96"


def test_difference_under_no_difference_rarely_finds_any():
    """At 5 % over the whole map; the rival bound of 1.96 finds a head nearly every time."""
    rng = np.random.default_rng(1)
    ours = rival = 0
    for seed in range(40):
        values = rng.exponential(1, (60, 3, 10))
        found = right_minus_wrong(values, rng.random(60) < 0.4, seed)
        ours += (np.abs(found.t) > found.threshold).any()
        rival += (np.abs(found.t) > 1.96).any()
    assert ours <= 6
    assert rival >= 25


def test_difference_where_there_is_little():
    values = np.random.default_rng(0).normal(size=(20, 2, 3))
    values[:, 1] = np.nan
    values[:, 0, 0] = 7.1
    found = right_minus_wrong(values, np.arange(20) < 8)
    assert np.isnan(found.t[3:]).all()
    assert (found.t[0], found.difference[0]) == (0, pytest.approx(0, abs=1e-12))
    assert np.isfinite(found.t[1:3]).all()
    assert np.isnan(right_minus_wrong(values, np.arange(20) < 1).t).all()
