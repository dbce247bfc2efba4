"""Figures of a steering run: effects by boost, the profile of heads, hit rates. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.plots.colors import DARK, GREY, PALETTE
from tl_headnorm.plots.panel import Figure, Panel, Series, layers_by_heads, side_by_side

PANELS = {
    "target_share": "answers that are the option steered to",
    "answer_changed_share": "answers changed",
    "accuracy": "accuracy",
    "keyword_weight": "attention of the last token to the span",
    "kl": "KL from the clean answers (nats)",
    "loss": "loss (nats)",
}
SHARES = ("target_share", "answer_changed_share", "accuracy", "keyword_weight")


def boost_labels(boosts: Sequence[float]) -> list[str]:
    """Short: 10000 reads 1e4."""
    shown = [f"{b:.0e}" if b >= 1e4 and float(f"{b:.0e}") == b else f"{b:g}" for b in boosts]
    return [text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-") for text in shown]


def sweep(table: pd.DataFrame, title: str) -> Figure:
    """Every effect by boost: the chosen heads, the random sets' mean and range, the clean run."""
    boosts = sorted(set(table.loc[table["set"] != "clean", "boost"]))
    at, clean = np.arange(len(boosts)), table.iloc[0]
    random = table["set"].str.startswith("random ")
    chosen = table[(table["set"] != "clean") & ~random].set_index("boost").loc[boosts]
    panels = []
    for name in [name for name in PANELS if not table[name].isna().all()]:
        series = [
            Series("clean", [-0.2, len(at) - 0.8], [clean[name]] * 2, DARK, dash="dot"),
            Series("chosen heads", at, chosen[name], PALETTE[0], marker="o"),
        ]
        if name == "target_share":
            low, high = chosen["target_share_low"], chosen["target_share_high"]
            series[1] = replace(series[1], low=low, high=high)
        if random.any():
            grid = table[random].pivot(index="boost", columns="set", values=name)
            sets, values = f"random sets of as many ({grid.shape[1]})", grid.loc[boosts].to_numpy()
            series += [Series(f"{sets}, mean", at, values.mean(1), GREY, marker="s", size=3),
                       Series(f"{sets}, range", at, color=GREY, kind="band", low=values.min(1),
                              high=values.max(1))]  # fmt: skip
        panels.append(Panel(
            PANELS[name], "boost", series=series, x_ticks=dict(enumerate(boost_labels(boosts))),
            y_range=(-0.03, 1.03) if name in SHARES else None, size=(2.7, 2.1),
        ))  # fmt: skip
    return Figure("Boosted attention", panels, 3, title)


def profile(
    table: pd.DataFrame, offsets: pd.DataFrame, title: str, groups: int | None = None
) -> Figure:
    """Layers x heads: each head steered alone, and attention to the answer; that by offset."""
    shape = (int(table["layer"].max()) + 1, int(table["head"].max()) + 1)
    headings = {
        "effect_test": "steered alone: log p of the target added (nats), held-out half",
        "attention_test": "attention of the last token: the answer's option less the others, "
        "held-out half",
    }
    panels = [
        layers_by_heads(table[column].to_numpy().reshape(shape), heading, signed=True,
                        groups=groups)
        for column, heading in headings.items()
    ]  # fmt: skip
    picked = table[table["picked"]]
    circles = Series("picked on the other half", picked["head"], picked["layer"], "#000000",
                     "points", marker="o", size=6, hollow=True)  # fmt: skip
    panels[0] = replace(panels[0], series=[circles])
    by_offset = Panel(
        "the same, the layer's largest head, by tokens behind the option",
        "tokens behind the option", series=_by_offset(offsets), size=panels[0].size,
    )  # fmt: skip
    return Figure("Heads by themselves", [*panels, by_offset], 3, title)


def _by_offset(offsets: pd.DataFrame) -> list[Series]:
    """A line a layer, light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    best = offsets.groupby(["layer", "offset"])["contrast"].max().unstack()
    shades = np.linspace(0.1, 1, len(best))
    return [
        Series(f"layer {layer}", list(row.index), row.to_numpy(),
               to_hex(colormaps["viridis_r"](shade)), marker="o", size=3)
        for shade, (layer, row) in zip(shades, best.iterrows(), strict=True)
    ]  # fmt: skip


def hits(table: pd.DataFrame, answers: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Hit rate and attention to the keywords by way, and that attention by new token."""
    rows = table[table["prompt"] == "all"]
    ways = list(dict.fromkeys(rows["way"]))
    kinds = [kind for kind in (False, True) if (rows["distracted"] == kind).any()]
    rates, weights = [], []
    for i, kind in enumerate(kinds):
        part = rows[rows["distracted"] == kind].set_index("way").loc[ways]
        name, color = ("with the distracting text", GREY) if kind else ("as given", DARK)
        at, width = side_by_side(ways, ways, i, len(kinds)), 0.76 / len(kinds)
        rates.append(Series(name, at, part["hit_rate"], color, "bars", part["hit_low"],
                            part["hit_high"], width=width))  # fmt: skip
        weights.append(Series(name, at, part["keyword_weight"], color, "bars", width=width))
    ticks = dict(enumerate(ways))
    lines = [
        Series(way, np.arange(1, len(mean) + 1), mean, PALETTE[i % len(PALETTE)])
        for i, (way, mean) in enumerate(_by_token(answers, ways).items())
    ]
    panels = [
        Panel("hit rate (95 % interval)", series=rates, x_ticks=ticks, y_range=(0, 1.03)),
        Panel("attention to the keywords", series=weights, x_ticks=ticks),
        Panel("the same, by new token (prompts as given)", "new token", series=lines),
    ]
    return Figure("Answers with what was asked for", panels, 3, title)


def _by_token(answers: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> dict[str, np.ndarray]:
    """By way the mean over the answers that reach so far."""
    found = {}
    for way in ways:
        rows = [a["weights"] for a in answers if a["way"] == way and not a["distracted"]]
        found[way] = pd.DataFrame([list(row) for row in rows]).mean().to_numpy(np.float64)
    return found
