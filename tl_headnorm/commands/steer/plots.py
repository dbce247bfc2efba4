"""Pictures of a steering run: effects by boost, the profile of heads, answers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.ablate.plots import canvas, save
from tl_headnorm.plots.text import in_picture, on_page

CHOSEN, OTHERS, CLEAN = "#0072b2", "#999999", "#333333"
WAYS = ("#7f7f7f", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#d55e00")
PANELS = {
    "target_share": "answers that are\nthe option steered to",
    "answer_changed_share": "answers changed",
    "accuracy": "accuracy",
    "keyword_weight": "attention of the last\ntoken to the span",
    "kl": "KL from the clean\nanswers (nats)",
    "loss": "loss (nats)",
}
SHARES = ("target_share", "answer_changed_share", "accuracy", "keyword_weight")


def _panels(table: pd.DataFrame) -> list[str]:
    return [name for name in PANELS if not table[name].isna().all()]


def _boosts(table: pd.DataFrame) -> list[float]:
    return sorted(set(table.loc[table["set"] != "clean", "boost"]))


def boost_labels(boosts: Sequence[float]) -> list[str]:
    """Short: 10000 reads 1e4."""
    shown = [f"{b:.0e}" if b >= 1e4 and float(f"{b:.0e}") == b else f"{b:g}" for b in boosts]
    return [text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-") for text in shown]


def _band(rows: pd.DataFrame, boosts: Sequence[float], name: str) -> tuple[Any, Any, Any]:
    """(mean, lowest, highest) over the random sets, by boost."""
    grid = rows.pivot(index="boost", columns="set", values=name).loc[list(boosts)].to_numpy()
    return grid.mean(1), grid.min(1), grid.max(1)


def save_sweep(table: pd.DataFrame, stem: Path, title: str) -> None:
    """Every effect by boost: the chosen heads, the random sets' mean and range, the clean run."""
    from plotly.subplots import make_subplots

    names, boosts = _panels(table), _boosts(table)
    labels, at = boost_labels(boosts), list(range(len(boosts)))
    clean = table.iloc[0]
    chosen = table[(table["set"] != "clean") & ~table["set"].str.startswith("random ")]
    chosen = chosen.set_index("boost").loc[boosts]
    others = table[table["set"].str.startswith("random ")]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    page = make_subplots(
        rows, columns, subplot_titles=[PANELS[n].replace("\n", " ") for n in names],
        vertical_spacing=0.28 / rows, horizontal_spacing=0.1,
    )  # fmt: skip
    picture = canvas(1.2 + 2.9 * columns, 0.9 + 2.3 * rows)
    for i, name in enumerate(names):
        where = {"row": i // columns + 1, "col": i % columns + 1}
        axes = picture.add_subplot(rows, columns, i + 1)
        values, low, high = chosen[name], None, None
        if name == "target_share":
            low, high = chosen["target_share_low"], chosen["target_share_high"]
        _draw(axes, page, where, labels, values, low, high, i == 0)
        if len(others):
            mean, least, most = _band(others, boosts, name)
            n_sets = others["set"].nunique()
            _draw_others(axes, page, where, labels, (mean, least, most), n_sets, i == 0)
        axes.axhline(clean[name], color=CLEAN, lw=0.9, ls=":", label="clean")
        page.add_scatter(
            x=labels, y=[clean[name]] * len(at), name="clean", mode="lines", legendgroup="clean",
            line={"color": CLEAN, "dash": "dot", "width": 1.2}, showlegend=i == 0, **where,
        )  # fmt: skip
        axes.set_xticks(at, labels, fontsize=7, rotation=35 if len(at) > 6 else 0)
        axes.set_title(PANELS[name], fontsize=8.5, loc="left")
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if name in SHARES:
            axes.set_ylim(-0.03, 1.03)
            page.update_yaxes(range=[-0.03, 1.03], **where)
        page.update_xaxes(type="category", title="boost", **where)
        axes.set_xlabel("boost", fontsize=8)
    handles, texts = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, texts, fontsize=7.5, frameon=False, loc="outside lower left", ncols=3)
    picture.suptitle(in_picture(title), fontsize=9.5, x=0.01, ha="left")
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", height=150 + 290 * rows,
        width=200 + 370 * columns, legend={"orientation": "h", "y": -0.16 / rows},
        margin={"t": 110},
    )  # fmt: skip
    save(page, picture, stem)


def _draw(
    axes: Any, page: Any, where: Mapping[str, int], labels: Sequence[str], values: pd.Series,
    low: pd.Series | None, high: pd.Series | None, legend: bool,
) -> None:  # fmt: skip
    bars = {} if low is None or high is None else {
        "error_y": {"type": "data", "array": high - values, "arrayminus": values - low}
    }  # fmt: skip
    page.add_scatter(
        x=list(labels), y=values, name="chosen heads", legendgroup="chosen", showlegend=legend,
        line={"color": CHOSEN}, **bars, **where,
    )  # fmt: skip
    spread = None if low is None or high is None else [values - low, high - values]
    axes.errorbar(
        range(len(labels)), values, yerr=spread, color=CHOSEN, marker="o", ms=3.5, lw=1.5,
        capsize=2, label="chosen heads", zorder=3,
    )  # fmt: skip


def _draw_others(
    axes: Any, page: Any, where: Mapping[str, int], labels: Sequence[str],
    band: tuple[Any, Any, Any], n_sets: int, legend: bool,
) -> None:  # fmt: skip
    mean, least, most = band
    name = f"{n_sets} random sets of as many (mean, range)"
    at = range(len(labels))
    axes.plot(at, mean, color=OTHERS, lw=1.3, marker="s", ms=3, label=name)
    axes.fill_between(at, least, most, color=OTHERS, alpha=0.3, lw=0)
    page.add_scatter(
        x=list(labels), y=mean, name=name, legendgroup="random", showlegend=legend,
        line={"color": OTHERS}, **where,
        error_y={"type": "data", "array": most - mean, "arrayminus": mean - least},
    )  # fmt: skip


def save_profile(table: pd.DataFrame, offsets: pd.DataFrame, stem: Path, title: str) -> None:
    """Layers x heads: each head steered alone, and attention to the answer; that by offset."""
    from plotly.subplots import make_subplots

    title = f"{title} · circles: picked on the other half"
    names = (
        "steered alone: log p of the target\nadded (nats), held-out half",
        "attention of the last token: the answer's\noption less the others, held-out half",
        "the same, the layer's largest head,\nby tokens behind the option",
    )
    shape = (int(table["layer"].max()) + 1, int(table["head"].max()) + 1)
    page = make_subplots(
        1, 3, subplot_titles=[n.replace("\n", "<br>") for n in names], horizontal_spacing=0.11
    )
    picture = canvas(3 * max(3.6, 1.4 + 0.2 * shape[1]), max(2.7, 1.6 + 0.2 * shape[0]))
    axes = picture.subplots(1, 3)
    for i, column in enumerate(("effect_test", "attention_test")):
        _grid(page, picture, axes[i], i + 1, table[column].to_numpy().reshape(shape))
    _by_offset(page, axes[2], offsets)
    picked = table[table["picked"]]
    axes[0].scatter(
        picked["head"], picked["layer"], s=14, facecolors="none", edgecolors="black", lw=0.9
    )
    page.add_scatter(
        x=picked["head"], y=picked["layer"], mode="markers", name="picked", row=1, col=1,
        marker={"symbol": "circle-open", "color": "black", "size": 9}, showlegend=False,
    )  # fmt: skip
    for area, name in zip(axes, names, strict=True):
        area.set_title(name, fontsize=8, loc="left")
        area.tick_params(labelsize=7)
    picture.suptitle(in_picture(title), fontsize=9, x=0.01, ha="left")
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white",
        height=max(400, 230 + 24 * shape[0]), width=330 + 3 * max(310, 24 * shape[1]),
        margin={"t": 120}, legend={"title": {"text": "layer"}},
    )  # fmt: skip
    save(page, picture, stem)


def _grid(page: Any, picture: Any, axes: Any, column: int, grid: np.ndarray) -> None:
    """A signed map of layers x heads."""
    import plotly.graph_objects as go

    n_layers, n_heads = grid.shape
    most = float(np.abs(grid).max()) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xticks(range(0, n_heads, max(1, n_heads // 8)))
    axes.set_yticks(range(0, n_layers, max(1, n_layers // 16)))
    picture.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    page.add_trace(
        go.Heatmap(
            z=grid, zmin=-most, zmax=most, colorscale="RdBu_r", xgap=1, ygap=1,
            colorbar={"x": page.get_subplot(1, column).xaxis.domain[1] + 0.005, "thickness": 10},
            hovertemplate="layer %{y}, head %{x}: %{z:.4g}<extra></extra>",
        ), 1, column,
    )  # fmt: skip
    page.update_xaxes(title="head", row=1, col=column)
    page.update_yaxes(title="layer", autorange="reversed", row=1, col=column)


def _by_offset(page: Any, axes: Any, offsets: pd.DataFrame) -> None:
    """A line a layer, light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from matplotlib.ticker import MaxNLocator

    best = offsets.groupby(["layer", "offset"])["contrast"].max().unstack()
    for number, (layer, row) in enumerate(best.iterrows()):
        color = to_hex(colormaps["viridis_r"](0.1 + 0.9 * number / max(1, len(best) - 1)))
        x, y = list(row.index), row.to_numpy()
        axes.plot(x, y, color=color, lw=1.4, marker="o", ms=2.5, label=f"{layer}")
        page.add_scatter(x=x, y=y, name=f"{layer}", line={"color": color}, row=1, col=3)
    axes.set_xlabel("tokens behind the option", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    columns = -(-len(best) // 12)
    axes.legend(title="layer", fontsize=6.5, title_fontsize=7, frameon=False, ncols=columns)
    page.update_xaxes(title="tokens behind the option", row=1, col=3)


def save_hits(
    table: pd.DataFrame, answers: Sequence[Mapping[str, Any]], stem: Path, title: str
) -> None:
    """Hit rate and attention to the keywords by way, and that attention by new token."""
    from plotly.subplots import make_subplots

    names = (
        "hit rate (95 % interval)", "attention to the keywords",
        "the same, by new token (prompts as given)",
    )  # fmt: skip
    rows = table[table["prompt"] == "all"]
    ways = list(dict.fromkeys(rows["way"]))
    page = make_subplots(1, 3, subplot_titles=names)
    picture = canvas(11.5, 3.3)
    left, right, steps = picture.subplots(1, 3)
    kinds = [kind for kind in (False, True) if (rows["distracted"] == kind).any()]
    thick = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        part = rows[rows["distracted"] == kind].set_index("way").loc[ways]
        name, color = ("with the distracting text", "#d55e00") if kind else ("as given", CHOSEN)
        at = np.arange(len(ways)) + (i - (len(kinds) - 1) / 2) * thick
        spread = [part["hit_rate"] - part["hit_low"], part["hit_high"] - part["hit_rate"]]
        left.bar(at, part["hit_rate"], thick * 0.94, color=color, label=name)
        left.errorbar(at, part["hit_rate"], yerr=spread, fmt="none", ecolor=CLEAN, capsize=2, lw=1)
        right.bar(at, part["keyword_weight"], thick * 0.94, color=color)
        error = {"type": "data", "array": spread[1], "arrayminus": spread[0]}
        page.add_bar(x=ways, y=part["hit_rate"], error_y=error, name=name, marker_color=color,
                     row=1, col=1)  # fmt: skip
        page.add_bar(x=ways, y=part["keyword_weight"], marker_color=color, showlegend=False,
                     name=name, row=1, col=2)  # fmt: skip
    _by_token(page, steps, answers, ways)
    for axes, label in zip((left, right, steps), names, strict=True):
        axes.set_title(label, fontsize=9, loc="left")
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (left, right):
        axes.set_xticks(range(len(ways)), ways, rotation=30, ha="right", fontsize=7.5)
    left.set_ylim(0, 1.03)
    if len(kinds) > 1:
        left.legend(fontsize=7, frameon=False)
    picture.suptitle(in_picture(title), fontsize=9.5, x=0.01, ha="left")
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", barmode="group",
        height=430, width=1300,
    )  # fmt: skip
    page.update_yaxes(range=[0, 1.03], row=1, col=1)
    save(page, picture, stem)


def _by_token(
    page: Any, axes: Any, answers: Sequence[Mapping[str, Any]], ways: Sequence[str]
) -> None:
    """A line a way: the mean over the answers that reach so far."""
    for way, color in zip(ways, (WAYS * len(ways))[: len(ways)], strict=True):
        found = [a["weights"] for a in answers if a["way"] == way and not a["distracted"]]
        width = max(map(len, found), default=0)
        grid = np.full((len(found), width), np.nan)
        for row, weights in enumerate(found):
            grid[row, : len(weights)] = weights
        mean = [float(np.nanmean(column)) for column in grid.T]
        at = list(range(1, width + 1))
        axes.plot(at, mean, color=color, lw=1.3, label=way)
        page.add_scatter(x=at, y=mean, name=way, line={"color": color}, row=1, col=3)
    axes.set_xlabel("new token", fontsize=8)
    axes.legend(fontsize=6.5, frameon=False)
    page.update_xaxes(title="new token", row=1, col=3)
