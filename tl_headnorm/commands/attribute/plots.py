"""Pictures of an attribution run: panels drawn once for the browser, once as PNG. No torch."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.plots.heatmaps import tick_step
from tl_headnorm.plots.page import write_page
from tl_headnorm.plots.text import in_picture, on_page
from tl_headnorm.run.files import write_bytes

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#6a3d9a",
    "#17becf", "#7f7f00", "#b15928",
)  # fmt: skip
SIZES = (460, 360)


@dataclass(frozen=True)
class Series:
    """A line, or points, or bars."""

    name: str
    x: Any
    y: Any
    color: str
    dash: bool = False
    kind: str = "line"
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    """A matrix `z`, or series."""

    title: str
    x: str
    y: str
    z: np.ndarray | None = None
    signed: bool = True
    bound: float | None = None
    ticks: Sequence[str] | None = None
    series: Sequence[Series] = field(default_factory=tuple)
    own_legend: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        assert self.z is not None
        if self.bound is not None:
            return -self.bound, self.bound
        real = self.z[np.isfinite(self.z)]
        if not len(real):
            return 0.0, 1.0
        if not self.signed:
            return float(real.min()), float(real.max())
        most = float(np.abs(real).max()) or 1.0
        return -most, most


@dataclass(frozen=True)
class Section:
    """Panels that belong together: a PNG of their own, and a part of the page."""

    name: str
    title: str
    panels: Sequence[Panel]
    columns: int


def save(sections: Sequence[Section], folder: Path, stem: str) -> None:
    """Write `<stem>.html` with every section, and `<section>.png` for each."""
    write_page(folder / f"{stem}.html", f"Head {stem}", map(to_html, sections))
    for section in sections:
        write_bytes(folder / f"{section.name}.png", to_png(section))


def to_html(section: Section) -> Any:
    """The plotly figure of a section."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels, title = section.panels, section.title
    columns = min(section.columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows, columns, subplot_titles=[on_page(p.title) for p in panels],
        vertical_spacing=min(0.34 / rows, 0.3), horizontal_spacing=0.3 / columns,
    )  # fmt: skip
    seen: set[str] = set()
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        where = {"row": row + 1, "col": column + 1}
        if panel.z is not None:
            area = figure.get_subplot(row + 1, column + 1)
            right, low = area.xaxis.domain[1], area.yaxis.domain
            bar = {"len": low[1] - low[0], "y": sum(low) / 2, "x": right + 0.004, "thickness": 10}
            small, large = panel.limits
            figure.add_trace(
                go.Heatmap(
                    z=panel.z, zmin=small, zmax=large, colorbar=bar, x=panel.ticks, y=panel.ticks,
                    colorscale="RdBu_r" if panel.signed else "Viridis",
                    hovertemplate=f"{panel.y} %{{y}}, {panel.x} %{{x}}: %{{z:.4g}}<extra></extra>",
                ),
                **where,
            )  # fmt: skip
            figure.update_yaxes(autorange="reversed", **where)
            if panel.ticks is None:  # heads and layers are whole numbers
                high, wide = np.asarray(panel.z).shape
                figure.update_xaxes(tickmode="linear", tick0=0, dtick=tick_step(wide), **where)
                figure.update_yaxes(tickmode="linear", tick0=0, dtick=tick_step(high), **where)
        for s in panel.series:
            shown = s.legend and s.name not in seen
            seen.add(s.name)
            figure.add_trace(_trace(go, s, shown), **where)
        figure.update_xaxes(title_text=panel.x, **where)
        figure.update_yaxes(title_text=panel.y, **where)
    figure.update_layout(
        title={"text": on_page(title), "x": 0.01}, template="plotly_white",
        margin={"t": 90, "b": 60},
        width=columns * SIZES[0] + 160, height=rows * SIZES[1] + 120,
        legend={"x": 1.03, "y": 1},
    )  # fmt: skip
    return figure


def _trace(go: Any, s: Series, shown: bool) -> Any:
    common = {"x": list(s.x), "y": list(s.y), "name": on_page(s.name), "showlegend": shown,
              "legendgroup": s.name}  # fmt: skip
    if s.kind == "bar":
        return go.Bar(marker_color=s.color, **common)
    if s.kind == "points":
        return go.Scatter(mode="markers", marker={"color": s.color, "size": 4}, **common)
    line = {"color": s.color, "dash": "dash" if s.dash else "solid"}
    return go.Scatter(mode="lines", line=line, **common)


def to_png(section: Section) -> bytes:
    """The same panels, drawn by matplotlib: no browser needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels, title = section.panels, section.title
    columns = min(section.columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * SIZES[0] / 100, rows * SIZES[1] / 100 + 0.5)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(in_picture(title), x=0.01, ha="left", fontsize=11)
    handles: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(in_picture(panel.title), fontsize=9, loc="left")
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.tick_params(labelsize=7)
        if panel.z is not None:
            small, large = panel.limits
            image = axes.imshow(
                panel.z, aspect="auto", vmin=small, vmax=large, interpolation="nearest",
                cmap="RdBu_r" if panel.signed else "viridis",
            )  # fmt: skip
            figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if panel.ticks is not None:
                axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=45, ha="right")
                axes.set_yticks(range(len(panel.ticks)), panel.ticks)
        for s in panel.series:
            handle = _draw(axes, s)
            if s.legend and not panel.own_legend:
                handles.setdefault(in_picture(s.name), handle)
        if panel.own_legend:
            axes.legend([in_picture(s.name) for s in panel.series], fontsize=7, frameon=False)
        if panel.series:
            axes.spines[["top", "right"]].set_visible(False)
            if panel.series[0].kind == "bar":
                axes.tick_params(axis="x", rotation=90, labelsize=6)
    if handles:
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw(axes: Any, s: Series) -> Any:
    if s.kind == "bar":
        return axes.bar(list(s.x), s.y, color=s.color)
    if s.kind == "points":
        return axes.scatter(s.x, s.y, color=s.color, s=5, alpha=0.6)
    return axes.plot(s.x, s.y, color=s.color, ls="--" if s.dash else "-", lw=1.4)[0]


def of_maps(name: str, maps: Mapping[str, np.ndarray], title: str, *, shared: bool) -> Section:
    """Mean scores, a panel each; `shared`: all panels on one scale, so that they compare."""
    bound = None
    if shared:
        bound = max(float(np.nanmax(np.abs(m))) for m in maps.values()) or 1.0
    panels = [
        Panel(key, "head", "layer", z=value, signed=not key.startswith("michel"), bound=bound)
        for key, value in maps.items()
    ]
    return Section(name, title, panels, 3)


def of_stability(name: str, values: np.ndarray, report: Mapping[str, Any]) -> Section:
    """Correlation matrices, one sample against the mean, growth with N, heads by variance."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    maps = flat[:, np.isfinite(flat).all(0)]
    centred = maps - maps.mean(1, keepdims=True)
    maps, mean = maps[:300], centred.mean(0)
    some = centred[:20]
    ranked = report["variance_ranking"][:30]
    blue = PALETTE[0]
    n, r, rho = report["n_samples"], report["one_against_n"], report["mean_correlation"]["pearson"]
    panels = [
        Panel(f"samples' correlation, mean {rho:.3f}", "sample", "sample",
              z=_corrcoef(maps), bound=1.0),
        Panel("the same with the mean map removed", "sample", "sample",
              z=_corrcoef(maps - maps.mean(0)), bound=1.0),
        Panel(f"1 sample against {n}: r = {r:.3f}, predicted {report['predicted']:.3f}",
              f"mean of {n} samples, less its mean over heads", "one sample, likewise",
              series=[Series("one head of one sample", np.tile(mean, len(some)), some.ravel(),
                             blue, kind="points", legend=False)]),
        Panel("correlation of 1 sample with the mean of N", "N", "correlation",
              series=_growth(pd.DataFrame(report["growth"])), own_legend=True),
        Panel("heads by variance over samples", "layer.head", "variance", series=[
            Series("variance", [f"{h['layer']}.{h['head']}" for h in ranked],
                   [h["variance"] for h in ranked], blue, kind="bar", legend=False)]),
    ]  # fmt: skip
    return Section(f"stability_{name}", f"How stable is {name} over samples?", panels, 3)


def _growth(growth: pd.DataFrame) -> list[Series]:
    """Three ways to say how alike one sample and the mean are, each with its prediction dashed."""
    words = {
        "pooled": "all points",
        "mean_r": "mean r",
        "standardised": "standardised",
    }
    series = []
    for color, (key, label) in zip(PALETTE, words.items(), strict=False):
        series += [
            Series(label, growth["n"], growth[key], color),
            Series(f"{label}, predicted", growth["n"], growth[f"{key}_predicted"], color, True),
        ]
    return series


def _corrcoef(rows: np.ndarray) -> np.ndarray:
    if not np.any(rows.std(1) > 0):
        return np.full((len(rows), len(rows)), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.corrcoef(rows))


def of_pruning(curves: pd.DataFrame, title: str) -> Section:
    """Accuracy and loss against the number pruned, least and most important first."""
    panels = []
    methods = [m for m in dict.fromkeys(curves["method"]) if not m.startswith("random_")]
    chance = curves[curves["order"] == "random"]
    for value in ("accuracy", "loss"):
        for order in ("least_first", "most_first"):
            series = [
                Series("random orders", part["n_pruned"], part[value], "#bbbbbb")
                for _, part in chance.groupby("method")
            ]
            for i, method in enumerate(methods):
                part = curves[(curves["method"] == method) & (curves["order"] == order)]
                # The two references in black: exact removals, one at a time and in sequence.
                color = "#000000" if method.startswith("loo") else PALETTE[i % len(PALETTE)]
                series.append(
                    Series(method, part["n_pruned"], part[value], color, dash=method == "loo")
                )
            words = order.replace("_", " important ")
            panels.append(Panel(f"{value}, {words}", "heads pruned", value, series=series))
    return Section("pruning", title, panels, 2)


def of_ranks(table: pd.DataFrame) -> Section:
    """Rank correlation of every pair of methods."""
    panel = Panel("Spearman correlation of mean importance", "", "", z=table.to_numpy(),
                  bound=1.0, ticks=list(table.columns))  # fmt: skip
    return Section("rank_correlation", "Do the methods rank heads alike?", [panel], 1)
