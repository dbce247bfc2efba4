"""The figure of the search for inactive heads: curves by mode, and every score's area. No torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.ablate.plots import canvas, save
from tl_headnorm.plots.text import in_picture, on_page

MODES = {"static": "static", "per_input": "per input, clean pass", "on_the_fly": "on the fly"}
MARKS = {
    "static": ("o", "circle"),
    "per_input": ("s", "square"),
    "on_the_fly": ("^", "triangle-up"),
}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # told apart by the colour-blind
GREY, RANDOM, MOST_NAMED, MOST_LISTED = "#777777", "random", 5, 40


def named_scores(ranking: pd.DataFrame, always: tuple[str, ...] = ()) -> list[str]:
    """The scores drawn in colour: the best few, and those asked for.

    Of scores that choose the same heads one is enough.
    """
    rows = ranking[ranking["ranked"] & (ranking["score"] != RANDOM)].drop_duplicates("score")
    asked = rows["score"].isin(always)
    alike = rows.duplicated(["mode", "method", "accuracy_area", "loss_area"])
    ranked = rows[asked | ~alike]["score"]
    must = [name for name in always if name in set(ranked)]
    return list(dict.fromkeys([*ranked[: MOST_NAMED - len(must)], *must]))[:MOST_NAMED]


def curve(table: pd.DataFrame, score: str, mode: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(share off, accuracy in points), from no head off on."""
    rows = table[(table.score == score) & (table["mode"] == mode) & (table.method == method)]
    clean = table[table.score == "clean"]["accuracy"].iloc[0]
    rows = rows.groupby("share")[["share_off", "accuracy"]].mean()
    return 100 * np.r_[0, rows["share_off"]], 100 * np.r_[clean, rows["accuracy"]]


def band(table: pd.DataFrame, mode: str, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(share off, lowest, highest accuracy) of the random choices."""
    kind = "static" if mode == "static" else "per_input"
    rows = table[(table.score == RANDOM) & (table["mode"] == kind) & (table.method == method)]
    clean = table[table.score == "clean"]["accuracy"].iloc[0]
    groups = rows.groupby("share")
    x, low, high = groups["share_off"].mean(), groups["accuracy"].min(), groups["accuracy"].max()
    return 100 * np.r_[0, x], 100 * np.r_[clean, low], 100 * np.r_[clean, high]


def save_figure(
    table: pd.DataFrame, ranking: pd.DataFrame, stem: Path, title: str, always: tuple[str, ...] = ()
) -> None:
    """`<stem>.html` and `<stem>.png`: accuracy against the share off, and areas with intervals.

    Of the replacements the one of the best choice is drawn; the table has all.
    """
    first = ranking[ranking["score"] != RANDOM].iloc[0]
    method = str(first["method"])
    modes = [m for m in MODES if ((table["mode"] == m) & (table["score"] != RANDOM)).any()]
    chosen = named_scores(ranking, always)
    shown = ranking[ranking["method"] == method]
    order = list(shown["score"].drop_duplicates())
    listed = order[:MOST_LISTED]
    title = f"{title} · {method} replacement"
    picture = _picture(table, shown, modes, method, chosen, listed, title)
    save(_page(table, shown, modes, method, chosen, listed, title), picture, stem)


def _picture(
    table: pd.DataFrame, shown: pd.DataFrame, modes: list[str], method: str,
    chosen: list[str], listed: list[str], title: str,
) -> Any:  # fmt: skip
    height = 3.4 + 0.17 * len(listed)
    figure = canvas(9.5, height + 1.0)
    grid = figure.add_gridspec(2, len(modes), height_ratios=[3.2, 0.4 + 0.17 * len(listed)])
    top = [figure.add_subplot(grid[0, i]) for i in range(len(modes))]
    for axes, mode in zip(top, modes, strict=True):
        x, low, high = band(table, mode, method)
        axes.fill_between(x, low, high, color="#dddddd", lw=0, label="random, lowest to highest")
        x, y = curve(table, RANDOM, "static" if mode == "static" else "per_input", method)
        axes.plot(x, y, color=GREY, ls="--", lw=1.2, label="random, mean")
        for color, score in zip(PALETTE, chosen, strict=False):
            x, y = curve(table, score, mode, method)
            if len(x) > 1:
                axes.plot(x, y, color=color, marker=".", ms=4, lw=1.4, label=score)
        axes.set_title(MODES[mode], fontsize=9)
        axes.set_xlabel("heads off (%)", fontsize=8)
        axes.set_ylim(0, 103)
        axes.set_xlim(-2, 102 * table["share"].max() + 2)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    top[0].set_ylabel("accuracy by letter (%)", fontsize=8)
    entries: dict[str, Any] = {}
    for axes in top:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=4, fontsize=7,
        frameon=False, title=in_picture(title), title_fontsize=9,
    )  # fmt: skip
    below = figure.add_subplot(grid[1, :])
    for step, mode in enumerate(modes):
        rows = shown[(shown["mode"] == mode) & shown["score"].isin(listed)]
        at = np.array([listed.index(s) for s in rows["score"]]) + 0.22 * (step - 1)
        value = rows["accuracy_area"].to_numpy()
        spread = np.abs(rows[["accuracy_area_low", "accuracy_area_high"]].to_numpy().T - value)
        below.errorbar(
            100 * value, at, xerr=100 * spread, fmt=MARKS[mode][0], ms=3.5, lw=0.8,
            color=PALETTE[step], label=MODES[mode],
        )  # fmt: skip
        loose = ~rows["ranked"].to_numpy()
        below.plot(
            100 * value[loose], at[loose], MARKS[mode][0], ms=3.5, color=PALETTE[step],
            mfc="white", zorder=5,
        )  # fmt: skip
    below.set_yticks(range(len(listed)), listed, fontsize=6.5)
    below.set_ylim(len(listed) - 0.4, -0.6)
    below.grid(axis="x", color="#eeeeee")
    below.tick_params(axis="x", labelsize=7)
    below.set_xlabel(
        "area: mean accuracy over the shares (%), with 95 % intervals (hollow: not ranked, other "
        "shares of heads went off)", fontsize=8,
    )  # fmt: skip
    below.spines[["top", "right"]].set_visible(False)
    below.legend(
        fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
    )
    return figure


def _page(
    table: pd.DataFrame, shown: pd.DataFrame, modes: list[str], method: str,
    chosen: list[str], listed: list[str], title: str,
) -> Any:  # fmt: skip
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    n = len(modes)
    page = make_subplots(
        2, n, specs=[[{}] * n, [{"colspan": n}, *[None] * (n - 1)]],
        subplot_titles=[MODES[m] for m in modes],
        row_heights=[380, 60 + 17 * len(listed)], vertical_spacing=0.09,
    )  # fmt: skip
    for i, mode in enumerate(modes, 1):
        x, low, high = band(table, mode, method)
        page.add_trace(
            go.Scatter(
                x=np.r_[x, x[::-1]], y=np.r_[low, high[::-1]], fill="toself", mode="lines",
                line={"width": 0}, fillcolor="rgba(128,128,128,0.25)", hoverinfo="skip",
                name="random, lowest to highest", legendgroup="random", showlegend=i == 1,
                legendrank=1,
            ), 1, i,
        )  # fmt: skip
        for score in dict.fromkeys([RANDOM, *table["score"]]):
            place = "per_input" if score == RANDOM and mode != "static" else mode
            x, y = curve(table, score, place, method)
            if len(x) < 2:
                continue
            named = score in chosen
            color = PALETTE[chosen.index(score)] if named else GREY
            page.add_trace(
                go.Scatter(
                    x=x, y=y, name=score, legendgroup=score, mode="lines+markers" if named else
                    "lines", line={"color": color, "dash": "dash" if score == RANDOM else "solid"},
                    visible=True if named or score == RANDOM else "legendonly",
                legendrank=2 if named or score == RANDOM else 1000,
                    showlegend=not any(t.name == score and t.showlegend for t in page.data),
                    hovertemplate="%{x:.1f} % off: %{y:.1f} %<extra>" + score + "</extra>",
                ), 1, i,
            )  # fmt: skip
        most = 102 * table["share"].max() + 2
        page.update_xaxes(title="heads off (%)", range=[-2, most], row=1, col=i)
        page.update_yaxes(range=[0, 103], row=1, col=i)
        rows = shown[(shown["mode"] == mode) & shown["score"].isin(listed)]
        value = 100 * rows["accuracy_area"]
        page.add_trace(
            go.Scatter(
                x=value, y=rows["score"], mode="markers", name=MODES[mode], legendrank=1,
                marker={
                    "color": PALETTE[i - 1],
                    "symbol": [MARKS[mode][1] if r else MARKS[mode][1] + "-open"
                               for r in rows["ranked"]],
                },
                error_x={
                    "array": 100 * rows["accuracy_area_high"] - value,
                    "arrayminus": value - 100 * rows["accuracy_area_low"], "thickness": 1,
                },
            ), 2, 1,
        )  # fmt: skip
    page.update_yaxes(title="accuracy by letter (%)", row=1, col=1)
    page.update_yaxes(
        categoryorder="array", categoryarray=listed[::-1], automargin=True, dtick=1, row=2, col=1
    )
    page.update_xaxes(title="area: mean accuracy over the shares (%)", row=2, col=1)
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", width=1250,
        height=640 + 17 * len(listed), legend={"font": {"size": 10}},
    )  # fmt: skip
    return page
