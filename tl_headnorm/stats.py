"""Running moments of per-sample values, exact under any split and merge; an interval."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass
class Moments:
    """Count, mean and sum of squared deviations M2 of every cell of an array.

    Welford's recurrence in its batched form (Chan, Golub, LeVeque 1983): for a batch with
    count m, mean b and M2_b,

        delta = b - mean;  mean += delta * m / (n + m);  M2 += M2_b + delta^2 * n * m / (n + m)

    NaN means "not measured": it adds nothing to its cell's count.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
    """

    n: Int[np.ndarray, "..."]
    mean: Float[np.ndarray, "..."]
    M2: Float[np.ndarray, "..."]

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Moments":
        """The identity of `merge`: no samples."""
        return cls(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))

    @classmethod
    def of(cls, values: Float[np.ndarray, "sample ..."]) -> "Moments":
        """Moments of one batch, over its first axis."""
        values = np.asarray(values, np.float64)
        measured = ~np.isnan(values)
        n = measured.sum(axis=0, dtype=np.int64)
        total = np.where(measured, values, 0.0).sum(axis=0)
        mean = np.divide(total, n, out=np.zeros_like(total), where=n > 0)
        deviation = np.where(measured, values - mean, 0.0)
        return cls(n, mean, (deviation**2).sum(axis=0))

    def update(self, values: Float[np.ndarray, "sample ..."]) -> None:
        """Take in a batch of per-sample values (first axis: samples)."""
        merged = self.merge(Moments.of(values))
        self.n, self.mean, self.M2 = merged.n, merged.mean, merged.M2

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together; neither operand changes."""
        n = self.n + other.n
        delta = other.mean - self.mean
        share = np.divide(other.n, n, out=np.zeros(n.shape), where=n > 0)
        mean = self.mean + delta * share
        return Moments(n, mean, self.M2 + other.M2 + delta**2 * self.n * share)

    def mean_or_nan(self) -> Float[np.ndarray, "..."]:
        """Mean; NaN where nothing was measured."""
        return np.where(self.n > 0, self.mean, np.nan)

    def std(self, ddof: int = 1) -> Float[np.ndarray, "..."]:
        """Standard deviation sqrt(M2 / (n - ddof)); NaN where n <= ddof."""
        dof = self.n - ddof
        variance = np.divide(self.M2, dof, out=np.full(self.M2.shape, np.nan), where=dof > 0)
        return np.sqrt(variance)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; (0, 1) where n is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)
