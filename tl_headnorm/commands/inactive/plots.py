"""The figure of the search for inactive heads: curves by mode, and every score's area. No torch."""

from itertools import product

import numpy as np
import pandas as pd

from tl_headnorm.plots.colors import GREY, PALETTE
from tl_headnorm.plots.panel import Figure, Panel, Series, side_by_side

MODES = {"static": "static", "per_input": "per input, clean pass", "on_the_fly": "on the fly"}
MARKS = {"static": "o", "per_input": "s", "on_the_fly": "^"}
RANDOM, MOST_NAMED, MOST_LISTED = "random", 5, 40


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


def figure(
    table: pd.DataFrame, ranking: pd.DataFrame, title: str, always: tuple[str, ...] = ()
) -> Figure:
    """Accuracy against the share off by mode, and areas with intervals.

    Of the replacements the one of the best choice is drawn; the table has all.
    """
    method = str(ranking[ranking["score"] != RANDOM].iloc[0]["method"])
    modes = [m for m in MODES if ((table["mode"] == m) & (table["score"] != RANDOM)).any()]
    named = named_scores(ranking, always)
    rows = table[(table["method"] == method) | (table["score"] == "clean")]
    panels = [curves(rows, mode, named) for mode in modes]
    shown = ranking[ranking["method"] == method]
    return Figure(f"Accuracy without the heads that a score calls inactive, {method} replacement",
                  [*panels, areas(shown, modes)], len(modes), title)  # fmt: skip


def curves(table: pd.DataFrame, mode: str, named: list[str]) -> Panel:
    """Accuracy by the share off for every score; those not named are hidden on the page."""
    clean = 100 * table[table["score"] == "clean"]["accuracy"].iloc[0]
    fixed = "static" if mode == "static" else "per_input"
    chance = table[(table["score"] == RANDOM) & (table["mode"] == fixed)].groupby("share")
    x = 100 * np.r_[0, chance["share_off"].mean()]
    low, mean, high = (
        np.r_[clean, 100 * value]
        for value in (chance["accuracy"].min(), chance["accuracy"].mean(), chance["accuracy"].max())
    )
    series = [Series("random, lowest to highest", x, color=GREY, kind="band", low=low, high=high),
              Series("random, mean", x, mean, GREY, dash="dash")]  # fmt: skip
    rows = table[(table["mode"] == mode) & (table["score"] != RANDOM)]
    others = [name for name in dict.fromkeys(rows["score"]) if name not in named]
    for name in [*named, *others]:
        part = rows[rows["score"] == name].groupby("share")[["share_off", "accuracy"]].mean()
        color = PALETTE[named.index(name)] if name in named else GREY
        if len(part):
            x, y = 100 * np.r_[0, part["share_off"]], np.r_[clean, 100 * part["accuracy"]]
            series.append(Series(name, x, y, color, marker="o", size=3, hidden=name in others))
    most = 102 * table["share"].max() + 2
    return Panel(MODES[mode], "heads off (%)", "accuracy by letter (%)", series=series,
                 x_range=(-2, float(most)), y_range=(0, 103), size=(2.9, 2.7))  # fmt: skip


def areas(ranking: pd.DataFrame, modes: list[str]) -> Panel:
    """Mean accuracy over the shares with its interval, a row per score and a mark per mode."""
    scores = list(ranking["score"].drop_duplicates())
    listed, series = scores[:MOST_LISTED], []
    for (i, mode), ranked in product(enumerate(modes), (True, False)):
        rows = ranking[(ranking["mode"] == mode) & ranking["score"].isin(listed)]
        rows = rows[rows["ranked"] == ranked]
        value, low, high = (
            100 * rows[f"accuracy_area{end}"].to_numpy() for end in ("", "_low", "_high")
        )
        at = side_by_side(rows["score"].tolist(), listed, i, len(modes))
        hover = [f"{name}\n{v:.1f} %" for name, v in zip(rows["score"], value, strict=True)]
        series.append(Series(MODES[mode], value, at, PALETTE[5 + i], "points", low, high,
                             marker=MARKS[mode], hollow=not ranked, hover=hover))  # fmt: skip
    cut = "" if len(listed) == len(scores) else f"the first {len(listed)} of {len(scores)} scores; "
    return Panel(
        f"{cut}bars: 95 % intervals; hollow: not ranked, other shares of heads went off",
        "area: mean accuracy over the shares (%)", series=series, horizontal=True,
        y_ticks=dict(enumerate(listed)), span=len(modes),
        size=(2.9 * len(modes), 0.5 + 0.2 * len(listed)),
    )  # fmt: skip
