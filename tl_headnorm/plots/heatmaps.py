"""DataArray [layer, head] -> plotly figure, HTML page and PNG. Imports no torch."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.plots.page import write_page
from tl_headnorm.plots.text import in_picture, on_page
from tl_headnorm.run.files import write_bytes

COLORS = "Viridis"
NO_DATA = "#d0d0d0"


def _labels(array: xr.DataArray) -> tuple[str, str, str]:
    """(title, what it is of, colour bar label) from the attributes, or the name without them."""
    attrs = array.attrs
    statistic = attrs.get("statistic", "")
    formula = attrs.get("formula", str(array.name or "value"))
    unit = attrs.get("units", "")
    label = f"{statistic} {formula}".strip()
    return f"{label} of every head", str(attrs.get("title", "")), f"{label}<br>{unit}"


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the largest value; NaN where there is none."""
    flat = values.ravel()
    ranks = np.full(flat.shape, np.nan)
    real = np.flatnonzero(~np.isnan(flat))
    ranks[real[np.argsort(-flat[real], kind="stable")]] = np.arange(1, len(real) + 1)
    return ranks.reshape(values.shape)


def _hover(values: np.ndarray, std: np.ndarray | None) -> np.ndarray:
    """The text under the pointer, per cell."""
    ranks, real = _ranks(values), int((~np.isnan(values)).sum())
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
        text[layer, head] = "<br>".join(lines)
    return text


def heatmap(array: xr.DataArray, title: str | None = None) -> Any:
    """An interactive heatmap, layers down and heads across.

    Takes for example `run["head_output_norm_mean"]`; the hover text has layer, head, mean, std
    and rank (1 is the largest). Cells without data are grey.
    """
    import plotly.graph_objects as go

    values = np.asarray(array.values, np.float64)
    heading, sub, label = _labels(array)
    heading = on_page(heading) + (f"<br><sub>{on_page(sub)}</sub>" if sub else "")
    n_layers, n_heads = values.shape
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(n_heads)),
            y=list(range(n_layers)),
            text=_hover(values, array.attrs.get("std")),
            hoverinfo="text",
            hoverongaps=True,
            colorscale=COLORS,
            colorbar={"title": {"text": label, "side": "right"}},
            xgap=1,
            ygap=1,
        )
    )
    figure.update_layout(
        title={"text": title or heading, "x": 0.02},
        template="plotly_white",
        plot_bgcolor=NO_DATA if np.isnan(values).any() else "white",
        margin={"l": 60, "r": 20, "t": 80, "b": 60},
        width=max(560, 200 + 26 * n_heads),
        height=max(380, 180 + 26 * n_layers),
    )
    figure.update_xaxes(title="head", tickmode="linear", dtick=tick_step(n_heads), showgrid=False)
    figure.update_yaxes(
        title="layer", tickmode="linear", dtick=tick_step(n_layers), autorange="reversed",
        showgrid=False,
    )  # fmt: skip
    if np.isnan(values).any():
        figure.add_annotation(
            text="grey: no data", xref="paper", yref="paper", x=1, y=1.02, showarrow=False,
            xanchor="right", yanchor="bottom",
        )  # fmt: skip
    return figure


def tick_step(count: int) -> int:
    """Every label up to 20, then every second, fourth, ..."""
    step = 1
    while count / step > 20:
        step *= 2
    return step


def heatmap_png(array: xr.DataArray, title: str | None = None) -> bytes:
    """The same picture as PNG, drawn by matplotlib: no browser needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(array.values, np.float64)
    heading, of, label = _labels(array)
    n_layers, n_heads = values.shape
    size = (max(5.6, 2.2 + 0.26 * n_heads), max(3.6, 1.6 + 0.26 * n_layers))
    figure = Figure(figsize=size, layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(NO_DATA)
    masked = np.ma.masked_invalid(values)
    image = axes.imshow(masked, aspect="auto", cmap=COLORS.lower(), interpolation="nearest")
    axes.set_xticks(range(0, n_heads, tick_step(n_heads)))
    axes.set_yticks(range(0, n_layers, tick_step(n_layers)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    if title:
        heading, _, of = title.replace("<sub>", "").replace("</sub>", "").partition("<br>")
    axes.set_title(in_picture(heading), loc="left", fontsize=11, pad=20 if of else 8)
    if of:
        of_text = axes.text(
            0, 1.02, in_picture(of), transform=axes.transAxes, fontsize=7.5, color="#444444"
        )
        of_text.set_in_layout(False)  # a long name is cut off: it must not squeeze the picture
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(in_picture(label.replace("<br>", "\n")), fontsize=8)
    for layer, column in np.argwhere(np.isnan(values)) if np.isnan(values).sum() <= 64 else []:
        axes.text(column, layer, "×", ha="center", va="center", fontsize=7, color="#777777")
    if np.isnan(values).any():
        axes.text(
            1, -0.12, "grey: no data", transform=axes.transAxes, ha="right", va="top", fontsize=7.5
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def save_heatmap(array: xr.DataArray, stem: Path) -> None:
    """Write `<stem>.html` (self-contained) and `<stem>.png`."""
    write_page(stem.with_suffix(".html"), _labels(array)[0], [heatmap(array)])
    write_bytes(stem.with_suffix(".png"), heatmap_png(array))


def save_bars(report: Any, stem: Path) -> None:
    """The bench as horizontal bars of the ratio to the bare forward pass: `<stem>.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["contenders"]
    base = rows.get(report["base"])
    names = list(rows)
    unit = base["samples_per_second"] if base else 1.0
    values = [rows[name]["samples_per_second"] / unit for name in names]
    spread = np.abs(np.array([rows[name]["spread"] for name in names]).T / unit - values)
    figure = Figure(figsize=(7.2, 1.4 + 0.34 * len(names)), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["#2a788e" if name.startswith("ours") else "#999999" for name in names]
    bars = axes.barh(names, values, xerr=spread, color=colors, ecolor="#333333", capsize=2)
    axes.bar_label(bars, fmt="%.2f", padding=6, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    one = "bare forward pass" if report["base"] == "hf_forward" else report["base"]
    axes.set_xlabel(f"throughput, {one} = 1" if base else "samples per second")
    work, machine = report["workload"], report["machine"]
    axes.set_title(
        f"{work['samples']} prompts, {work['model']['n_layers']} layers, "
        f"{work['model']['dtype']}, batch {work['batch_size']}\n"
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads",
        loc="left",
        fontsize=9,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    write_bytes(stem.with_suffix(".png"), stream.getvalue())
