"""Heads on questions answered right minus those answered wrong, and what chance would show."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Shaped

PERMUTATIONS = 500
MOST_PRODUCTS = 4e9  # of values and permutations: seconds, not minutes, for the largest models
PERMUTATIONS_AT_ONCE = 50


@dataclass(frozen=True)
class Difference:
    """Mean over right answers minus mean over wrong ones, for every head.

    `stderr` is Welch's, sqrt(s1^2 / n1 + s0^2 / n0); `t` their ratio. `threshold` is the 95 %
    quantile of max over heads of |t| when the answers are shuffled among the questions
    (Westfall and Young 1993): under no difference anywhere, one head in any map beyond it is
    found in 5 % of runs. NaN where a group has fewer than two values.
    What it cannot tell: a cause. Hard questions differ in length and subject too.
    """

    difference: Float[np.ndarray, " head"]
    stderr: Float[np.ndarray, " head"]
    t: Float[np.ndarray, " head"]
    threshold: float
    permutations: int


def right_minus_wrong(
    values: Shaped[np.ndarray, "sample layer head"],
    right: Bool[np.ndarray, " sample"],
    seed: int = 0,
) -> Difference:
    """Compare every head's values between the samples answered right and the others."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    real = np.isfinite(flat).all(axis=0)
    difference, stderr, t = (np.full(flat.shape[1], np.nan) for _ in range(3))
    if min(right.sum(), (~right).sum()) < 2 or not real.any():
        return Difference(difference, stderr, t, float("nan"), 0)
    # Centred: the sums of squares below would lose their digits at a large common mean.
    x = flat[:, real] - flat[:, real].mean(axis=0)
    difference[real], stderr[real], t[real] = (a[0] for a in _welch(x, right[None]))
    count = int(min(PERMUTATIONS, max(100, MOST_PRODUCTS // x.size)))
    permuted = partial(np.random.default_rng(seed).permutation, right)
    labels = np.stack([permuted() for _ in range(count)])
    parts = np.array_split(labels, -(-count // PERMUTATIONS_AT_ONCE))
    largest = np.concatenate([np.abs(_welch(x, part)[2]).max(axis=1) for part in parts])
    threshold = float(np.quantile(largest, 0.95, method="higher"))
    return Difference(difference, stderr, t, threshold, count)


def _welch(
    x: Float[np.ndarray, "sample head"], labels: Bool[np.ndarray, "draw sample"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(difference of means, its standard error, their ratio) [draw, head] for each labelling."""
    inside = labels.astype(np.float64)
    n1, n = inside.sum(axis=1, keepdims=True), len(x)
    n0 = n - n1
    sum1, square1 = inside @ x, inside @ x**2
    sum0, square0 = x.sum(axis=0) - sum1, (x**2).sum(axis=0) - square1
    variance1 = (square1 - sum1**2 / n1).clip(0) / (n1 - 1)
    variance0 = (square0 - sum0**2 / n0).clip(0) / (n0 - 1)
    difference = sum1 / n1 - sum0 / n0
    stderr = np.sqrt(variance1 / n1 + variance0 / n0)
    # A head that never changes has no difference to speak of, not an infinite one.
    scale = np.sqrt((x**2).mean(axis=0))
    t = np.divide(difference, stderr, out=np.zeros_like(difference), where=stderr > 1e-9 * scale)
    return difference, stderr, t
