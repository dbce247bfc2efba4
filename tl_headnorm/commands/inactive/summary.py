"""summary.md of inactive: which score ranks heads best here, and how sure that is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.inactive.curves import RANDOM
from tl_headnorm.commands.inactive.inactive import LEAVE_ONE_OUT, Found
from tl_headnorm.commands.inactive.ranking import Key, better_than_random, floor_of
from tl_headnorm.measures import MEASURES, uniform_first_attention
from tl_headnorm.plots.templates import fixed, interval, render

# The score that the published comparison found best, in this package's names.
PUBLISHED_BEST = "output_norm_all/layer"
MODES = {
    "static": "one set for all inputs",
    "per_input": "chosen per input by a clean pass",
    "on_the_fly": "scored and switched off in one pass",
}
NAMED = 12  # scores in the table
NOT_RANKED = 6  # named


def summary(found: Found, meta: Mapping[str, Any]) -> str:
    """The winner, the table of scores, the best of each mode, correlations and notes."""
    ranking, verdict = found.ranking, found.verdict
    return render(
        "commands/inactive/summary.md.j2",
        source=Path(meta["model"]["source"]).name,
        meta=meta,
        modes=MODES,
        n_heads=found.scores[0].mean.size,
        split=found.split,
        clean={name: found.clean[name].mean() for name in ("correct", "loss")},
        verdict=verdict,
        say_key=say_key,
        winner=_row(ranking, verdict.winner),
        floor=_row(ranking, floor_of(verdict.winner)),
        n_better=better_than_random(ranking)["score"].nunique(),
        published=_published(ranking),
        published_score=PUBLISHED_BEST,
        table=_table(ranking),
        best_of_mode=_best_of_mode(ranking),
        n_not_ranked=int((~ranking["ranked"]).sum()),
        not_ranked=ranking[~ranking["ranked"]].head(NOT_RANKED).to_dict("records"),
        correlations=_correlations(found.correlations),
        attention_first=_attention_first(found, meta),
        estimate=estimate,
    )


def say_key(key: Key) -> str:
    """A choice in words."""
    score, mode, method = key
    return f"`{score}` ({MODES[mode]}, {method})"


def estimate(row: Mapping[Any, Any], name: str, digits: int = 3) -> str:
    """A value with its interval: `0.812 (0.790 to 0.834)`."""
    ends = interval(row[f"{name}_low"], row[f"{name}_high"], digits)
    return f"{fixed(row[name], digits)} ({ends})"


def _row(table: pd.DataFrame, key: Key) -> dict[Any, Any]:
    wanted = (table["score"] == key[0]) & (table["mode"] == key[1]) & (table["method"] == key[2])
    return table[wanted].iloc[0].to_dict()


def _published(ranking: pd.DataFrame) -> dict[Any, Any] | None:
    """The best choice by the published score, and its place among the scores."""
    rows = ranking[ranking["score"] == PUBLISHED_BEST]
    if rows.empty:
        return None
    place = 1 + list(ranking["score"].drop_duplicates()).index(PUBLISHED_BEST)
    return rows.iloc[0].to_dict() | {"place": place}


def _table(ranking: pd.DataFrame) -> pd.DataFrame:
    """The best choice of each of the best scores, and the reference orders."""
    best = ranking.drop_duplicates("score")
    named = best.head(NAMED)
    extra = best[best["score"].isin([RANDOM, LEAVE_ONE_OUT]) & ~best["score"].isin(named["score"])]
    return pd.DataFrame(
        {
            "score": f"`{row['score']}`",
            "mode": row["mode"],
            "replacement": row["method"],
            "area": estimate(row, "accuracy_area"),
            "largest share at no cost": estimate(row, "largest_share", 2),
            "loss area": fixed(row["loss_area"]),
        }
        for row in pd.concat([named, extra]).to_dict("records")
    )


def _best_of_mode(ranking: pd.DataFrame) -> list[dict[Any, Any]]:
    """The best score of each mode and replacement."""
    ranked = ranking[(ranking["score"] != RANDOM) & ranking["ranked"]]
    return ranked.drop_duplicates(["mode", "method"]).to_dict("records")


def _correlations(matrix: pd.DataFrame) -> dict[str, Any]:
    """The two orders least alike, and the two nearest to leave-one-out."""
    low = [str(name) for name in matrix if not str(name).endswith(">")]
    matrix = matrix.loc[low, low]
    values = matrix.to_numpy()
    i, j = np.unravel_index(int(np.nanargmin(values)), values.shape)
    found: dict[str, Any] = {"n": len(low), "least": (low[i], low[j], values[i, j]), "nearest": []}
    if LEAVE_ONE_OUT in low:
        near = matrix[LEAVE_ONE_OUT].drop(LEAVE_ONE_OUT).sort_values(ascending=False)
        found["nearest"] = list(near.head(2).items())
    return found


def _attention_first(found: Found, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The largest attention to the first token, and a uniform head's."""
    scores = [s for s in found.scores if s.name == "attention_first"]
    if not scores:
        return None
    return {
        "formula": MEASURES["attention_first"].formula,
        "uniform": uniform_first_attention(round(meta["mean_tokens"])),
        "largest": float(scores[0].mean.max()),
    }
