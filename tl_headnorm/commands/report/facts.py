"""What the page says in words: the facts of a run, what to mind, where it came from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.run.files import plain
from tl_headnorm.stats import wilson

# Largest relative difference to Hugging Face that the data type's own rounding explains.
ROUNDING = {"fp64": 1e-5, "fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2}


def part(meta: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A dictionary in the record, empty where there is none."""
    found = meta.get(name)
    return found if isinstance(found, Mapping) else {}


def measures_of(run: xr.Dataset) -> list[str]:
    """The names X for which the run holds X_mean [layer, head]."""
    names = [str(name) for name in run.data_vars if str(name).endswith("_mean")]
    return [n.removesuffix("_mean") for n in names if run[n].dims == ("layer", "head")]


def chance(meta: Mapping[str, Any], n_options: Sequence[int] | None) -> tuple[float, float]:
    """Accuracy of guessing: exact where the questions are known, else bounds by the settings."""
    if n_options:
        exact = float(np.mean([1 / n for n in n_options]))
        return exact, exact
    allowed = part(meta, "settings").get("n_options") or [4, 5]
    return 1 / max(allowed), 1 / min(allowed)


def percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def accuracy_facts(
    run: xr.Dataset, n_options: Sequence[int] | None
) -> dict[str, Any] | None:  # fmt: skip
    """Accuracy with its interval and chance; None where answers were not scored."""
    if run.attrs.get("accuracy") is None or "correct" not in run.coords:
        return None
    right, n = sum(map(bool, run["correct"].values)), run.sizes["sample"]
    low, high = wilson(right, n)
    least, most = chance(run.attrs, n_options)
    guess = percent(least) if least == most else f"{percent(least)} to {percent(most)}"
    return {
        "value": percent(right / n), "right": right, "n": n, "low": percent(low),
        "high": percent(high), "chance": guess, "near_chance": low <= most,
    }  # fmt: skip


def overview(run: xr.Dataset, accuracy: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(what, value, detail) of the strip at the top."""
    meta = run.attrs
    model, data = part(meta, "model"), part(meta, "dataset")
    n = meta.get("num_processed", run.sizes.get("sample", 0))
    heads = f"{run.sizes['layer']} × {run.sizes['head']}"
    rows = [
        ("Questions", f"{n:,}", f"{data.get('name', 'unknown')} {data.get('split') or ''}".strip()),
        ("Layers × heads", heads, f"d_head {model.get('d_head', '?')}, {model.get('dtype', '?')}"),
    ]
    if accuracy is None:
        rows.append(("Accuracy", "not scored", "score_answers was off"))
    else:
        spread = f"95 % interval {accuracy['low']} to {accuracy['high']}"
        text = f"by letter; {spread}; chance {accuracy['chance']}"
        rows.append(("Accuracy", accuracy["value"], text))
    worst = meta.get("validated_against_hf")
    if worst is None:
        rows.append(("Hugging Face", "not compared", "see below"))
    else:
        rows.append(("Hugging Face", f"{worst:.1e}", "worst relative difference"))
    return rows


def warnings_of(run: xr.Dataset, accuracy: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before trusting a figure, most serious first."""
    meta = run.attrs
    n = int(meta.get("num_processed", run.sizes.get("sample", 0)))
    worst, dtype = meta.get("validated_against_hf"), part(meta, "model").get("dtype")
    found = []
    if meta.get("missing_layers"):
        layers = ", ".join(map(str, meta["missing_layers"]))
        found.append(f"No values for layers {layers}: their hook did not fire. They are grey.")
    if worst is not None and worst > ROUNDING.get(str(dtype), 1e-4):
        found.append(
            f"Hugging Face disagrees: the worst relative difference is {worst:.1e}, more than "
            f"{dtype} rounding explains."
        )
    if accuracy is None:
        found.append("Answers were not scored, so nothing says whether the model can do the task.")
    elif accuracy["near_chance"]:
        found.append(
            f"Accuracy ({accuracy['value']}, 95 % interval from {accuracy['low']}) is not clearly "
            f"above chance ({accuracy['chance']}): the heads may have been measured on a task that "
            "the model cannot do."
        )
    if meta.get("num_truncated"):
        found.append(
            f"{meta['num_truncated']:,} of {n:,} prompts were longer than allowed and lost their "
            "beginning."
        )
    skipped = {k: v for k, v in part(meta, "num_skipped").items() if v}
    if skipped:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in skipped.items())
        found.append(f"{sum(skipped.values()):,} records were skipped: {reasons}.")
    if n < 30:
        found.append(
            f"Only {n} sample{'s' if n != 1 else ''}: means and spreads are rough"
            + (", and one sample has no spread." if n == 1 else ".")
        )
    if meta.get("token_agg") == "all" and not meta.get("exclude_first_token"):
        found.append(
            "The mean over tokens includes the first one, where attention sinks sit "
            "(exclude_first_token leaves it out)."
        )
    if worst is None:
        found.append(
            "Not compared with Hugging Face in this run; validate_samples, or the command "
            "validate, does that."
        )
    return found


def provenance(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything that says how the numbers came about."""
    rows: list[tuple[str, str]] = []
    for name, value in meta.items():
        if name in ("settings", "answer_tokens"):
            continue
        if isinstance(value, Mapping):
            rows += [(f"{name}.{key}", _text(inner)) for key, inner in value.items()]
        else:
            rows.append((name, _text(value)))
    tokens = part(meta, "answer_tokens")
    if tokens:
        said = [f"{a} = {part(tokens, a).get('token')!r}" for a in tokens]
        rows.append(("answer_tokens", ", ".join(said)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return json.dumps(plain(value), ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    return str(value) if value != "" else "none"


def title_of(meta: Mapping[str, Any]) -> str:
    """Model and data in a few words."""
    source = str(part(meta, "model").get("source", "a model"))
    name = source if source.startswith("builtin:") else Path(source).name or source
    data = part(meta, "dataset").get("name", "its questions")
    return f"{name} on {data}"


def where(meta: Mapping[str, Any]) -> str:
    """At which tokens the heads were measured."""
    if meta.get("token_agg") == "all":
        first = " but the first" if meta.get("exclude_first_token") else ""
        return f"averaged over every token{first} of each prompt"
    return "at the last token of each prompt"
