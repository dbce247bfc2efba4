"""The data of the page's script: numbers of every head, samples, scores of related runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.report.encoding import Encoded
from tl_headnorm.commands.report.related_runs import Score
from tl_headnorm.commands.report.right_vs_wrong import Difference
from tl_headnorm.commands.report.texts import Texts
from tl_headnorm.data.questions import Question

MOST_TEXT = 2_500_000  # bytes of questions in a page; where they are more, long ones are cut


def numbers(values: Any) -> list[float | None]:
    """Seven digits: what float32 holds; None where there is no value."""
    flat = np.asarray(values, np.float64).ravel()
    return [float(f"{x:.7g}") if np.isfinite(x) else None for x in flat]


def measure(
    run: xr.Dataset, name: str, encoded: Encoded | None, difference: Difference | None
) -> dict[str, Any]:
    """A measure's formula and unit, every head's mean and std, and how its samples are encoded."""
    mean = run[f"{name}_mean"]
    found = {
        "name": name,
        "formula": mean.attrs.get("formula", name),
        "unit": mean.attrs.get("units", ""),
        "mean": numbers(mean.values),
        "std": numbers(run[f"{name}_std"].values) if f"{name}_std" in run else None,
        "stride": None,
        "difference": None,
    }
    if encoded is not None:
        # All digits: the codes are fractions of the distance between low and high.
        low, high = ([None if np.isnan(x) else float(x) for x in ends]
                     for ends in (encoded.low, encoded.high))  # fmt: skip
        found |= {"stride": encoded.stride, "low": low, "high": high}
    if difference is not None:
        parts = {key: numbers(getattr(difference, key)) for key in ("difference", "stderr", "t")}
        found["difference"] = parts | {"threshold": difference.threshold}
    return found


def score(found: Score) -> dict[str, Any]:
    """A related run's score of every head."""
    stderr = None if found.stderr is None else numbers(found.stderr)
    return {"study": found.study, "name": found.name, "values": numbers(found.values),
            "stderr": stderr}  # fmt: skip


def samples(run: xr.Dataset, shown: np.ndarray, texts: Texts) -> tuple[dict[str, Any], bool]:
    """(columns of the samples shown, whether texts were cut)."""
    part = run.isel(sample=shown)
    columns: dict[str, Any] = {
        "index": part["sample"].values,
        "id": [str(x) for x in part["sample_id"].values],
        "tokens": part["n_tokens"].values,
        "answer": [str(x) for x in part["answer_letter"].values],
        "predicted": list(part["predicted"].values),
        "correct": [None if x is None else int(bool(x)) for x in part["correct"].values],
        "text": None,
        "options": None,
    }
    if texts.questions is None:
        return columns, False
    asked = [texts.questions[i] for i in shown]
    most = _longest(asked)
    columns["text"] = [q and _short(q.stem, most and 3 * most) for q in asked]
    columns["options"] = [q and [_short(o, most) for o in q.options] for q in asked]
    return columns, most is not None


def _longest(asked: Sequence[Question | None]) -> int | None:
    """Characters an option may have, a stem three times as many; None where all fit."""
    text = "".join(t for q in asked if q is not None for t in (q.stem, *q.options))
    size = len(text.encode(errors="replace"))
    if size <= MOST_TEXT:
        return None
    return max(40, int(MOST_TEXT / (size / len(text)) / (8 * len(asked))))


def _short(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def ranked(part: Mapping[str, Any], n_heads: int, few: int) -> list[list[dict[str, Any]]]:
    """The heads with the largest and the smallest means; those without values left out."""
    mean = np.array(part["mean"], np.float64)
    order = np.argsort(-mean, kind="stable")
    std = part["std"] or [None] * len(mean)
    rows = [
        {"layer": i // n_heads, "head": i % n_heads, "rank": rank, "mean": mean[i], "std": std[i]}
        for rank, i in enumerate((int(i) for i in order if np.isfinite(mean[i])), start=1)
    ]
    few = min(few, -(-len(rows) // 2))
    return [rows[:few], rows[few:][-few:]]


def clearest(found: Difference, n_heads: int, few: int) -> list[dict[str, Any]]:
    """The heads whose difference is largest in standard errors."""
    order = np.argsort(-np.nan_to_num(np.abs(found.t)), kind="stable")[:few]
    return [
        {"layer": int(i) // n_heads, "head": int(i) % n_heads, "difference": found.difference[i],
         "stderr": found.stderr[i], "t": found.t[i]}
        for i in order
        if np.isfinite(found.t[i])
    ]  # fmt: skip
