"""Pictures of a comparison: one page for the browser, and a PNG per measure. No torch."""

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.plots.text import in_picture
from tl_headnorm.run.files import write_bytes, write_text

DIVERGING = "RdBu_r"  # blue: less, red: more
MARK = "#d55e00"

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #57606a; --line: #d0d7de; --back: #fff;
  --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --faint: #9aa4af; --line: #3a424c;
  --back: #14181d; --warn: #3d3215; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1240px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p { margin: .3rem 0; max-width: 60rem; } .faint { color: var(--faint); }
.warn { background: var(--warn); padding: .35rem .7rem; border-radius: 5px; margin: .4rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td:first-child, th:first-child, .text td { text-align: left; }
.text td { max-width: 30rem; overflow-wrap: anywhere; vertical-align: top; }
@media print { body { max-width: none; } h2 { break-before: auto; } table { break-inside: avoid; } }
"""

# Plotly paints its own text: it follows the page's colours, also when they change.
_FOLLOW = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => {
  const text = getComputedStyle(document.body).color;
  const line = dark.matches ? "#3a424c" : "#d9dee3";
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": text};
    for (const n of ["", "2", "3"]) for (const side of ["x", "y"]) {
      change[`${side}axis${n}.linecolor`] = line;
      change[`${side}axis${n}.gridcolor`] = line;
    }
    Plotly.relayout(plot, change);
  }
};
dark.addEventListener("change", follow);
addEventListener("load", follow);
"""


def save(result: xr.Dataset, changed: Mapping[str, pd.DataFrame], folder: Path, fdr: float) -> None:
    """Write `compare.html`, and `<measure>_change.png` for every measure."""
    write_text(folder / "compare.html", page(result, changed, fdr))
    for name, rows in changed.items():
        write_bytes(folder / f"{name}_change.png", to_png(result, name, rows, fdr))


def page(result: xr.Dataset, changed: Mapping[str, pd.DataFrame], fdr: float) -> str:
    """One self-contained page; plotly is in it once."""
    a, b = result.attrs["names"]
    title = f"{b} compared to {a}"
    parts = [f"<h1>{html.escape(title)}</h1>", *_lead(result.attrs, fdr)]
    for number, (name, rows) in enumerate(changed.items()):
        text = result.attrs["measures"][name]
        parts.append(f"<h2>{html.escape(name)} <span class=faint>{text['formula']}</span></h2>")
        parts.append(f"<p>{html.escape(verdict(result, name, fdr))}</p>")
        figure = to_figure(result, name, rows, fdr)
        plot = figure.to_html(full_html=False, include_plotlyjs=number == 0)
        parts += [f"<div class=wide>{plot}</div>", _movers_table(rows)]
    parts += ["<h2>What the runs' records differ in</h2>", _record_table(result.attrs)]
    return (
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}<script>{_FOLLOW}</script></body></html>"
    )


def _lead(attrs: Mapping[str, Any], fdr: float) -> list[str]:
    """Samples, accuracy, cautions, and how to read what follows."""
    a, b = (html.escape(name) for name in attrs["names"])
    if attrs["paired"]:
        samples = f"{attrs['n_common']:,} samples in both runs, compared in pairs."
    else:
        samples = (
            f"{attrs['n_a']:,} and {attrs['n_b']:,} samples, not in pairs "
            f"({html.escape(attrs['why_unpaired'])})."
        )
    parts = [f"<p><b>A</b> {a} · <b>B</b> {b}</p>"]
    parts.append(f"<p>{samples}{_accuracy(attrs['accuracy'])}</p>")
    parts += [f"<p class=warn>{html.escape(caution)}.</p>" for caution in attrs["cautions"]]
    parts.append(
        f"<p class=faint>Differences are B minus A: red is more, blue is less, white is 0. A "
        f"dot marks a head that cannot be told from no change (q &gt; {fdr:g}, Benjamini-Hochberg "
        f"over the heads of a measure). Effect is Cohen's {html.escape(attrs['effect_is'])}. A "
        "changed head changes what all layers above it see, so not every head that changed is a "
        "cause.</p>"
    )
    return parts


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    text = f" Accuracy (letter): {found['a']:.1%} in A, {found['b']:.1%} in B"
    if "p" in found:
        text += (
            f"; {found['lost']} answers became wrong, {found['gained']} right (McNemar's exact p "
            f"{found['p']:.2g})"
        )
    return text + "."


def verdict(result: xr.Dataset, name: str, fdr: float) -> str:
    """How many heads changed by one measure, and by more than rounding, in a sentence or two."""
    one, text = result.sel(measure=name), result.attrs["measures"][name]
    changed = (one["q"] <= fdr) & (one["difference"] != 0)
    if not bool((one["difference"] != 0).any()):
        return f"No difference at all in {text['heads']} heads."
    large = int((changed & (abs(one["difference"]) > text["step"] * abs(one["mean_a"]))).sum())
    dtypes = " and ".join(dict.fromkeys(result.attrs["dtypes"]))
    found = (
        f"{int(changed.sum())} of {text['heads']} heads differ (q ≤ {fdr:g}), {large} of them by "
        f"more than a step of {dtypes} ({text['step']:.1g} of the value)."
    )
    if text["spearman"] is not None:
        found += f" The ranks agree with a Spearman ρ of {text['spearman']:.4f}."
    return found


def _movers_table(rows: pd.DataFrame) -> str:
    if not len(rows):
        return ""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("head", "mean in A", "in B", "difference", "log₂ ratio", "effect", "q",
                     "rank in A", "in B")
    )  # fmt: skip
    body = "".join(
        f"<tr><td>{row['layer']}.{row['head']}</td><td>{row['mean_a']:.4g}</td>"
        f"<td>{row['mean_b']:.4g}</td><td>{row['difference']:+.4g}</td>"
        f"<td>{_number(row['log2_ratio'], '+.3g')}</td><td>{row['effect']:+.2f}</td>"
        f"<td>{row['q']:.2g}</td><td>{row['rank_a']:g}</td><td>{row['rank_b']:g}</td></tr>"
        for row in rows.to_dict("records")
    )
    return (
        "<p class=faint>Heads that changed most (layer.head):</p>"
        f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
    )


def _number(value: float, how: str) -> str:
    return "–" if np.isnan(value) else format(value, how)


def _record_table(attrs: Mapping[str, Any]) -> str:
    if not attrs["differing"]:
        return "<p>Nothing.</p>"
    a, b = (html.escape(name) for name in attrs["names"])
    body = "".join(
        f"<tr><td>{html.escape(entry['key'])}</td><td>{_value(entry['a'])}</td>"
        f"<td>{_value(entry['b'])}</td></tr>"
        for entry in attrs["differing"]
    )
    return (
        f"<div class=wide><table class=text><tr><th></th><th>{a}</th><th>{b}</th></tr>"
        f"{body}</table></div>"
    )


def _value(value: Any) -> str:
    text = "–" if value is None else str(value)
    return html.escape(text if len(text) <= 120 else text[:117] + "...")


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
