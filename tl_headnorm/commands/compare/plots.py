"""Figures of a comparison: interactive, and a PNG per measure. No torch."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.plots.text import in_picture
from tl_headnorm.run.files import write_bytes

DIVERGING = "RdBu_r"  # blue: less, red: more
MARK = "#d55e00"


def save(result: xr.Dataset, changed: Mapping[str, pd.DataFrame], folder: Path, fdr: float) -> None:
    """Write `<measure>_change.png` for every measure."""
    for name, rows in changed.items():
        write_bytes(folder / f"{name}_change.png", to_png(result, name, rows, fdr))


def _number(value: float, how: str) -> str:
    return "–" if np.isnan(value) else format(value, how)


def _limit(values: np.ndarray) -> float:
    """Half the width of a colour scale centred at 0."""
    real = values[np.isfinite(values)]
    return float(np.abs(real).max(initial=0.0)) or 1.0


def _hover(one: xr.Dataset) -> np.ndarray:
    """The text under the pointer, per head."""
    text = np.empty(one["t"].shape, dtype=object)
    for layer, head in np.ndindex(text.shape):
        v = {key: float(one[key].values[layer, head]) for key in one.data_vars}
        text[layer, head] = (
            f"layer {layer}, head {head}<br>no data"
            if np.isnan(v["difference"])
            else f"layer {layer}, head {head}<br>{v['mean_a']:.4g} → {v['mean_b']:.4g} "
            f"({v['difference']:+.3g})<br>log₂ ratio {_number(v['log2_ratio'], '+.3f')}<br>"
            f"effect {v['effect']:+.2f}, q {v['q']:.2g}<br>rank {v['rank_a']:g} → {v['rank_b']:g}"
        )
    return text


def _panels(result: xr.Dataset, name: str) -> list[tuple[str, str, np.ndarray]]:
    """(title, unit, values) of the maps; no ratio where no head has one."""
    one, text = result.sel(measure=name), result.attrs["measures"][name]
    maps = [("difference", text["units"], one["difference"].values)]
    if np.isfinite(one["log2_ratio"].values).any():
        maps.append(("log₂ ratio", "B / A", one["log2_ratio"].values))
    return maps


def _untold(one: xr.Dataset, fdr: float) -> tuple[np.ndarray, np.ndarray]:
    """(layers, heads) that cannot be told from no change; none where nothing changed at all."""
    if not bool((one["difference"] != 0).any()):
        return np.array([], int), np.array([], int)
    layer, head = np.nonzero((one["q"] > fdr).values)
    return layer, head


def to_figure(result: xr.Dataset, name: str, rows: pd.DataFrame, fdr: float) -> Any:
    """Difference, ratio, and before against after, as a plotly figure."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    one, maps = result.sel(measure=name), _panels(result, name)
    columns = len(maps) + 1
    figure = make_subplots(
        1, columns, subplot_titles=[*(f"{m[0]}, {m[1]}" for m in maps), "B against A"],
        horizontal_spacing=0.3 / columns,
    )  # fmt: skip
    layer, head = _untold(one, fdr)
    text = _hover(one)
    for i, (_, _, values) in enumerate(maps, 1):
        bound, right = _limit(values), figure.get_subplot(1, i).xaxis.domain[1]
        bar = {"x": right + 0.005, "thickness": 10}
        figure.add_trace(
            go.Heatmap(
                z=values, zmin=-bound, zmax=bound, zmid=0, colorscale=DIVERGING, colorbar=bar,
                text=text, hoverinfo="text", xgap=1, ygap=1,
            ),
            1, i,
        )  # fmt: skip
        dots = go.Scatter(
            x=head, y=layer, mode="markers", marker={"size": 3, "color": "#777777"},
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_trace(dots, 1, i)
        figure.update_xaxes(
            title_text="head", range=[-0.5, one.sizes["head"] - 0.5], showgrid=False,
            zeroline=False, row=1, col=i,
        )  # fmt: skip
        figure.update_yaxes(
            title_text="layer", range=[one.sizes["layer"] - 0.5, -0.5], showgrid=False,
            zeroline=False, row=1, col=i,
        )  # fmt: skip
    _scatter(go, figure, one, rows, text, columns)
    n_layers = one.sizes["layer"]
    figure.update_layout(
        template="plotly_white", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        width=400 * columns, height=int(np.clip(170 + 24 * n_layers, 360, 900)), showlegend=False,
        margin={"l": 60, "r": 20, "t": 50, "b": 55},
    )  # fmt: skip
    return figure


def _scatter(
    go: Any, figure: Any, one: xr.Dataset, rows: pd.DataFrame, text: np.ndarray, column: int
) -> None:
    """Every head's mean before and after; the line is no change; some movers have names."""
    a, b = one["mean_a"].values.ravel(), one["mean_b"].values.ravel()
    ends = _ends(a, b)
    line = {"color": "#999999", "width": 1}
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"), 1, column
    )
    points = {"size": 6, "color": "#4c78a8", "opacity": 0.75}
    figure.add_trace(
        go.Scatter(x=a, y=b, mode="markers", marker=points, text=text.ravel(), hoverinfo="text"),
        1, column,
    )  # fmt: skip
    named = _named(rows, ends)
    figure.add_trace(
        go.Scatter(
            x=named["mean_a"], y=named["mean_b"], mode="markers+text",
            text=[f"{r['layer']}.{r['head']}" for r in named.to_dict("records")],
            textposition="top center", hoverinfo="skip",
            marker={"size": 9, "color": MARK, "symbol": "circle-open"},
        ),
        1, column,
    )  # fmt: skip
    kind = "log" if ends[0] > 0 else "linear"
    figure.update_xaxes(title_text="mean in A", type=kind, zeroline=False, row=1, col=column)
    figure.update_yaxes(title_text="mean in B", type=kind, zeroline=False, row=1, col=column)


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


def to_png(result: xr.Dataset, name: str, rows: pd.DataFrame, fdr: float) -> bytes:
    """The same panels, drawn by matplotlib: no browser needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one, maps = result.sel(measure=name), _panels(result, name)
    n_layers, n_heads = one.sizes["layer"], one.sizes["head"]
    each, high = np.clip(2.6 + 0.1 * n_heads, 3.4, 6.5), np.clip(2.4 + 0.14 * n_layers, 3.2, 9)
    figure = Figure(
        figsize=(each * len(maps) + 3.4, high), layout="constrained", dpi=160
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(maps) + 1, width_ratios=[each] * len(maps) + [3.2])
    layer, head = _untold(one, fdr)
    for ax, (title, unit, values) in zip(axes, maps, strict=False):
        bound = _limit(values)
        image = ax.imshow(
            np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-bound, vmax=bound, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        ax.set_facecolor("#d0d0d0")
        ax.plot(head, layer, ".", color="#777777", ms=2.5)
        ax.set_title(f"{title}, {unit}", loc="left", fontsize=9)
        ax.set_xlabel("head", fontsize=8)
        ax.set_ylabel("layer", fontsize=8)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=ax).ax.tick_params(labelsize=7)
    _scatter_png(axes[-1], one, rows)
    for ax in axes:
        ax.tick_params(labelsize=7)
    a, b = result.attrs["names"]
    text = result.attrs["measures"][name]
    heading = f"{text['formula']}   A: {a}   B: {b}"
    figure.suptitle(in_picture(heading), x=0.01, ha="left", fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _scatter_png(ax: Any, one: xr.Dataset, rows: pd.DataFrame) -> None:
    a, b = one["mean_a"].values.ravel(), one["mean_b"].values.ravel()
    ends = _ends(a, b)
    ax.plot(ends, ends, color="#999999", lw=0.8)
    ax.scatter(a, b, s=9, color="#4c78a8", alpha=0.75, lw=0)
    named = _named(rows, ends)
    ax.scatter(named["mean_a"], named["mean_b"], s=32, facecolor="none", edgecolor=MARK, lw=1)
    for row in named.to_dict("records"):
        ax.annotate(
            f"{row['layer']}.{row['head']}", (row["mean_a"], row["mean_b"]), xytext=(3, 4),
            textcoords="offset points", fontsize=6.5,
        )  # fmt: skip
    if ends[0] > 0:
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_title("B against A", loc="left", fontsize=9)
    ax.set_xlabel("mean in A", fontsize=8)
    ax.set_ylabel("mean in B", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
