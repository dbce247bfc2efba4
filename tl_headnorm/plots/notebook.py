"""How a run shows itself in a notebook: small maps, the largest heads, where it came from."""

import base64
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup

from tl_headnorm.plots.templates import render

MOST_MEASURES = 6  # shown in small; the others are named
LARGEST = 4  # heads named under a map


def show_runs() -> None:
    """Let IPython, where this runs inside it, show the runs of this package in small.

    Any other Dataset keeps the form xarray gives it. Called once more, it changes nothing.
    """
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    formatter = getattr(shell, "display_formatter", None)
    if formatter is not None:
        formatter.formatters["text/html"].for_type(xr.Dataset, run_html)


def run_html(run: xr.Dataset) -> str:
    """A run in a few kilobytes of HTML, with xarray's own form folded away below.

    A Dataset that is no run comes out as xarray shows it.
    """
    own = run._repr_html_()
    names = [str(v).removesuffix("_mean") for v in run.data_vars if str(v).endswith("_mean")]
    names = [name for name in names if run[f"{name}_mean"].dims == ("layer", "head")]
    if not names or not isinstance(run.attrs.get("model"), Mapping):
        return str(own)
    return render(
        "plots/notebook.html.j2",
        attrs=run.attrs,
        source=Path(str(run.attrs["model"].get("source", ""))).name,
        dataset=run.attrs.get("dataset") or {},
        template=run.attrs.get("template") or {},
        versions=run.attrs.get("versions") or {},
        shape=(run.sizes["layer"], run.sizes["head"]),
        maps=[_map(run[f"{name}_mean"], name) for name in names[:MOST_MEASURES]],
        more=names[MOST_MEASURES:],
        own=Markup(own),
    )


def _map(mean: xr.DataArray, name: str) -> dict[str, Any]:
    """One measure: a picture of a pixel per head, its range, and the largest heads."""
    values = np.asarray(mean.values, np.float64)
    real = values[np.isfinite(values)]
    found = {"name": name, "formula": str(mean.attrs.get("formula", "")), "png": None}
    if not real.size:
        return found
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), axis=None)[:LARGEST]
    places = zip(*np.unravel_index(order, values.shape), strict=True)
    n_layers, n_heads = values.shape
    cell = max(4, min(16, 320 // max(n_layers, n_heads)))
    return found | {
        "png": _png(values),
        "width": cell * n_heads,
        "height": cell * n_layers,
        "low": real.min(),
        "high": real.max(),
        "largest": [
            (layer, head, values[layer, head])
            for layer, head in places
            if np.isfinite(values[layer, head])
        ],
    }


def _png(values: np.ndarray) -> str:
    """A pixel per head, base64: dark is small, bright is large; where signs differ white is 0."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    real = values[np.isfinite(values)]
    low, high, colors = real.min(), real.max(), "viridis"
    if low < 0 < high:
        high = max(-low, high)
        low, colors = -high, "RdBu_r"
    scaled = np.ma.masked_invalid((values - low) / ((high - low) or 1.0))
    stream = io.BytesIO()
    imsave(stream, colormaps[colors].with_extremes(bad="#b0b0b0")(scaled), format="png")
    return base64.b64encode(stream.getvalue()).decode()
