"""Figures of a comparison: one per measure, of differences, ratios and both means. No torch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.plots.colors import GREY, PALETTE
from tl_headnorm.plots.panel import Figure, Panel, Series, layers_by_heads
from tl_headnorm.plots.templates import signed


def _hover(one: xr.Dataset) -> np.ndarray:
    """The text under the pointer, per head."""
    text = np.empty(one["t"].shape, dtype=object)
    for layer, head in np.ndindex(text.shape):
        v = {key: float(one[key].values[layer, head]) for key in one.data_vars}
        text[layer, head] = f"layer {layer}, head {head}\n" + (
            "no data"
            if np.isnan(v["difference"])
            else f"{v['mean_a']:.4g} → {v['mean_b']:.4g} ({v['difference']:+.3g})\n"
            f"log₂ ratio {signed(v['log2_ratio'])}\n"
            f"effect {v['effect']:+.2f}, q {v['q']:.2g}\nrank {v['rank_a']:g} → {v['rank_b']:g}"
        )
    return text


def figure(result: xr.Dataset, name: str, rows: pd.DataFrame, fdr: float) -> Figure:
    """Difference, ratio where a head has one, and before against after, of one measure."""
    one, text = result.sel(measure=name), result.attrs["measures"][name]
    hover = _hover(one)
    maps = {f"difference, {text['units']}": one["difference"].values}
    if np.isfinite(one["log2_ratio"].values).any():
        maps["log₂ ratio, B / A"] = one["log2_ratio"].values
    layer, head = np.nonzero((one["q"] > fdr).values & bool((one["difference"] != 0).any()))
    dots = Series(f"cannot be told from no change (q > {fdr:g})", head, layer, "#777777", "points",
                  marker=".", size=3, legend=len(head) > 0)  # fmt: skip
    panels = [
        replace(layers_by_heads(grid, title, signed=True, hover=hover), series=[dots])
        for title, grid in maps.items()
    ]
    a, b = result.attrs["names"]
    heading = f"{name}: {text['formula']}"
    return Figure(heading, [*panels, _scatter(one, rows, hover)], 3, f"A: {a}   B: {b}")


def _scatter(one: xr.Dataset, rows: pd.DataFrame, hover: np.ndarray) -> Panel:
    """Every head's mean before and after; the line is no change; some movers have names."""
    a, b = one["mean_a"].values.ravel(), one["mean_b"].values.ravel()
    ends, named = _ends(a, b), _named(rows, _ends(a, b))
    names = [f"{row['layer']}.{row['head']}" for row in named.to_dict("records")]
    series = [
        Series("no change", ends, ends, GREY, legend=False),
        Series("heads", a, b, kind="points", hover=list(hover.ravel()), legend=False),
        Series("changed most", named["mean_a"], named["mean_b"], PALETTE[1], "points", marker="o",
               size=6, hollow=True, labels=names, legend=False),
    ]  # fmt: skip
    return Panel("B against A; circles: changed most", "mean in A", "mean in B", series=series,
                 log="xy" if ends[0] > 0 else "", size=(3.2, 3.0))  # fmt: skip


def _ends(a: np.ndarray, b: np.ndarray) -> list[float]:
    real = np.concatenate([a, b])
    real = real[np.isfinite(real)]
    return [float(real.min()), float(real.max())] if real.size else [0.0, 1.0]


def _named(rows: pd.DataFrame, ends: list[float]) -> pd.DataFrame:
    """The movers to name in a scatter: five at most, none so near another that names overlap."""
    scale = np.log if ends[0] > 0 else np.asarray
    near = 0.08 * (scale(ends[1]) - scale(ends[0]))
    kept: list[Any] = []
    for index, a, b in zip(rows.index, scale(rows["mean_a"]), scale(rows["mean_b"]), strict=True):
        free = all(max(abs(a - x), abs(b - y)) > near for _, x, y in kept)
        if free and len(kept) < 5:
            kept.append((index, a, b))
    return rows.loc[[index for index, _, _ in kept]]
