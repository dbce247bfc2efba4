"""summary.md of an ablation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.plots.templates import render

MOST_COSTLY = 5
MOST_SETS = 20  # rows of a table; the others are in ablation.parquet
LARGE_DROP = 0.2  # of accuracy


def summary(table: pd.DataFrame, meta: Mapping[str, Any], texts: xr.Dataset | None) -> str:
    """`table` is ablation.parquet with the clean run first, `texts` the ablation on the texts."""
    clean, rest = table.iloc[0], table.iloc[1:]
    answers = meta["accuracy"] is not None
    methods = {name: _method(rows, answers) for name, rows in rest.groupby("method", sort=False)}
    return render(
        "commands/ablate/summary.md.j2",
        source=Path(meta["model"]["source"]).name,
        answers=answers,
        clean=clean.to_dict(),
        methods=methods,
        reference=meta["reference"],
        perplexity=None if texts is None else _perplexity(texts),
        sharing=meta["sharing"],
    )


def _method(rows: pd.DataFrame, answers: bool) -> dict[str, Any]:
    """Single heads where there is more than one, and a table of the other sets."""
    column = "accuracy_drop" if answers else "loss_delta"
    single = rows[rows["head"] >= 0]
    single = single if len(single) > 1 else single.iloc[:0]
    costly = single[single[column] > 0].nlargest(MOST_COSTLY, column)
    sets = rows.drop(single.index)
    return {
        "n_single": len(single),
        "costly": costly.to_dict("records"),
        "large": int((single[column] > LARGE_DROP).sum()),
        "free": int((single[column] <= 0).sum()),
        "sets": _sets_table(sets.head(MOST_SETS), answers),
        "more_sets": max(0, len(sets) - MOST_SETS),
    }


def _sets_table(sets: pd.DataFrame, answers: bool) -> pd.DataFrame:
    """Effects of each set's removal; accuracy lost is negative."""
    text = pd.DataFrame({"removed": sets["set"]})
    if answers:
        text["accuracy"] = sets["accuracy"].map("{:.1%}".format)
        text["change, points"] = (0.0 - 100 * sets["accuracy_drop"]).map("{:+.3g}".format)
    text["change of loss, nats"] = sets["loss_delta"].map("{:+.3g}".format)
    text["KL"] = sets["kl"].map("{:.3g}".format)
    return text


def _perplexity(texts: xr.Dataset) -> dict[str, Any]:
    values = texts["perplexity"].values
    worst = int(np.nanargmax(values))
    return {
        "clean": float(values[0]),
        "highest": float(values[worst]),
        "set": str(texts["set"].values[worst]),
        "method": str(texts["method"].values[worst]),
    }
