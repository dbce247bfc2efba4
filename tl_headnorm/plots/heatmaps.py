"""The heatmap of a run's measure: DataArray [layer, head] -> plotly figure, page and PNG."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from tl_headnorm.plots import plotly, png
from tl_headnorm.plots.panel import Figure, group_size, layers_by_heads
from tl_headnorm.plots.save import save


def _hover(values: np.ndarray, std: np.ndarray | None) -> np.ndarray:
    """The text under the pointer, per cell."""
    # 1 for the largest value; equal ones in order of layer and head.
    ranks = rankdata(-values, method="ordinal", nan_policy="omit", axis=None).reshape(values.shape)
    real = int((~np.isnan(values)).sum())
    text = np.empty(values.shape, dtype=object)
    for (layer, head), value in np.ndenumerate(values):
        lines = [f"layer {layer}, head {head}"]
        if np.isnan(value):
            lines.append("no data")
        else:
            lines.append(f"mean {value:.4g}")
            if std is not None:
                spread = std[layer, head]
                lines.append("std: one sample" if np.isnan(spread) else f"std {spread:.4g}")
            lines.append(f"rank {ranks[layer, head]:.0f} of {real}")
        text[layer, head] = "\n".join(lines)
    return text


def described(array: xr.DataArray, title: str | None = None) -> Figure:
    """The figure as data. Values of both signs are centred at zero."""
    attrs, values = array.attrs, np.asarray(array.values, np.float64)
    formula, statistic = (
        attrs.get("formula", str(array.name or "value")),
        attrs.get("statistic", ""),
    )
    label = formula if formula.split()[:1] == [statistic] else f"{statistic} {formula}".strip()
    panel = layers_by_heads(
        values, label=f"{label}\n{attrs.get('units', '')}".strip(), signed=bool((values < 0).any()),
        groups=group_size(attrs.get("n_key_value_heads"), values.shape[1]),
        hover=_hover(values, attrs.get("std")),
    )  # fmt: skip
    heading = f"{label} of every head"
    return Figure(title or heading, [panel], 1, "" if title else str(attrs.get("title", "")))


def heatmap(array: xr.DataArray, title: str | None = None) -> Any:
    """An interactive heatmap, layers down and heads across.

    Takes for example `run["head_output_norm_mean"]`; the hover text has layer, head, mean, std
    and rank (1 is the largest). Cells without data are grey; lines part the heads of different
    keys and values, where they are shared.
    """
    return plotly.draw(described(array, title))


def heatmap_png(array: xr.DataArray, title: str | None = None) -> bytes:
    """The same picture as PNG, drawn by matplotlib: no browser needed."""
    return png.png(described(array, title))


def save_heatmap(array: xr.DataArray, stem: Path) -> None:
    """Write `<stem>.html` (self-contained) and `<stem>.png`."""
    save(described(array), stem)
