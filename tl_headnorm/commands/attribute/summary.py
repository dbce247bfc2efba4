"""summary.md: what an attribution run says, in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.attribute.attribute import importance, over_tolerance


def summary(
    run: xr.Dataset,
    *,
    stability: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    groups: Mapping[str, pd.DataFrame],
    ranks: pd.DataFrame | None,
) -> str:
    """The whole page."""
    parts = [_head(run), _methods(run)]
    if stability:
        parts.append(stability_section(stability))
    if validation is not None:
        parts.append(_validation(validation))
    if ranks is not None:
        parts.append("## Rank correlation (Spearman)\n\n" + _square(ranks))
    if groups:
        parts.append(_groups(groups, run.attrs["settings"]["fdr"]))
    return "\n\n".join(parts) + "\n"


def table(rows: pd.DataFrame) -> str:
    """A Markdown table."""
    head = [str(column) for column in rows.columns]
    lines = [head, ["---"] * len(head), *([_cell(v) for v in row] for row in rows.to_numpy())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _square(ranks: pd.DataFrame) -> str:
    return table(ranks.round(3).reset_index(names=""))


def _head(run: xr.Dataset) -> str:
    meta = run.attrs
    what = {
        "letter": "-log p(right letter among the options' letters)",
        "text": "-log p(answer text)",
        "lm": "mean -log p per token",
    }[meta["loss"]]
    return (
        f"# Head attribution: {meta['model']['source']}\n\n"
        f"{meta['num_processed']} samples, loss {what}, gates towards "
        f"{meta['settings']['baseline']}. Scores are shares of the loss: negative is useful, "
        "except for michel (a size) and atp_* (the estimated change when the head goes, positive "
        "is useful)."
    )


def _top(run: xr.Dataset, method: str, k: int = 5) -> str:
    usefulness = importance(run)[method]
    best = np.argsort(-usefulness.ravel(), kind="stable")[:k]
    return ", ".join(f"{i // usefulness.shape[1]}.{i % usefulness.shape[1]}" for i in best)


def _methods(run: xr.Dataset) -> str:
    rows = []
    for method in run["method"].values:
        found = run.attrs["completeness_error"][method] or {}
        rows.append(
            {
                "method": method,
                "most useful heads": _top(run, method),
                "completeness error: worst": found.get("worst_absolute", "no claim"),
                "mean": found.get("mean_absolute", ""),
                "relative: worst": found.get("worst_relative", ""),
                "relative: mean": found.get("mean_relative", ""),
                "promised": "yes" if found.get("promised") else "no",
                "most steps": found.get("steps_most", 1),
            }
        )
    text = "## Methods\n\n" + (table(pd.DataFrame(rows)) if rows else "No per-head method ran.")
    settings = run.attrs["settings"]
    for method, n in over_tolerance(run, settings["tolerance"]).items():
        text += (
            f"\n\n**Warning:** {method} misses its sum by more than {settings['tolerance']:g} of "
            f"the larger end loss on {n} of {run.sizes['sample']} samples after up to "
            f"{settings['max_steps']} steps; their scores are approximate."
        )
    return text + (
        "\n\nRelative errors are divided by the larger of the two end losses. Methods that promise "
        "no sum are listed with what they miss."
    )


def stability_section(reports: Mapping[str, Any]) -> str:
    """Correlations between samples against what their mean predicts, and the verdicts."""
    rows = [
        {
            "method": name,
            "Pearson": r["mean_correlation"]["pearson"],
            "95 %": "{:.3f} to {:.3f}".format(*r["mean_correlation_interval"]),
            "Spearman": r["mean_correlation"]["spearman"],
            "cosine": r["mean_correlation"]["cosine"],
            "pooled ρ": r["pooled_correlation"],
            "95 % ": "{:.3f} to {:.3f}".format(*r["pooled_correlation_interval"]),
            "1 against N": r["one_against_n"],
            "worst gap to prediction": max(
                abs(row["pooled"] - row["pooled_predicted"]) for row in r["growth"]
            ),
            f"top {r['top_k']['k']} overlap": r["top_k"]["overlap"],
            "by chance": r["top_k"]["by_chance"],
        }
        for name, r in reports.items()
    ]
    words = "\n".join(f"- {name}: {r['verdict']}" for name, r in reports.items())
    return (
        "## Stability over samples\n\n" + table(pd.DataFrame(rows)) + "\n\nPooled ρ is the mean "
        "covariance of two samples' maps over the mean variance of one; it predicts "
        "sqrt(ρ + (1-ρ)/N) between one sample and the mean of N, all heads of all samples taken as "
        "one cloud of points: exactly for all the samples, for fewer up to the worst gap. A high "
        "value there says that samples share a mean map, not that one "
        "sample is enough. Where samples differ in size, the mean Pearson correlation is another "
        "number and predicts this for maps scaled to one size only.\n\n" + words
    )


def _validation(found: Mapping[str, Any]) -> str:
    areas = found["areas"]
    least = areas[areas["order"].isin(["least_first", "random"])]
    most = areas[areas["order"].isin(["most_first", "random"])]
    floor = areas[areas["order"] == "random"].iloc[0]
    better = {
        "least important first": least["method"][least["accuracy_low"] > floor["accuracy_high"]],
        "most important first": most["method"][most["accuracy_high"] < floor["accuracy_low"]],
    }
    text = (
        f"## Validation by pruning\n\nOrders from {found['n_ranking']} samples, measured on "
        f"{found['n_measuring']} others; area under the curve over the share of heads pruned, "
        "95 % bootstrap intervals.\n\nLeast important first (a good order keeps accuracy high):\n\n"
        + table(_sorted(least, ascending=False))
        + "\n\nMost important first (a good order loses it at once):\n\n"
        + table(_sorted(most, ascending=True))
    )
    words = [f"{order}: {', '.join(names) or 'none'}" for order, names in better.items()]
    text += f"\n\nBetter than random orders, intervals apart: {'; '.join(words)}."
    return text + _reference(least, most)


def _reference(least: pd.DataFrame, most: pd.DataFrame) -> str:
    """Whether sequential leave-one-out is ahead of every method, where it ran."""
    said = []
    for words, rows, high in (("least", least, "accuracy"), ("most", most, "loss")):
        for value in ("accuracy", "loss"):
            area = rows.set_index("method")[f"{value}_area"].drop("random")
            if "loo_greedy" not in area:
                return ""
            best = area.idxmax() if value == high else area.idxmin()
            place = "first" if best == "loo_greedy" else f"behind {best}"
            said.append(f"{words} important first, by {value}: {place}")
    return (
        "\n\nSequential leave-one-out (`loo_greedy`: each time the heads whose loss costs least, "
        f"or most, with those already off) is the reference: {'; '.join(said)}. Single "
        "leave-one-out cannot see heads that stand in for each other."
    )


def _sorted(areas: pd.DataFrame, *, ascending: bool) -> pd.DataFrame:
    rows = areas.sort_values("accuracy_area", ascending=ascending)
    return pd.DataFrame(
        {
            "method": rows["method"],
            "accuracy": rows["accuracy_area"],
            "95 %": [f"{a:.3f} to {b:.3f}" for a, b in zip(rows["accuracy_low"],
                     rows["accuracy_high"], strict=True)],
            "loss": rows["loss_area"],
            "95 % ": [f"{a:.3f} to {b:.3f}" for a, b in zip(rows["loss_low"], rows["loss_high"],
                      strict=True)],
        }
    )  # fmt: skip


def _groups(groups: Mapping[str, pd.DataFrame], fdr: float) -> str:
    lines = []
    for method, rows in groups.items():
        found = rows[rows["differs"]].sort_values("q")
        heads = ", ".join(f"{r.layer}.{r.head}" for r in found.itertuples()) or "none"
        lines.append(f"- {method}: {len(found)} of {len(rows)} heads differ: {heads}")
    return (
        f"## Groups\n\nPermutation test of each head's means, Benjamini-Hochberg at {fdr:g}:\n\n"
        + "\n".join(lines)
    )
