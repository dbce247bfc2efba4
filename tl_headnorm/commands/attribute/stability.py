"""Variation of per-head values between samples, and tests for sample-specific signal."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from tl_headnorm.errors import InputError

Maps = Float[np.ndarray, "sample feature"]
# Pairs beyond this many samples say nothing new and cost memory; a seeded choice is used.
MOST_SAMPLES = 1000


def centred(maps: Maps) -> Maps:
    """Every row less its own mean."""
    return maps - maps.mean(1, keepdims=True)


def standardised(maps: Maps) -> Maps:
    """Every row with mean 0 and length 1; a constant row is all 0."""
    rows = centred(maps)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def correlations(maps: Maps, kind: str) -> Float[np.ndarray, "sample sample"]:
    """Pearson, Spearman or cosine similarity of every pair of rows."""
    if kind == "cosine":
        length = np.linalg.norm(maps, axis=1, keepdims=True)
        unit = np.divide(maps, length, out=np.zeros_like(maps), where=length > 0)
    else:
        unit = standardised(rankdata(maps, axis=1) if kind == "spearman" else maps)
    return unit @ unit.T


def mean_pair(matrix: Float[np.ndarray, "sample sample"]) -> float:
    """Mean over pairs of different samples."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def predicted(rho: float, n: int | np.ndarray) -> Any:
    """Correlation of one of N samples with their mean, where pairs correlate rho.

    sqrt(rho + (1 - rho) / N): exact for standardised maps with rho their mean pairwise
    correlation, and for raw maps with the pooled rho and the pooled correlation. rho = 0.78 and
    N = 50 give 0.89, so a high value says that maps share a mean, not that one sample is enough.
    """
    return np.sqrt(np.maximum(rho + (1 - rho) / np.asarray(n, float), 0))


def one_against_mean(maps: Maps) -> float:
    """Mean over samples of the correlation of a sample with the mean of all (itself included)."""
    unit, mean = standardised(maps), standardised(maps.mean(0, keepdims=True))
    return float((unit @ mean[0]).mean())


def pooled_against_mean(maps: Maps) -> float:
    """Correlation over all (sample, head) points at once: a sample's value, less the sample's mean
    over heads, against the mean of all samples there.

    With c_i the centred maps and m their mean, sum_i <c_i, m> = N |m|^2, so that it is
    |m| / sqrt(mean |c_i|^2), and |m|^2 = (v + (N - 1) c) / N with v the mean variance of a map and
    c the mean covariance of a pair: sqrt(rho' + (1 - rho') / N) with rho' = c / v, exactly.
    Large maps count for more, as they do in the mean.
    """
    rows = centred(maps)
    size = float((rows**2).sum(1).mean())
    return float(np.sqrt((rows.mean(0) ** 2).sum() / size)) if size > 0 else 0.0


def predicted_mean_r(maps: Maps, n: Any) -> Any:
    """`one_against_mean` of N raw maps, from what pairs of all maps say.

    Maps of unequal size weigh unequally in their mean. With a_i the length of a centred map and r
    the correlations of pairs: r1 is the mean of r weighted by one map's length, r2 by both's, k is
    mean a^2 / (mean a)^2 as expected of N maps, and

        (r1 + (1 - r1) / N) / sqrt(r2 + (1 - r2) k / N)

    is exact at N = 1 and at all maps; equal lengths give sqrt(rho + (1 - rho) / N) again.
    """
    total, n = len(maps), np.asarray(n, float)
    length = np.linalg.norm(centred(maps), axis=1)
    r = correlations(maps, "pearson") - np.diag(np.any(standardised(maps) != 0, 1).astype(float))
    mean, square = length.mean(), (length**2).mean()
    if mean == 0:
        return np.zeros(n.shape)
    spread = square - mean**2
    k = square / (mean**2 + spread * (total - n) / (n * (total - 1)))
    r1 = (r @ length).mean() / (mean * (total - 1))
    r2 = length @ r @ length / (total * (total * mean**2 - square))
    left = np.maximum(r2 + (1 - r2) * k / n, 1e-12)  # of maps that cancel nothing is left
    return (r1 + (1 - r1) / n) / np.sqrt(left)


def growth(maps: Maps, generator: np.random.Generator, repeats: int = 100) -> list[dict[str, Any]]:
    """One sample against the mean of a growing number N, measured and predicted.

    `pooled` over all points at once, `mean_r` as the mean of the samples' own correlations, both of
    raw maps, and `standardised`; each beside its prediction.
    """
    n, unit = len(maps), standardised(maps)
    rho, pooled = mean_pair(unit @ unit.T), pooled_rho(covariances(maps))
    sizes = sorted({s for s in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 256, 512) if s < n} | {n})
    out = []
    for size in sizes:
        draws = [generator.permutation(n)[:size] for _ in range(1 if size == n else repeats)]

        def mean(measure: Any, of: Maps, draws: list[np.ndarray] = draws) -> float:
            return float(np.mean([measure(of[d]) for d in draws]))

        out.append(
            {
                "n": size,
                "pooled": mean(pooled_against_mean, maps),
                "pooled_predicted": float(predicted(pooled, size)),
                "mean_r": mean(one_against_mean, maps),
                "mean_r_predicted": float(predicted_mean_r(maps, size)),
                "standardised": mean(one_against_mean, unit),
                "standardised_predicted": float(predicted(rho, size)),
            }
        )
    return out


def covariances(maps: Maps) -> Float[np.ndarray, "sample sample"]:
    """Covariance over heads of every pair of samples."""
    rows = centred(maps)
    return rows @ rows.T / maps.shape[1]


def pooled_rho(matrix: Float[np.ndarray, "sample sample"]) -> float:
    """Mean covariance of a pair over the mean variance of a map; of correlations, their mean."""
    size = float(np.trace(matrix)) / len(matrix)
    return mean_pair(matrix) / size if size > 0 else 0.0


def rho_interval(
    matrix: Float[np.ndarray, "sample sample"], generator: np.random.Generator, repeats: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of `pooled_rho`; a sample drawn twice is no pair with itself."""
    n, found, own = len(matrix), [], np.diag(matrix)
    for _ in range(repeats):
        count = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
        pairs, size = float(n**2 - (count**2).sum()), float(count @ own) / n
        if pairs > 0 and size > 0:
            found.append((count @ matrix @ count - count**2 @ own) / pairs / size)
    low, high = np.percentile(found, [2.5, 97.5]) if found else (0.0, 0.0)
    return float(low), float(high)


def top_overlap(maps: Maps, k: int) -> tuple[float, float]:
    """(mean share of a sample's k largest |values| among the mean map's, share by chance)."""
    top = set(np.argsort(-np.abs(maps.mean(0)), kind="stable")[:k])
    each = np.argsort(-np.abs(maps), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(top & set(row)) / k for row in each])), k / maps.shape[1]


def residual_structure(
    maps: Maps, generator: np.random.Generator, repeats: int = 200
) -> dict[str, Any]:
    """Structure of the values after the mean map is removed.

    `mean_share`: share of the sum of squares that the mean map explains. `leading_share`: share
    of the rest in its strongest component, against maps in which every head's values are
    shuffled over samples. The mean pair of the rest is about -1/(N-1) whatever the data, so it
    is no evidence either way and only reported beside that value.
    """
    rest = maps - maps.mean(0)
    total, left = float((maps**2).sum()), float((rest**2).sum())
    if left <= 1e-24 * max(total, 1e-300):
        return {"mean_share": 1.0, "leading_share": None, "p_value": None, "rest_mean_pair": None}
    scale = rest.std(0)
    even = rest[:, scale > 0] / scale[scale > 0]
    leading = _leading_share(even)
    shuffled = [_leading_share(generator.permuted(even, axis=0)) for _ in range(repeats)]
    return {
        "mean_share": 1 - left / total,
        "leading_share": leading,
        "leading_share_shuffled": float(np.mean(shuffled)),
        "p_value": float((1 + sum(s >= leading for s in shuffled)) / (1 + repeats)),
        "rest_mean_pair": mean_pair(correlations(rest, "pearson")),
        "rest_mean_pair_by_construction": -1 / (len(maps) - 1),
    }


def _leading_share(rows: np.ndarray) -> float:
    values = np.linalg.svd(rows, compute_uv=False) ** 2
    return float(values[0] / values.sum())


def stability(
    values: Float[np.ndarray, "sample layer head"], *, seed: int = 0, top_k: int | None = None
) -> dict[str, Any]:
    """The stability report of one method or measure; heads without values are left out."""
    n_heads = values.shape[2]
    flat = values.reshape(len(values), -1).astype(np.float64)
    real = np.flatnonzero(np.isfinite(flat).all(0))
    if len(flat) < 3 or len(real) < 3:
        raise InputError(
            f"stability: expected 3 or more samples and heads with values, found {len(flat)} "
            f"samples and {len(real)} heads; raise --max_samples"
        )
    generator = np.random.default_rng(seed)
    chosen = np.arange(len(flat))
    if len(flat) > MOST_SAMPLES:
        chosen = np.sort(generator.permutation(len(flat))[:MOST_SAMPLES])
    maps = flat[chosen][:, real]
    matrices = {kind: correlations(maps, kind) for kind in ("pearson", "spearman", "cosine")}
    k = min(top_k or max(1, round(0.2 * len(real))), len(real))
    overlap, chance = top_overlap(maps, k)
    variance = maps.var(0, ddof=1)
    order = np.argsort(-variance, kind="stable")
    pairs = covariances(maps)
    pooled = pooled_rho(pairs)
    structure = residual_structure(maps, generator)
    return {
        "n_samples": len(maps),
        "n_samples_given": len(flat),
        "mean_correlation": {kind: mean_pair(matrix) for kind, matrix in matrices.items()},
        "mean_correlation_interval": rho_interval(matrices["pearson"], generator),
        "pooled_correlation": pooled,
        "pooled_correlation_interval": rho_interval(pairs, generator),
        "growth": growth(maps, generator),
        "one_against_n": pooled_against_mean(maps),
        "predicted": float(predicted(pooled, len(maps))),
        "top_k": {"k": k, "overlap": overlap, "by_chance": chance},
        "variance_ranking": [
            {
                "layer": int(real[i] // n_heads),
                "head": int(real[i] % n_heads),
                "variance": float(variance[i]),
                "mean": float(maps[:, i].mean()),
            }
            for i in order
        ],
        "mean_removed": structure,
        "verdict": verdict(structure, len(maps)),
    }


def verdict(structure: dict[str, Any], n: int) -> str:
    """In words: is there sample-specific signal?"""
    share = structure["mean_share"]
    if structure["leading_share"] is None:
        return "No sample-specific signal: every sample has the same map."
    head = f"The mean map explains {share:.0%} of the sum of squares over {n} samples. "
    if structure["p_value"] <= 0.05:
        return head + (
            "Sample-specific signal: what is left moves together over heads (strongest component "
            f"{structure['leading_share']:.0%}, shuffled {structure['leading_share_shuffled']:.0%},"
            f" p = {structure['p_value']:.3g})."
        )
    return head + (
        "No sample-specific signal found: what is left looks like independent noise per head "
        f"(p = {structure['p_value']:.2g}); one map describes all samples."
    )
