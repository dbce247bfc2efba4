"""Validation by pruning: heads removed in each method's order, accuracy and loss measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int

from tl_headnorm.commands.attribute.attribute import Job, importance, mean_z, run_methods
from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.greedy import greedy_order, rounds_of
from tl_headnorm.commands.attribute.stability import correlations
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.gates import Base, Gates

LEAST, MOST, RANDOM = "least_first", "most_first", "random"
GREEDY = "loo_greedy"
Curve = tuple[str, str]


def pruning_orders(
    importance: Mapping[str, Float[np.ndarray, "layer head"]], n_random: int, seed: int
) -> dict[Curve, Int[np.ndarray, " n"]]:
    """Heads by flat index in the order they go: both ways per method, and random ones."""
    orders: dict[Curve, np.ndarray] = {}
    for name, value in importance.items():
        least = np.argsort(value.ravel(), kind="stable")
        orders[name, LEAST], orders[name, MOST] = least, least[::-1]
    generator = np.random.default_rng(seed)
    n = next(iter(importance.values())).size
    for i in range(n_random):
        orders[f"random_{i}", RANDOM] = generator.permutation(n)
    return orders


def numbers_pruned(n_heads: int, points: int) -> Int[np.ndarray, " point"]:
    """From 0 to all heads, evenly, at most `points`."""
    return np.unique(np.linspace(0, n_heads, min(points, n_heads + 1)).round().astype(int))


def prune(
    gated: GatedLoss,
    items: Sequence[Encoded],
    orders: Mapping[Curve, Int[np.ndarray, " n"]],
    numbers: Int[np.ndarray, " point"],
    *,
    base: Base | None = None,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "curve point sample"]]:
    """Loss and correctness of every sample at every point of every order.

    The same set of heads is run once, whatever order it came from.
    """
    sets: dict[bytes, Gates] = {}
    keys = []
    for order in orders.values():
        for number in numbers:
            on = np.ones(gated.n_layers * gated.n_heads, dtype=bool)
            on[order[:number]] = False
            keys.append(key := on.tobytes())
            gates = torch.from_numpy(on).to(gated.model.device, gated.dtype)
            sets.setdefault(key, Gates(f"{number} off", gates.view(gated.n_layers, -1), base))
    values = gated.run(items, list(sets.values()), progress="prune" if progress else None)
    row_of = {key: row for row, key in enumerate(sets, 1)}
    rows = np.array([row_of[key] for key in keys]).reshape(len(orders), len(numbers))
    return {name: values[name][rows] for name in ("loss", "correct")}


def area(curve: Float[np.ndarray, "*rest point"], numbers: np.ndarray) -> Any:
    """Area under a curve over the share pruned, by trapezoids: 1 for an accuracy that stays 1."""
    return np.trapezoid(curve, numbers / numbers[-1], axis=-1)


def areas(
    found: Mapping[str, Float[np.ndarray, "curve point sample"]],
    curves: Sequence[Curve],
    numbers: np.ndarray,
    *,
    repeats: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Area per method and order with 95 % intervals over samples; random orders are one row.

    The interval of `random` also draws among its orders, so that it covers the choice of seeds.
    """
    generator = np.random.default_rng(seed)
    per_sample = {k: area(np.moveaxis(v, 1, -1), numbers) for k, v in found.items()}
    n = per_sample["loss"].shape[1]
    draws = generator.integers(0, n, (repeats, n))
    rows = []
    for name, order in dict.fromkeys((("random" if o == RANDOM else m), o) for m, o in curves):
        at = [i for i, (m, o) in enumerate(curves) if o == order and (order == RANDOM or m == name)]
        row: dict[str, Any] = {"method": name, "order": order}
        for label, key in (("accuracy", "correct"), ("loss", "loss")):
            values = per_sample[key][at]
            orders = generator.integers(0, len(at), (repeats, len(at)))
            boot = [values[o][:, d].mean() for o, d in zip(orders, draws, strict=True)]
            low, high = np.percentile(boot, [2.5, 97.5])
            row |= {f"{label}_area": values.mean(), f"{label}_low": low, f"{label}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def curves_table(
    found: Mapping[str, np.ndarray], curves: Sequence[Curve], numbers: np.ndarray
) -> pd.DataFrame:
    """pruning.parquet: method, order, n_pruned, accuracy, loss."""
    rows = [
        {
            "method": method,
            "order": order,
            "n_pruned": int(number),
            "accuracy": float(found["correct"][c, p].mean()),
            "loss": float(found["loss"][c, p].mean()),
        }
        for c, (method, order) in enumerate(curves)
        for p, number in enumerate(numbers)
    ]
    return pd.DataFrame(rows)


def rank_correlations(
    importance: Mapping[str, Float[np.ndarray, "layer head"]],
) -> pd.DataFrame:
    """Spearman correlation of every pair of maps, as a square table."""
    flat = np.stack([value.ravel() for value in importance.values()])
    real = np.isfinite(flat).all(0)
    matrix = correlations(flat[:, real], "spearman")
    return pd.DataFrame(matrix, index=list(importance), columns=list(importance))


def halves(items: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that give the order, and rows it is measured on: every other one."""
    if len(items) < 4:
        raise InputError(
            f"validate: expected 4 samples or more, half of them to rank heads and half to "
            f"measure, found {len(items)}; raise --max_samples"
        )
    rows = np.arange(len(items))
    return rows[::2], rows[1::2]


def reference_orders(
    job: Job, items: Sequence[Encoded], base: Base | None, *, progress: bool
) -> dict[Curve, Int[np.ndarray, " n"]]:
    """Sequential leave-one-out in both directions, where it is asked for or cheap enough."""
    gated = job.gated
    rounds = rounds_of(job.settings.greedy, gated.n_layers * gated.n_heads)
    if rounds == 0:
        return {}
    return {
        (GREEDY, order): greedy_order(
            gated, items, rounds, most=order == MOST, base=base, progress=progress
        )
        for order in (LEAST, MOST)
    }  # fmt: skip


def validate_scores(job: Job, run: xr.Dataset, *, progress: bool = False) -> dict[str, Any]:
    """Prune by every method of a run, by leave-one-out (single and sequential) and at random.

    Every other sample ranks the heads, the rest measure: an order is not judged by the samples
    it was made from. Returns the tables `curves` and `areas`, and `importance` per method.
    """
    settings, gated = job.settings, job.gated
    ranking, measuring = halves(job.items)
    maps = importance(run.isel(sample=ranking).assign(mean=run["score"][:, ranking].mean("sample")))
    ranked = [job.items[i] for i in ranking]
    if "loo" not in maps:
        half = replace(job, items=ranked, questions=[job.questions[i] for i in ranking])
        maps["loo"] = -run_methods(half, ["loo"])["loo"].values.mean(0)
    base = None
    if settings.baseline == "mean":
        base = mean_z(gated, ranked)
    orders = pruning_orders(maps, settings.random_orders, settings.seed)
    orders |= reference_orders(job, ranked, base, progress=progress)
    numbers = numbers_pruned(gated.n_layers * gated.n_heads, settings.pruning_points)
    held_out = [job.items[i] for i in measuring]
    found = prune(gated, held_out, orders, numbers, base=base, progress=progress)
    curves = list(orders)
    return {
        "curves": curves_table(found, curves, numbers),
        "areas": areas(found, curves, numbers, seed=settings.seed),
        "importance": maps,
        "n_ranking": len(ranking),
        "n_measuring": len(measuring),
    }
