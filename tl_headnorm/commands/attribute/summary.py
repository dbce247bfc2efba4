"""summary.md of an attribution."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.attribute.attribute import importance, over_tolerance
from tl_headnorm.plots.templates import interval, render

LOSSES = {
    "letter": "-log p(right letter among the options' letters)",
    "text": "-log p(answer text)",
    "lm": "mean -log p per token",
}
MOST_USEFUL = 5


def summary(
    run: xr.Dataset,
    *,
    stability: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    groups: Mapping[str, pd.DataFrame],
    ranks: pd.DataFrame | None,
) -> str:
    """Methods, and stability, validation, rank correlation and groups where they were asked for."""
    settings = run.attrs["settings"]
    return render(
        "commands/attribute/summary.md.j2",
        meta=run.attrs,
        settings=settings,
        loss=LOSSES[run.attrs["loss"]],
        methods=_methods(run),
        over=over_tolerance(run, settings["tolerance"]),
        n_samples=run.sizes["sample"],
        stability=stability,
        stability_table=_stability(stability),
        validation=None if validation is None else _validation(validation),
        ranks=None if ranks is None else ranks.round(3).reset_index(names=""),
        groups={name: rows[rows["differs"]].sort_values("q") for name, rows in groups.items()},
        n_heads={name: len(rows) for name, rows in groups.items()},
    )


def stability_section(reports: Mapping[str, Any]) -> str:
    """The section on stability alone, for a report made of finished runs."""
    return render(
        "commands/attribute/stability.md.j2", stability=reports, stability_table=_stability(reports)
    )


def _methods(run: xr.Dataset) -> pd.DataFrame:
    """A row per method: its most useful heads and its completeness error."""
    rows = []
    for method, scores in importance(run).items():
        found = run.attrs["completeness_error"][method] or {}
        best = np.argsort(-scores, axis=None, kind="stable")[:MOST_USEFUL]
        heads = zip(*np.unravel_index(best, scores.shape), strict=True)
        rows.append(
            {
                "method": method,
                "most useful heads": ", ".join(f"{layer}.{head}" for layer, head in heads),
                "completeness error: worst": found.get("worst_absolute", "no claim"),
                "mean": found.get("mean_absolute", ""),
                "relative: worst": found.get("worst_relative", ""),
                "relative: mean": found.get("mean_relative", ""),
                "promised": "yes" if found.get("promised") else "no",
                "most steps": found.get("steps_most", 1),
            }
        )
    return pd.DataFrame(rows)


def _stability(reports: Mapping[str, Any]) -> pd.DataFrame:
    """Correlations between samples, and the gap to what their mean predicts."""
    return pd.DataFrame(
        {
            "method": name,
            "Pearson": r["mean_correlation"]["pearson"],
            "95 %": interval(*r["mean_correlation_interval"]),
            "Spearman": r["mean_correlation"]["spearman"],
            "cosine": r["mean_correlation"]["cosine"],
            "pooled ρ": r["pooled_correlation"],
            "95 % ": interval(*r["pooled_correlation_interval"]),
            "1 against N": r["one_against_n"],
            "worst gap to prediction": max(
                abs(row["pooled"] - row["pooled_predicted"]) for row in r["growth"]
            ),
            f"top {r['top_k']['k']} overlap": r["top_k"]["overlap"],
            "by chance": r["top_k"]["by_chance"],
        }
        for name, r in reports.items()
    )


def _validation(found: Mapping[str, Any]) -> dict[str, Any]:
    """The areas of both orders, which methods beat random orders, and leave-one-out's place."""
    areas = found["areas"]
    least = areas[areas["order"].isin(["least_first", "random"])]
    most = areas[areas["order"].isin(["most_first", "random"])]
    floor = areas[areas["order"] == "random"].iloc[0]
    return {
        **found,
        "least": _areas(least, ascending=False),
        "most": _areas(most, ascending=True),
        "better": {
            "least important first": least["method"][
                least["accuracy_low"] > floor["accuracy_high"]
            ],
            "most important first": most["method"][most["accuracy_high"] < floor["accuracy_low"]],
        },
        "reference": _reference(least, most),
    }


def _areas(areas: pd.DataFrame, *, ascending: bool) -> pd.DataFrame:
    rows = areas.sort_values("accuracy_area", ascending=ascending)
    return pd.DataFrame(
        {
            "method": rows["method"],
            "accuracy": rows["accuracy_area"],
            "95 %": list(map(interval, rows["accuracy_low"], rows["accuracy_high"])),
            "loss": rows["loss_area"],
            "95 % ": list(map(interval, rows["loss_low"], rows["loss_high"])),
        }
    )


def _reference(least: pd.DataFrame, most: pd.DataFrame) -> dict[str, str]:
    """The method ahead by each area, in both orders; empty where loo_greedy did not run."""
    ahead = {}
    for words, rows, high in (("least", least, "accuracy"), ("most", most, "loss")):
        for value in ("accuracy", "loss"):
            area = rows.set_index("method")[f"{value}_area"].drop("random")
            if "loo_greedy" not in area:
                return {}
            best = area.idxmax() if value == high else area.idxmin()
            ahead[f"{words} important first, by {value}"] = str(best)
    return ahead
