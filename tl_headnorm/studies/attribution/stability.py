"""How much per-head values differ between samples, and whether the differences mean anything."""

from typing import Any

import numpy as np
from jaxtyping import Float

from tl_headnorm.errors import InputError

Maps = Float[np.ndarray, "sample feature"]
# Pairs beyond this many samples say nothing new and cost memory; a seeded choice is used.
MOST_SAMPLES = 1000


def ranks(rows: Float[np.ndarray, "row n"]) -> Float[np.ndarray, "row n"]:
    """Ranks within each row; ties share their mean rank."""
    out = np.empty(rows.shape)
    for i, row in enumerate(rows):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        out[i] = (np.cumsum(count) - (count - 1) / 2)[place]
    return out


def standardised(maps: Maps) -> Maps:
    """Every row with mean 0 and length 1; a constant row is all 0."""
    centred = maps - maps.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def correlations(maps: Maps, kind: str) -> Float[np.ndarray, "sample sample"]:
    """Pearson, Spearman or cosine similarity of every pair of rows."""
    if kind == "cosine":
        length = np.linalg.norm(maps, axis=1, keepdims=True)
        unit = np.divide(maps, length, out=np.zeros_like(maps), where=length > 0)
    else:
        unit = standardised(ranks(maps) if kind == "spearman" else maps)
    return unit @ unit.T


def mean_pair(matrix: Float[np.ndarray, "sample sample"]) -> float:
    """Mean over pairs of different samples."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def predicted(rho: float, n: int | np.ndarray) -> Any:
    """Correlation of one of N samples with their mean, where pairs correlate rho on average.

    sqrt(rho + (1 - rho) / N): exact for standardised maps. rho = 0.78 and N = 50 give 0.89, so
    a high value says that maps share a mean, not that one sample is enough.
    """
    return np.sqrt(np.maximum(rho + (1 - rho) / np.asarray(n, float), 0))


def one_against_mean(maps: Maps) -> float:
    """Mean over samples of the correlation of a sample with the mean of all (itself included)."""
    unit, mean = standardised(maps), standardised(maps.mean(0, keepdims=True))
    return float((unit @ mean[0]).mean())


def growth(maps: Maps, generator: np.random.Generator, repeats: int = 20) -> list[dict[str, Any]]:
    """`one_against_mean` for growing N, of raw and of standardised maps, and the prediction."""
    n, unit = len(maps), standardised(maps)
    rho = mean_pair(unit @ unit.T)
    sizes = sorted({s for s in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 256, 512) if s < n} | {n})
    out = []
    for size in sizes:
        draws = [generator.permutation(n)[:size] for _ in range(1 if size == n else repeats)]
        out.append(
            {
                "n": size,
                "measured": float(np.mean([one_against_mean(maps[d]) for d in draws])),
                "measured_standardised": float(np.mean([one_against_mean(unit[d]) for d in draws])),
                "predicted": float(predicted(rho, size)),
            }
        )
    return out


def rho_interval(
    matrix: Float[np.ndarray, "sample sample"], generator: np.random.Generator, repeats: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean pair; a sample drawn twice is no pair with itself."""
    n, found = len(matrix), []
    for _ in range(repeats):
        count = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
        weight = float(count.sum() ** 2 - (count**2).sum())
        if weight > 0:
            total = count @ matrix @ count - (count**2 * np.diag(matrix)).sum()
            found.append(total / weight)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def top_overlap(maps: Maps, k: int) -> tuple[float, float]:
    """(mean share of a sample's k largest |values| among the mean map's, share by chance)."""
    top = set(np.argsort(-np.abs(maps.mean(0)), kind="stable")[:k])
    each = np.argsort(-np.abs(maps), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(top & set(row)) / k for row in each])), k / maps.shape[1]


def residual_structure(
    maps: Maps, generator: np.random.Generator, repeats: int = 200
) -> dict[str, Any]:
    """Whether what is left after the mean map has structure of its own.

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
    rho = mean_pair(matrices["pearson"])
    structure = residual_structure(maps, generator)
    return {
        "n_samples": len(maps),
        "n_samples_given": len(flat),
        "mean_correlation": {kind: mean_pair(matrix) for kind, matrix in matrices.items()},
        "mean_correlation_interval": rho_interval(matrices["pearson"], generator),
        "growth": growth(maps, generator),
        "one_against_n": one_against_mean(maps),
        "predicted": float(predicted(rho, len(maps))),
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
