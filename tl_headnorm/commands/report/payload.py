"""What the page's script reads: numbers of every head, samples, scores, and nothing it can run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from tl_headnorm.commands.report import facts
from tl_headnorm.commands.report.encoding import Packed, chosen_samples, pack
from tl_headnorm.commands.report.related_runs import Score, Study, scores_of, studies_beside
from tl_headnorm.commands.report.right_vs_wrong import Contrast, contrast
from tl_headnorm.data.questions import Question
from tl_headnorm.run.files import plain

MOST_TEXT = 2_500_000  # bytes of questions in a page; where they are more, long ones are cut


@dataclass(frozen=True)
class Texts:
    """The questions' texts in the order of the run's samples, or why they are not here."""

    questions: Sequence[Question | None] | None = None
    why_not: str = "the questions were not at hand"


@dataclass(frozen=True)
class Parts:
    """What a page is made of: of each measure, of the samples shown, of the studies beside."""

    names: list[str]
    held: list[str]  # those of the measures with values per sample
    shown: Int[np.ndarray, " shown"]
    packed: dict[str, Packed]
    contrasts: dict[str, Contrast]
    accuracy: dict[str, Any] | None
    studies: list[Study]
    cut: int | None  # length to which texts were cut
    payload: dict[str, Any]


def gather(run: xr.Dataset, path: Path, texts: Texts, most_bytes: int) -> Parts:
    """Everything but the words; per-sample values in `most_bytes` at most."""
    names = facts.measures_of(run)
    held = [name for name in names if name in run and run[name].dims[0] == "sample"]
    shape = (run.sizes["layer"], run.sizes["head"])
    n_samples, seed = run.sizes.get("sample", 0), int(run.attrs.get("seed") or 0)
    shown = chosen_samples(n_samples, shape[0] * shape[1], len(held), seed, most_bytes)
    n_options = [len(q.options) for q in texts.questions or () if q is not None]
    accuracy = facts.accuracy_facts(run, n_options or None)
    studies = studies_beside(path, run.attrs)
    samples, cut = _samples(run, shown, texts) if held else (None, None)
    contrasts = _contrasts(run, held, accuracy)
    whole = len(shown) == n_samples
    packed = {n: pack(run[n].values if whole else run[n].values[shown]) for n in held}
    payload = {
        "layers": shape[0],
        "heads": shape[1],
        "scored": accuracy is not None,
        "measures": [
            measure_words(run, n) | _blob(packed.get(n)) | _contrast(contrasts.get(n))
            for n in names
        ],
        "samples": samples,
        "scores": [_score(score) for score in scores_of(studies, shape)],
    }
    return Parts(names, held, shown, packed, contrasts, accuracy, studies, cut, payload)


def script_json(data: Any) -> str:
    """JSON that cannot end or open anything inside a <script> element."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Half a surrogate pair, which a JSON file may hold, is no UTF-8; its escape is JSON.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _numbers(values: Any) -> list[float | None]:
    """Seven digits: what float32 holds; None where there is no value."""
    flat = np.asarray(values, np.float64).ravel()
    return [float(f"{x:.7g}") if np.isfinite(x) else None for x in flat]


def measure_words(run: xr.Dataset, name: str) -> dict[str, Any]:
    """A measure's name, formula and unit, with every head's mean and spread."""
    mean = run[f"{name}_mean"]
    return {
        "name": name,
        "formula": mean.attrs.get("formula", name),
        "unit": mean.attrs.get("units", ""),
        "mean": _numbers(mean.values),
        "std": _numbers(run[f"{name}_std"].values) if f"{name}_std" in run else None,
    }


def _blob(packed: Any) -> dict[str, Any]:
    if packed is None:
        return {"stride": None}
    return {
        "stride": packed.stride,
        # All digits: the codes are fractions of the distance between these two.
        "low": [None if np.isnan(x) else float(x) for x in packed.low],
        "high": [None if np.isnan(x) else float(x) for x in packed.high],
    }


def _contrast(found: Contrast | None) -> dict[str, Any]:
    if found is None:
        return {"contrast": None}
    parts = {key: _numbers(getattr(found, key)) for key in ("difference", "stderr", "t")}
    return {"contrast": parts | {"threshold": found.threshold}}


def _score(score: Score) -> dict[str, Any]:
    return {
        "study": score.study,
        "name": score.name,
        "values": _numbers(score.values),
        "stderr": None if score.stderr is None else _numbers(score.stderr),
    }


def _samples(
    run: xr.Dataset, shown: np.ndarray, texts: Texts
) -> tuple[dict[str, Any], int | None]:  # fmt: skip
    """(what the explorer knows of each sample shown, length to which texts were cut or None)."""
    part = run.isel(sample=shown)
    found: dict[str, Any] = {
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
        return found, None
    asked = [texts.questions[i] for i in shown]
    most = _longest("".join(t for q in asked if q is not None for t in (q.stem, *q.options)), asked)
    found["text"] = [None if q is None else _short(q.stem, most and 3 * most) for q in asked]
    found["options"] = [None if q is None else [_short(o, most) for o in q.options] for q in asked]
    return found, most


def _longest(text: str, asked: Sequence[Any]) -> int | None:
    """Characters an option may have, a stem three times as many; None where all fit."""
    size = len(text.encode(errors="replace"))
    if size <= MOST_TEXT:
        return None
    return max(40, int(MOST_TEXT / (size / len(text)) / (8 * len(asked))))


def _short(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def _contrasts(
    run: xr.Dataset, held: Sequence[str], accuracy: Mapping[str, Any] | None
) -> dict[str, Contrast]:
    """By measure, over all samples of the run; nothing where a group is smaller than two."""
    if accuracy is None or min(accuracy["right"], accuracy["n"] - accuracy["right"]) < 2:
        return {}
    right = np.array([bool(x) for x in run["correct"].values])
    seed = int(run.attrs.get("seed") or 0)
    return {name: contrast(run[name].values, right, seed) for name in held}
