"""Figures of massive activations, from the study's Dataset. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.plots.colors import DARK, GREY, PALETTE
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series, bound, cells

BLOCK = "layer (residual after the block)"
MOST_CHANGE = 200.0  # percent; colours end here


def figures(run: xr.Dataset, tokens: Sequence[str], title: str) -> dict[str, Figure]:
    """Figures by file stem; `tokens` are those of the sequence shown in three dimensions."""
    top = {"top1": "largest", "top2": "second", "top3": "third", "median": "median"}
    off = {"clean": "clean", "all heads": "all heads off", "all mlps": "all MLPs off"}
    off = {name: label for name, label in off.items() if name in run["set"].values}
    curves = {label: run[name].values for name, label in top.items()}
    makers = {label: run["set_top1"].sel(set=name).values for name, label in off.items()}
    found = {
        "layers": Figure("Largest activations by layer", [_curves(curves, "|x|", "y")], 1, title),
        "pruning": Figure("Largest activation after pruning", [pruning(run)], 1, title),
        "makers": Figure("Who makes them", [_curves(makers, "largest |x|", "y")], 1, title),
        "heads": ranking(run, title),
        "token_by_dimension": token_by_dimension(run, tokens, title),
    }
    panels = layer_sweep(run)
    return found | ({"layer_sweep": Figure("Layer by layer", panels, 2, title)} if panels else {})


def _curves(curves: Mapping[str, np.ndarray], y: str, log: Any = "") -> Panel:
    """A line over layers for each."""
    series = [Series(name, np.arange(len(values)), values, color, marker="o")
              for color, (name, values) in zip(PALETTE, curves.items(), strict=False)]  # fmt: skip
    return Panel(x=BLOCK, y=y, series=series, log=log, size=(6.2, 3.2))


def pruning(run: xr.Dataset) -> Panel:
    """Change of the largest activation by layer when heads are pruned, with the dtype's noise."""
    changes = {name: run["change_percent"].sel(set=name).values for name in run.attrs["pruned"]}
    panel, noise = _curves(changes, "change (%)"), run["noise_percent"].values
    band = Series("noise of the dtype", np.arange(len(noise)), color=GREY, kind="band",
                  low=-noise, high=noise)  # fmt: skip
    return Panel(x=panel.x, y=panel.y, series=[band, *panel.series], size=panel.size)


def layer_sweep(run: xr.Dataset) -> list[Panel]:
    """Change of every layer's largest when one layer's heads, or its MLP, are off."""
    grids = {}
    for start, label in {"heads of layer ": "heads off", "mlp ": "MLP off"}.items():
        rows = [name for name in run["set"].values if str(name).startswith(start)]
        if rows:
            grids[label] = run["change_percent"].sel(set=rows).values
    limit = min(bound(*grids.values()), MOST_CHANGE)
    end = f" (colours end at {limit:g})" if bound(*grids.values()) > limit else ""
    return [
        Panel(label, "measured after layer", "layer switched off", size=cells(grid.shape),
              heatmap=Heatmap(grid, f"change of the largest |x| (%){end}", signed=True,
                              limits=(-limit, limit)))
        for label, grid in grids.items()
    ]  # fmt: skip


def ranking(run: xr.Dataset, title: str, most: int = 24) -> Figure:
    """Heads by attention to the token, the uniform baseline, and what they contribute."""
    weights = run["first_token_weight"].values
    order = np.argsort(-weights, axis=None, kind="stable")[:most]
    names = [f"{i // weights.shape[1]}.{i % weights.shape[1]}" for i in order]
    uniform, at = float(run["uniform_weight"]), np.arange(len(order))
    columns = {"attention to the token": weights,
               "contribution ‖z_h W_O‖": run["head_resid_contrib_norm"].values}  # fmt: skip
    panels = [
        Panel(
            x=label, y="layer.head", horizontal=True, y_ticks=dict(enumerate(names)),
            series=[Series(label, grid.ravel()[order], at, PALETTE[i], "bars", legend=False)],
            size=(3.2, 0.4 + 0.17 * len(names)),
        )
        for i, (label, grid) in enumerate(columns.items())
    ]  # fmt: skip
    line = Series(f"uniform head: {uniform:.3g}", [uniform, uniform], [-0.5, len(order) - 0.5],
                  DARK, dash="dash")  # fmt: skip
    panels[0] = replace(panels[0], series=[*panels[0].series, line])
    kept = f"the first {len(order)} of {weights.size} heads"
    return Figure(f"Heads by attention to the token, {kept}", panels, 2, title)


def token_by_dimension(run: xr.Dataset, tokens: Sequence[str], title: str) -> Figure:
    """Token x dimension of one layer in 3-D: before, after pruning, and the difference."""
    before, after = run["picture_before"].values, run["picture_after"].values
    limits, names = (0, float(max(before.max(), after.max()))), dict(enumerate(map(repr, tokens)))
    pruned = next(iter(run.attrs["pruned"]))
    panels = [
        Panel(label, "dimension", "token", Heatmap(grid, limits=ends), raised=True, y_ticks=names,
              size=(4.4, 4.2))
        for label, grid, ends in (("before", before, limits),
                                  (f"without the {pruned}", after, limits),
                                  ("difference", after - before, None))
    ]  # fmt: skip
    heading = f"Layer {run.attrs['picture_layer']}, |x| of the residual"
    return Figure(heading, panels, 3, title)
