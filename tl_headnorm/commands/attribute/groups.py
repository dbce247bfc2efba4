"""Heads whose scores differ between groups of samples, by a permutation test."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control

from tl_headnorm.errors import InputError


def between(
    values: Float[np.ndarray, "sample feature"], member: Bool[np.ndarray, "group sample"]
) -> Float[np.ndarray, " feature"]:
    """Sum over groups of size * (group mean - mean)^2: 0 where all groups have the same mean."""
    size = member.sum(1).astype(float)
    means = member @ values / size[:, None]
    return (size[:, None] * (means - values.mean(0)) ** 2).sum(0)


def permutation_test(
    values: Float[np.ndarray, "sample feature"],
    labels: Int[np.ndarray, " sample"],
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, " feature"]:
    """p per feature: how often shuffled labels part the samples as much, itself counted."""
    generator = np.random.default_rng(seed)
    member = labels == np.unique(labels)[:, None]
    observed = between(values, member)
    # Equal up to rounding counts as equal: else constant features would come out at random.
    slack = 1e-9 * (values**2).sum(0)
    hits = np.ones(values.shape[1])
    for _ in range(permutations):
        hits += between(values, member[:, generator.permutation(len(values))]) >= observed - slack
    return hits / (permutations + 1)


def compare_groups(
    values: Float[np.ndarray, "sample layer head"],
    groups: Sequence[str],
    *,
    permutations: int = 2000,
    fdr: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per head: every group's mean, p, q, and whether it differs at the rate `fdr`."""
    names, labels = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    counts = np.bincount(labels)
    if len(names) < 2 or counts.min() < 2:
        small = ", ".join(f"{n} ({c})" for n, c in zip(names[:8], counts[:8], strict=True))
        raise InputError(
            f"group_by: expected 2 groups or more with 2 samples or more each, found {small}; "
            "raise --max_samples or choose another field"
        )
    flat = values.reshape(len(values), -1)
    p = permutation_test(flat, labels, permutations=permutations, seed=seed)
    q = false_discovery_control(p)
    layer, head = np.divmod(np.arange(flat.shape[1]), values.shape[2])
    table = pd.DataFrame({"layer": layer, "head": head})
    for index, name in enumerate(names):
        table[f"mean_{name}"] = flat[labels == index].mean(0)
    return table.assign(p=p, q=q, differs=q <= fdr)
