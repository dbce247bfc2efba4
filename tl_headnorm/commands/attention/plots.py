"""Figures of attention: all heads, one head with its tokens, maps, generation. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.attention.page import LABELS
from tl_headnorm.plots.colors import PALETTE, WEIGHTS
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series, layers_by_heads, tick_step
from tl_headnorm.plots.text import token_label

LABELS_PER_INCH = 8
UNIFORM = "line on a colour bar: a head that attends alike to all it may see"


def token_ticks(labels: Sequence[str], inches: float | int) -> dict[int, str]:
    """Tokens as tick labels, every so many that they do not touch, with their positions then."""
    every = max(1, -(-len(labels) // max(1, int(inches * LABELS_PER_INCH))))
    return {i: token_label(labels[i]) + (f" {i}" if every > 1 else "")
            for i in range(0, len(labels), every)}  # fmt: skip


def all_heads(found: Any, title: str) -> Figure:
    """All heads as thumbnails, layers down and heads across."""
    n_layers, n_heads, side, _ = found.thumbnails.shape
    tiles = np.full((n_layers, n_heads, side + 2, side + 2), np.nan, np.float32)
    tiles[..., 1:-1, 1:-1] = found.thumbnails / 255
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(n_layers * (side + 2), n_heads * (side + 2))
    inch = min(1.0, 9.0 / n_heads, 15.0 / n_layers)
    panel = Panel(
        "", "head", "layer", Heatmap(mosaic, limits=(0, 1), colors=WEIGHTS, bar=False, nan=""),
        x_ticks=_tile_ticks(range(n_heads), side + 2, tick_step(n_heads, 16)),
        y_ticks=_tile_ticks(found.run["layer"].values, side + 2, tick_step(n_layers, 24)),
        size=(n_heads * inch, n_layers * inch),
    )  # fmt: skip
    return Figure("Attention patterns of all heads", [panel], 1, title)


def _tile_ticks(numbers: Any, side: int, every: int) -> dict[float, str]:
    return {(i + 0.5) * side - 0.5: str(numbers[i]) for i in range(0, len(numbers), every)}


def pattern(weights: np.ndarray, labels: Sequence[str], name: str, title: str) -> Figure:
    """One pattern, queries down and keys across, with the tokens as labels."""
    size, causal = 6.2, np.tri(len(labels), dtype=bool)
    grid = np.where(causal, weights.astype(np.float32), 0)
    ticks = token_ticks(labels, size)
    heatmap = Heatmap(grid, "attention weight (√ scale)", limits=(0, 1), root=True, colors=WEIGHTS)
    panel = Panel("", "key", "query", heatmap, x_ticks=ticks, y_ticks=ticks, size=(size, size))
    return Figure(name, [panel], 1, title)


def _maps(
    grids: Mapping[str, tuple[np.ndarray, float | None]], layers: Sequence[int], signed: bool
) -> list[Panel]:
    """Maps [layer, head], each with its own colours and a line at a uniform head."""
    return [
        layers_by_heads(
            grid, name, layers=layers, signed=signed, colors=WEIGHTS, mark=uniform,
            part=0.7,
            limits=None if signed else (min(0.0, float(np.nanmin(grid, initial=0))),
                                        float(np.nanmax(grid, initial=0)) or 1.0),
        )
        for name, (grid, uniform) in grids.items()
    ]  # fmt: skip


def scores(run: xr.Dataset, title: str) -> Figure:
    """Every score of every head."""
    uniform = run.attrs["uniform"]
    grids = {label: (run[n].values, uniform.get(n)) for n, label in LABELS.items() if n in run}
    panels = _maps(grids, run["layer"].values.tolist(), False)
    return Figure("Scores of every head", panels, subtitle=f"{title} · {UNIFORM}")


def keywords(run: xr.Dataset, title: str) -> Figure:
    """Attention to each keyword, per head, mean over the queries."""
    mean, expected = run["focus"].mean("query"), run["focus"].coords["uniform"].mean("query")
    grids = {f"on “{word}”": (mean.isel(keyword=i).values, float(expected[i]))
             for i, word in enumerate(run["keyword"].values)}  # fmt: skip
    panels = _maps(grids, run["layer"].values.tolist(), False)
    return Figure("Attention to the keywords", panels, subtitle=f"{title} · {UNIFORM}")


def changes(grids: Sequence[tuple[str, np.ndarray]], layers: Sequence[int], title: str) -> Figure:
    """Change of attention to the keywords under distraction, signed."""
    panels = _maps({name: (grid, None) for name, grid in grids}, layers, True)
    return Figure("Change of attention to the keywords by distracting text", panels, subtitle=title)


def generation(writing: Any, title: str) -> Figure:
    """One panel per watched head: a row per new token, a column per token so far."""
    steps = writing.weights.shape[1]
    width, height = 7.6, min(8.0, 0.14 * steps + 0.5)
    edge, new = writing.n_prompt - 0.5, writing.labels[writing.n_prompt :]
    end = Series("end of the prompt", [edge, edge], [-0.5, steps - 0.5], PALETTE[1])
    panels = [
        Panel(
            f"head {layer}.{head}", "token", "new token", series=[end],
            heatmap=Heatmap(writing.weights[i].astype(np.float32), limits=(0, 1), root=True,
                            colors=WEIGHTS, nan="not there yet"),
            x_ticks=token_ticks(writing.labels, width), y_ticks=token_ticks(new, height),
            size=(width, height),
        )
        for i, (layer, head) in enumerate(writing.heads)
    ]  # fmt: skip
    return Figure("Attention of every new token", panels, 1, title)
