"""Figures of an attribution run: maps, stability, pruning curves, rank correlations. No torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.plots.colors import PALETTE
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series, bound, layers_by_heads

BLACK, FAINT = "#000000", "#bbbbbb"


def maps(
    grids: Mapping[str, np.ndarray], title: str, *, shared: bool, groups: int | None = None
) -> Figure:
    """Mean scores, a panel each; `shared`: all panels on one scale, so that they compare."""
    limits = (-bound(*grids.values()), bound(*grids.values())) if shared else None
    panels = [
        layers_by_heads(grid, name, signed=not name.startswith("michel"), limits=limits,
                        groups=groups, part=0.7)
        for name, grid in grids.items()
    ]  # fmt: skip
    return Figure(title, panels)


def stability(name: str, values: np.ndarray, report: Mapping[str, Any]) -> Figure:
    """Correlation matrices, one sample against the mean, growth with N, heads by variance."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    rows = flat[:, np.isfinite(flat).all(0)]
    centred = rows - rows.mean(1, keepdims=True)
    rows, mean, some = rows[:300], centred.mean(0), centred[:20]
    ranked = report["variance_ranking"][:30]
    n, r, rho = report["n_samples"], report["one_against_n"], report["mean_correlation"]["pearson"]
    heads = {i: f"{h['layer']}.{h['head']}" for i, h in enumerate(ranked)}
    panels = [
        _correlations(f"samples' correlation, mean {rho:.3f}", rows),
        _correlations("the same with the mean map removed", rows - rows.mean(0)),
        Panel(f"1 sample against {n}: r = {r:.3f}, predicted {report['predicted']:.3f}",
              f"mean of {n} samples, less its mean over heads", "one sample, likewise",
              series=[Series("one head of one sample", np.tile(mean, len(some)), some.ravel(),
                             kind="points", size=2, legend=False)]),
        Panel("correlation of 1 sample with the mean of N", "N", "correlation",
              series=_growth(pd.DataFrame(report["growth"]))),
        Panel("heads by variance over samples", "layer.head", "variance", x_ticks=heads, series=[
            Series("variance", list(heads), [h["variance"] for h in ranked], kind="bars",
                   legend=False)]),
    ]  # fmt: skip
    return Figure(f"How stable is {name} over samples?", panels, 3)


def _growth(growth: pd.DataFrame) -> list[Series]:
    """Three ways to say how alike one sample and the mean are, each with its prediction dashed."""
    words = {"pooled": "all points", "mean_r": "mean r", "standardised": "standardised"}
    return [
        Series(f"{label}{note}", growth["n"], growth[f"{key}{end}"], color, dash=dash)
        for color, (key, label) in zip(PALETTE, words.items(), strict=False)
        for note, end, dash in (("", "", "solid"), (", predicted", "_predicted", "dash"))
    ]


def _correlations(title: str, rows: np.ndarray) -> Panel:
    """Pearson's r of every two samples."""
    values = np.full((len(rows), len(rows)), np.nan)
    if np.any(rows.std(1) > 0):
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.asarray(np.corrcoef(rows)).reshape(values.shape)
    heatmap = Heatmap(values, "r", signed=True, limits=(-1, 1))
    return Panel(title, "sample", "sample", heatmap)


def pruning(curves: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Accuracy and loss against the number pruned, least and most important first."""
    methods = [m for m in dict.fromkeys(curves["method"]) if not m.startswith("random_")]
    # The two references in black: exact removals, one at a time and in sequence.
    colors = {m: BLACK if m.startswith("loo") else PALETTE[i % len(PALETTE)]
              for i, m in enumerate(methods)}  # fmt: skip
    chance = [part for _, part in curves[curves["order"] == "random"].groupby("method")]
    panels = []
    for value in ("accuracy", "loss"):
        for order in ("least_first", "most_first"):
            series = [Series("random orders", p["n_pruned"], p[value], FAINT) for p in chance]
            for method, color in colors.items():
                part = curves[(curves["method"] == method) & (curves["order"] == order)]
                series.append(Series(method, part["n_pruned"], part[value], color,
                                     dash="dash" if method == "loo" else "solid"))  # fmt: skip
            words = order.replace("_", " important ")
            panels.append(Panel(f"{value}, {words}", "heads pruned", value, series=series))
    return Figure(title, panels, 2, subtitle)


def ranks(table: pd.DataFrame) -> Figure:
    """Rank correlation of every pair of methods."""
    names = dict(enumerate(map(str, table.columns)))
    size = 1.2 + 0.42 * len(names), 0.8 + 0.32 * len(names)
    heatmap = Heatmap(table.to_numpy(), "ρ", signed=True, limits=(-1, 1), text=True)
    panel = Panel(heatmap=heatmap, x_ticks=names, y_ticks=names, size=size)
    return Figure("Do the methods rank heads alike?", [panel], 1,
                  "Spearman correlation of mean importance")  # fmt: skip
