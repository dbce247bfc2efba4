"""Figures of an ablation: every head's effect by method, and sets side by side. No torch."""

import numpy as np
import pandas as pd

from tl_headnorm.plots.colors import PALETTE
from tl_headnorm.plots.panel import Figure, Panel, Series, bound, layers_by_heads

LABELS = {
    "accuracy_drop": "accuracy lost (points)",
    "loss_delta": "loss added (nats)",
}


def figures(table: pd.DataFrame, title: str, groups: int | None = None) -> dict[str, Figure]:
    """Figures by file stem; `groups` is the number of heads that share keys and values."""
    table = table.assign(accuracy_drop=100 * table["accuracy_drop"])
    found = {}
    for column in LABELS:
        found[f"sweep_{column}"] = sweep(table, column, title, groups)
        found[f"sets_{column}"] = sets(table, column, title)
    return {stem: figure for stem, figure in found.items() if figure is not None}


def sweep(table: pd.DataFrame, column: str, title: str, groups: int | None = None) -> Figure | None:
    """Heatmaps of a single-head sweep, one per method on one scale; None where there is none."""
    single = table[table["head"] >= 0]
    if single[column].isna().all():
        return None
    grids = {}
    for method, rows in single.groupby("method", sort=False):
        grids[str(method)] = np.full((single["layer"].max() + 1, single["head"].max() + 1), np.nan)
        grids[str(method)][rows["layer"], rows["head"]] = rows[column]
    limits = -bound(*grids.values()), bound(*grids.values())
    panels = [
        layers_by_heads(grid, method, label=LABELS[column], signed=True, limits=limits,
                        groups=groups, part=0.7)
        for method, grid in grids.items()
    ]  # fmt: skip
    return Figure(f"Each head removed by itself: {LABELS[column]}", panels, subtitle=title)


def sets(table: pd.DataFrame, column: str, title: str) -> Figure | None:
    """Bars of the sets that are no single head, a colour per method; None where there is none."""
    rows = table[(table["head"] < 0) & (table["set"] != "clean")]
    if rows[column].isna().all():
        return None
    methods = list(dict.fromkeys(rows["method"]))
    # Sets below each other, each with a bar for the methods it has, and a gap after it.
    number = pd.factorize(rows["set"])[0]
    rows = rows.assign(number=number).sort_values("number", kind="stable")
    rows["at"] = np.arange(len(rows)) + 0.6 * rows["number"]
    series = [
        Series(method, part[column], part["at"], color, "bars", width=0.92,
               labels=[f"{value:.3g}" for value in part[column]], legend=len(methods) > 1)
        for color, method in zip(PALETTE, methods, strict=False)
        for part in [rows[rows["method"] == method]]
    ]  # fmt: skip
    ticks = {float(at): str(name) for name, at in rows.groupby("set")["at"].mean().items()}
    size = 5.5, 0.5 + 0.16 * float(rows["at"].max() - rows["at"].min())
    panel = Panel(x=LABELS[column], series=series, horizontal=True, y_ticks=ticks, size=size)
    return Figure(f"Sets removed: {LABELS[column]}", [panel], 1, title)
