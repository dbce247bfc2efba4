"""Figures of an ablation: every head's effect by method, and sets side by side. No torch."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.plots.page import write_page
from tl_headnorm.plots.text import in_picture, on_page
from tl_headnorm.run.files import write_bytes

LABELS = {
    "accuracy_drop": "accuracy lost (points)",
    "loss_delta": "loss added (nats)",
}
COLORS = "RdBu_r"


def canvas(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def save(page: Any, picture: Any, stem: Path) -> None:
    """`<stem>.html`, self-contained, of a plotly figure, and `<stem>.png` of a matplotlib one."""
    write_page(stem.with_suffix(".html"), stem.name.replace("_", " ").capitalize(), [page])
    write_bytes(stem.with_suffix(".png"), png(picture))


def _in_unit(table: pd.DataFrame, column: str) -> pd.Series:
    return table[column] * (100 if column == "accuracy_drop" else 1)


def sweep_grids(table: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """[layer, head] of the sets that are single heads, by method; NaN where there is none."""
    single = table[(table["head"] >= 0)]
    if single.empty:
        return {}
    shape = (int(single["layer"].max()) + 1, int(single["head"].max()) + 1)
    grids = {}
    for method, rows in single.groupby("method", sort=False):
        grid = np.full(shape, np.nan)
        grid[rows["layer"], rows["head"]] = _in_unit(rows, column)
        grids[str(method)] = grid
    return grids


def save_sweep(table: pd.DataFrame, column: str, stem: Path, title: str) -> bool:
    """Heatmaps of a single-head sweep, one per method on one scale; False where there is none."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    grids = sweep_grids(table, column)
    if not grids or all(np.isnan(grid).all() for grid in grids.values()):
        return False
    title = f"Each head removed by itself · {title}"
    n_layers, n_heads = next(iter(grids.values())).shape
    bound = max(float(np.nanmax(np.abs(grid))) for grid in grids.values()) or 1.0
    page = make_subplots(1, len(grids), subplot_titles=list(grids), shared_yaxes=True)
    width = max(4.6, 1.6 + 0.22 * n_heads)
    picture = canvas(width * len(grids) * 0.8 + 1.4, max(3.4, 1.8 + 0.22 * n_layers))
    axes = picture.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    for i, (method, grid) in enumerate(grids.items()):
        cells = go.Heatmap(
            z=grid, zmin=-bound, zmax=bound, colorscale=COLORS, showscale=i == 0, xgap=1, ygap=1,
            colorbar={"title": {"text": LABELS[column], "side": "right"}},
            hovertemplate="layer %{y}, head %{x}<br>%{z:.4g}<extra>" + method + "</extra>",
        )  # fmt: skip
        page.add_trace(cells, 1, i + 1)
        page.update_xaxes(title="head", row=1, col=i + 1)
        image = axes[i].imshow(
            grid, aspect="auto", cmap=COLORS, vmin=-bound, vmax=bound, interpolation="nearest"
        )
        axes[i].set_title(method, fontsize=10)
        axes[i].set_xlabel("head")
        axes[i].set_xticks(range(0, n_heads, max(1, n_heads // 8)))
        axes[i].set_yticks(range(0, n_layers, max(1, n_layers // 16)))
    axes[0].set_ylabel("layer")
    picture.colorbar(image, ax=axes).set_label(LABELS[column], fontsize=8)
    picture.suptitle(in_picture(title), fontsize=10, x=0.01, ha="left")
    page.update_yaxes(autorange="reversed", dtick=1 if n_layers <= 20 else 4)
    page.update_yaxes(title="layer", row=1, col=1)
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", plot_bgcolor="#d0d0d0",
        width=200 + len(grids) * max(320, 26 * n_heads), height=max(380, 190 + 26 * n_layers),
    )  # fmt: skip
    save(page, picture, stem)
    return True


def save_sets(table: pd.DataFrame, column: str, stem: Path, title: str) -> bool:
    """Bars of the sets that are no single head, a colour per method; False where there is none."""
    import plotly.graph_objects as go

    rows = table[(table["head"] < 0) & (table["set"] != "clean")]
    if rows.empty or rows[column].isna().all():
        return False
    title = f"Sets removed · {title}"
    names = list(dict.fromkeys(rows["set"]))
    methods = list(dict.fromkeys(rows["method"]))
    page = go.Figure()
    picture = canvas(8.0, 1.3 + 0.28 * len(names) * max(1, len(methods) * 0.6))
    axes = picture.add_subplot()
    thick = 0.8 / len(methods)
    for i, method in enumerate(methods):
        part = rows[rows["method"] == method]
        values = _in_unit(part, column)
        page.add_bar(y=part["set"], x=values, name=method, orientation="h")
        at = [names.index(name) + (i - (len(methods) - 1) / 2) * thick for name in part["set"]]
        bars = axes.barh(at, values, thick * 0.95, label=method)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.axvline(0, color="#333333", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(LABELS[column])
    axes.set_title(in_picture(title), fontsize=10, loc="left")
    if len(methods) > 1:
        axes.legend(fontsize=8, frameon=False)
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", barmode="group",
        height=max(360, 170 + 26 * len(names) * max(1, len(methods) // 2)), width=900,
    )  # fmt: skip
    page.update_yaxes(autorange="reversed", automargin=True)
    page.update_xaxes(title=LABELS[column])
    save(page, picture, stem)
    return True
