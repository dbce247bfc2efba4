"""How a run shows itself in a notebook: small maps, the largest heads, where it came from."""

import base64
import html
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

MOST_MEASURES = 6  # shown in small; the others are named
_STYLE = (
    "<style>.tlh{font:13px/1.45 system-ui,sans-serif;max-width:60rem}"
    ".tlh .maps{display:flex;flex-wrap:wrap;gap:1.2rem;margin:.5rem 0}"
    ".tlh figure{margin:0}.tlh figcaption{opacity:.8;font-size:12px}"
    ".tlh img{image-rendering:pixelated;display:block;margin:.2rem 0}"
    ".tlh p{margin:.15rem 0}.tlh .faint{opacity:.7;font-size:12px}"
    ".tlh summary{cursor:pointer;opacity:.7;font-size:12px}</style>"
)


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
    maps = "".join(_map(run[f"{name}_mean"], name) for name in names[:MOST_MEASURES])
    more = names[MOST_MEASURES:]
    also = f"<p class=faint>Also: {html.escape(', '.join(more))}</p>" if more else ""
    return (
        f"{_STYLE}<div class=tlh>{_lead(run)}<div class=maps>{maps}</div>{also}{_origin(run.attrs)}"
        f"<details><summary>all variables</summary>{own}</details></div>"
    )


def _lead(run: xr.Dataset) -> str:
    """Model, data, number of samples, accuracy."""
    attrs = run.attrs
    dataset = attrs.get("dataset") or {}
    source = Path(str(attrs["model"].get("source", ""))).name
    data = f"{dataset.get('name', '')} {dataset.get('split', '')}".strip()
    parts = [f"<b>{html.escape(source)}</b>", html.escape(data)]
    if "num_processed" in attrs:
        parts.append(f"{attrs['num_processed']:,} samples")
    parts.append(f"{run.sizes['layer']} layers × {run.sizes['head']} heads")
    if "token_agg" in attrs:
        parts.append("last token" if attrs["token_agg"] == "last" else "mean over tokens")
    if attrs.get("accuracy") is not None:
        parts.append(f"accuracy (letter) {attrs['accuracy']:.1%}")
    lines = [f"<p>{' · '.join(part for part in parts if part)}</p>"]
    if attrs.get("missing_layers"):
        lines.append(f"<p>no data for layers {html.escape(str(attrs['missing_layers']))}</p>")
    return "".join(lines)


def _map(mean: xr.DataArray, name: str) -> str:
    """One measure: a map of a pixel per head, its range, and the largest heads."""
    values = np.asarray(mean.values, np.float64)
    real = values[np.isfinite(values)]
    formula = html.escape(str(mean.attrs.get("formula", "")))
    title = f"<b>{html.escape(name)}</b> {formula}"
    if not real.size:
        return f"<figure><figcaption>{title}<br>no data</figcaption></figure>"
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), axis=None)[:4]
    largest = ", ".join(
        f"{layer}.{head} ({values[layer, head]:.3g})"
        for layer, head in zip(*np.unravel_index(order, values.shape), strict=True)
        if np.isfinite(values[layer, head])
    )
    n_layers, n_heads = values.shape
    cell = max(4, min(16, 320 // max(n_layers, n_heads)))
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<img alt="mean {html.escape(name)}, layers down, heads across" width={cell * n_heads} '
        f'height={cell * n_layers} src="data:image/png;base64,{_png(values)}">'
        f"<figcaption>{real.min():.3g} to {real.max():.3g} · largest (layer.head): {largest}"
        "</figcaption></figure>"
    )


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


def _origin(attrs: Mapping[str, Any]) -> str:
    """One faint line: architecture, data type, engine, template, versions, time."""
    model, template = attrs["model"], attrs.get("template") or {}
    versions = attrs.get("versions") or {}
    parts = [str(model.get(key)) for key in ("architecture", "dtype", "engine") if model.get(key)]
    if template.get("name"):
        parts.append(f"template {template['name']}")
    parts += [f"{key} {versions[key]}" for key in ("tl_headnorm", "transformer_lens", "torch")
              if key in versions]  # fmt: skip
    if attrs.get("validated_against_hf") is not None:
        parts.append(f"checked against Hugging Face ({attrs['validated_against_hf']:.0e})")
    if attrs.get("finished_at"):
        parts.append(str(attrs["finished_at"]))
    return f"<p class=faint>{html.escape(' · '.join(parts))}</p>"
