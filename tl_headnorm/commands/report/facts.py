"""Facts and warnings about a run, from its record, for the page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.plots.templates import percent
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


def title_of(meta: Mapping[str, Any]) -> str:
    """Model and data in a few words."""
    source = str(part(meta, "model").get("source", "a model"))
    name = source if source.startswith("builtin:") else Path(source).name or source
    return f"{name} on {part(meta, 'dataset').get('name', 'its questions')}"


def chance(meta: Mapping[str, Any], n_options: Sequence[int] | None) -> tuple[float, float]:
    """Accuracy of guessing: exact where the questions are known, else bounds by the settings."""
    if n_options:
        exact = float(np.mean([1 / n for n in n_options]))
        return exact, exact
    allowed = part(meta, "settings").get("n_options") or [4, 5]
    return 1 / max(allowed), 1 / min(allowed)


def accuracy_of(run: xr.Dataset, n_options: Sequence[int] | None) -> dict[str, Any] | None:
    """Accuracy with its 95 % interval and chance; None where answers were not scored."""
    if run.attrs.get("accuracy") is None or "correct" not in run.coords:
        return None
    right, n = sum(map(bool, run["correct"].values)), run.sizes["sample"]
    low, high = wilson(right, n)
    least, most = chance(run.attrs, n_options)
    guess = percent(least) if least == most else f"{percent(least)} to {percent(most)}"
    return {"value": right / n, "right": right, "wrong": n - right, "low": low, "high": high,
            "chance": guess, "near_chance": low <= most}  # fmt: skip


def provenance(meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of everything that says how the numbers came about."""
    for name, value in meta.items():
        if name in ("settings", "answer_tokens"):
            continue
        inner = value if isinstance(value, Mapping) else {}
        yield from ((f"{name}.{key}", _text(v)) for key, v in inner.items())
        if not isinstance(value, Mapping):
            yield name, _text(value)
    tokens = part(meta, "answer_tokens")
    if tokens:
        said = [f"{a} = {part(tokens, a).get('token')!r}" for a in tokens]
        yield "answer_tokens", ", ".join(said)


def settings_of(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value as JSON) of the settings as used."""
    settings = part(meta, "settings").items()
    return [(key, json.dumps(plain(value), ensure_ascii=False)) for key, value in settings]


def _text(value: Any) -> str:
    """A value of the record as a reader writes it."""
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
    return "none" if value in (None, "") else str(value)
