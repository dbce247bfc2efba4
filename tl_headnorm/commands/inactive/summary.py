"""summary.md: which score wins here, how sure that is, and what else there is to know."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.inactive.curves import RANDOM
from tl_headnorm.commands.inactive.inactive import LEAVE_ONE_OUT, Found
from tl_headnorm.commands.inactive.ranking import Key, better_than_random, floor_of
from tl_headnorm.measures import MEASURES, uniform_first_attention

# The score that the published comparison found best, in this package's names.
PUBLISHED_BEST = "output_norm_all/layer"
MODES = {
    "static": "one set for all inputs",
    "per_input": "chosen per input by a clean pass",
    "on_the_fly": "scored and switched off in one pass",
}
NAMED = 12


def say_key(key: Key) -> str:
    """A choice in words."""
    score, mode, method = key
    return f"`{score}` ({MODES[mode]}, {method})"


def _interval(row: Mapping[Any, Any], name: str, digits: int = 3) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _row(table: pd.DataFrame, key: Key) -> dict[Any, Any]:
    chosen = (table["score"] == key[0]) & (table["mode"] == key[1]) & (table["method"] == key[2])
    return table[chosen].iloc[0].to_dict()


def summary(found: Found, meta: Mapping[str, Any]) -> str:
    """Plain sentences with the numbers in them."""
    lines = ["# Heads the model can do without", "", _setting(found, meta), ""]
    lines += [*_verdict(found, meta), "", *_table(found), "", *_by_mode(found), ""]
    lines += [*_correlations(found), "", *_notes(found, meta)]
    return "\n".join(lines) + "\n"


def _setting(found: Found, meta: Mapping[str, Any]) -> str:
    clean, shares = found.clean, meta["shares"]
    accuracy, loss = clean["correct"].mean(), clean["loss"].mean()
    return (
        f"{Path(meta['model']['source']).name} has {found.scores[0].mean.size} heads. "
        f"{len(found.split.calibration):,} questions rank them and set thresholds, "
        f"{len(found.split.held_out):,} others measure what is left with {shares[0]:.0%} to "
        f"{shares[-1]:.0%} of them off; with none off it answers {accuracy:.1%} of these by "
        f"letter, with a loss of {loss:.3f} nats. Area: mean accuracy from no head off to "
        f"{shares[-1]:.0%}; intervals are 95 %, over the measuring questions."
    )


def _verdict(found: Found, meta: Mapping[str, Any]) -> list[str]:
    verdict, table = found.verdict, found.ranking
    row, floor = _row(table, verdict.winner), _row(table, floor_of(verdict.winner))
    better = better_than_random(table)
    scores = better["score"].nunique()
    gain, low, high = verdict.over_random
    lines = [
        f"**{say_key(verdict.winner)} wins here**: area {_interval(row, 'accuracy_area')}, against "
        f"{_interval(floor, 'accuracy_area')} for heads at random, {gain:+.3f} ({low:+.3f} to "
        f"{high:+.3f}) with the same questions drawn for both. With it "
        f"{_interval(row, 'largest_share', 2)} of the heads go before accuracy falls by more than "
        f"{meta['points']:g} point{'s' * (meta['points'] != 1)}.",
        "",
        f"How sure: it beats the best other score, {say_key(verdict.runner_up)}, in "
        f"{verdict.beats_runner_up:.0%} of the draws, and chance in {verdict.beats_random:.0%}. "
        f"It was picked among {verdict.among} choices on the questions it is measured on, which "
        f"flatters it: the choice picked on every other question is number {verdict.stays} on "
        "the rest.",
        "",
        f"{scores} scores do better than chance in some mode with intervals that do not overlap."
        if scores
        else "No score does better than chance with intervals that do not overlap.",
    ]
    best = table[table["score"] == PUBLISHED_BEST]
    if len(best):
        first = best.iloc[0].to_dict()
        place = 1 + list(table["score"].drop_duplicates()).index(PUBLISHED_BEST)
        lines += [
            "",
            f"The score that Sandoval-Segura et al. (ICLR 2026) found best over 14 models, the "
            f"layer-normalised output norm (`{PUBLISHED_BEST}`), is number {place} of the scores "
            f"here: area {_interval(first, 'accuracy_area')}, {first['mode']}, {first['method']}.",
        ]
    return lines


def _table(found: Found) -> list[str]:
    """The best choice of each of the best scores, and the reference orders."""
    best = found.ranking.drop_duplicates("score")
    named = best.head(NAMED)
    extra = best[best["score"].isin([RANDOM, LEAVE_ONE_OUT]) & ~best["score"].isin(named["score"])]
    lines = [
        "| score | mode | replacement | area | largest share at no cost | loss area |",
        "|---|---|---|---|---|---|",
    ]
    for row in pd.concat([named, extra]).to_dict("records"):
        lines.append(
            f"| `{row['score']}` | {row['mode']} | {row['method']} | "
            f"{_interval(row, 'accuracy_area')} | {_interval(row, 'largest_share', 2)} | "
            f"{row['loss_area']:.3f} |"
        )
    lines += [
        "",
        "`/layer`: over the mean of the layer's heads on the sample; `>`: high is inactive.",
    ]
    return lines


def _by_mode(found: Found) -> list[str]:
    lines = ["The best score of each way:", ""]
    rest = found.ranking[(found.ranking["score"] != RANDOM) & found.ranking["ranked"]]
    for (mode, method), rows in rest.groupby(["mode", "method"], sort=False):
        row = rows.iloc[0].to_dict()
        lines.append(
            f"- {MODES[str(mode)]}, {method}: `{row['score']}`, {_interval(row, 'accuracy_area')}"
        )
    left_out = found.ranking[~found.ranking["ranked"]]
    if len(left_out):
        names = ", ".join(
            f"`{r['score']}` {r['mode']}" for r in left_out.head(6).to_dict("records")
        )
        lines.append(
            f"- not ranked, because far fewer or more heads went off than were to: {len(left_out)} "
            f"({names}{', ...' if len(left_out) > 6 else ''})"
        )
    return lines


def _correlations(found: Found) -> list[str]:
    """Which scores rank the heads alike."""
    matrix = found.correlations
    low = [str(name) for name in matrix if not str(name).endswith(">")]
    matrix = matrix.loc[low, low]
    names = [str(name) for name in matrix]
    values = matrix.to_numpy()
    i, j = (int(k) for k in np.unravel_index(np.nanargmin(values), values.shape))
    lines = [
        f"Rank correlations between the {len(names)} orders are in rank_correlation.parquet; the "
        f"least alike are `{names[i]}` and `{names[j]}` ({values[i, j]:+.2f})."
    ]
    if LEAVE_ONE_OUT in names:
        near = matrix[LEAVE_ONE_OUT].drop(LEAVE_ONE_OUT).sort_values(ascending=False)
        lines.append(
            f"Nearest to leave-one-out are `{near.index[0]}` ({near.iloc[0]:+.2f}) and "
            f"`{near.index[1]}` ({near.iloc[1]:+.2f})."
        )
    return lines


def _notes(found: Found, meta: Mapping[str, Any]) -> list[str]:
    notes = [
        "Thresholds are quantiles of the ranking questions, so a share is met on average, not on "
        "every input; on the fly, heads switched off change the scores of later layers.",
        "Scores that look at the answer (`direct_logit`, leave-one-out, attributions) rank heads "
        "for all inputs but never choose per input.",
    ]
    firsts = [s for s in found.scores if s.name == "attention_first"]
    if firsts:
        baseline = uniform_first_attention(round(meta["mean_tokens"]))
        top = float(firsts[0].mean.max())
        notes.append(
            f"{MEASURES['attention_first'].formula} of a head that attends alike to all is "
            f"{baseline:.3f} at {meta['mean_tokens']:.0f} tokens; the largest here is {top:.3f}."
        )
    notes += meta["notes"]
    notes.append(
        "A head that can go here does nothing that these questions ask for; it may do much "
        "elsewhere."
    )
    return notes
