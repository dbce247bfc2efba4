"""The page of one prompt's attention: self-contained HTML, patterns packed into it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.attention.generation import Writing
from tl_headnorm.commands.attention.keywords import Keyword, ranked
from tl_headnorm.commands.attention.patterns import Look, foremost
from tl_headnorm.plots.page import packed
from tl_headnorm.plots.templates import render, script_json

LABELS = {
    "first_token": "first token (sink)",
    "previous_token": "previous token",
    "local": "nearest tokens",
    "entropy": "entropy (nats)",
    "induction": "induction",
    "duplicate_token": "duplicate token",
    "contribution": "adds to the residual stream",
}
FULL = 65535  # a weight of 1
RANKED = 12
MOST_BYTES = 6_000_000  # of patterns, before they are deflated: 3 to 4 MB of page at most


def as_shares(array: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 as little-endian uint16; NaN (not seen) is 0."""
    shares = np.nan_to_num(np.asarray(array, np.float64)).clip(0, 1)
    return np.rint(shares * FULL).astype("<u2")


def pack_patterns(patterns: Mapping[str, np.ndarray], n_tokens: int) -> str:
    """Lower triangles of the patterns, row by row, one after another."""
    rows, columns = np.tril_indices(n_tokens)
    parts = [as_shares(pattern[rows, columns]) for pattern in patterns.values()]
    return packed(b"".join(part.tobytes() for part in parts))


def _shares(array: np.ndarray) -> str:
    return packed(as_shares(array).tobytes())


def _numbers(grid: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in grid]


def score_map(
    label: str, grid: np.ndarray, uniform: float | None, group: str, *, signed: bool = False
) -> dict[str, Any]:
    """A map of layers by heads for the page, from 0 or, signed, around 0."""
    return {
        "label": label, "values": _numbers(grid), "group": group, "signed": signed,
        "uniform": None if uniform is None or np.isnan(uniform) else float(uniform),
    }  # fmt: skip


def score_maps(run: xr.Dataset) -> dict[str, dict[str, Any]]:
    """The maps of one prompt's scores and keywords."""
    maps = {
        name: score_map(label, run[name].values, run.attrs["uniform"].get(name), "scores")
        for name, label in LABELS.items()
        if name in run
    }
    if "focus" in run:
        mean, expected = run["focus"].mean("query"), run["focus"].coords["uniform"].mean("query")
        for i, word in enumerate(run["keyword"].values):
            maps[f"keyword {i}"] = score_map(
                f"on “{word}”", mean.isel(keyword=i).values, float(expected[i]), "focus"
            )
    return maps


def keyword_entries(run: xr.Dataset, keywords: Sequence[Keyword]) -> list[dict[str, Any]]:
    """Every keyword's tokens, and the heads with the most weight on it."""
    return [
        {
            "text": word.text,
            "positions": list(word.positions),
            "uniform": float(run["focus"].coords["uniform"].isel(keyword=i).mean()),
            "ranked": ranked(run["focus"], word.text)[:RANKED],
        }
        for i, word in enumerate(keywords)
    ]


def page_data(
    found: Look, writing: Writing | None = None, distraction: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Everything the page's script reads; `distraction` are maps of changes."""
    run, n = found.run, len(found.labels)
    room = int(MOST_BYTES // (n * (n + 1))) - len(found.means)
    whole = [pair for pair in foremost(run) if pair in found.kept][: max(1, room)]
    patterns = {f"{layer}.{head}": found.kept[layer, head] for layer, head in sorted(whole)}
    patterns |= found.means
    data = {
        "labels": list(found.labels),
        "pieces": list(_pieces(found.labels)),
        "layers": [int(i) for i in run["layer"].values],
        "n_heads": run.sizes["head"],
        "start": list(whole[0]) if whole else [int(run["layer"].values[0]), 0],
        "side": found.thumbnails.shape[-1],
        "step": -(-n // found.thumbnails.shape[-1]),
        "thumbs": packed(found.thumbnails.tobytes()),
        "names": list(patterns),
        "patterns": pack_patterns(patterns, n),
        "maps": score_maps(run),
        "reach": run.sizes["distance"],
        "profile": _shares(run["profile"].values),
        "last_rows": _shares(found.last_rows),
        "uniform_profile": [round(float(v), 6) for v in run["uniform_profile"].values],
        "keywords": keyword_entries(run, found.keywords),
        "writing": None,
        "distraction": list(distraction) or None,
    }
    if writing is not None:
        data["writing"] = {
            "labels": list(writing.labels), "n_prompt": writing.n_prompt,
            "heads": [list(pair) for pair in writing.heads], "steps": writing.weights.shape[1],
            "weights": _shares(writing.weights),
        }  # fmt: skip
    return data


def _pieces(labels: Sequence[str]) -> list[str]:
    """The running text a token stands for: "🙂 1/4" is the character, "🙂 2/4" and on nothing."""
    pieces = []
    for label in labels:
        text, _, part = label.rpartition(" ")
        number, _, of = part.partition("/")
        split = number.isdecimal() and of.isdecimal() and text.strip() and int(of) > 1
        pieces.append(label if not split else text if number == "1" else "‧")
    return pieces


def page(
    data: Mapping[str, Any], *, title: str, about: str, keywords: str = "", written: str = "",
    answers: Sequence[str] = (),
) -> str:  # fmt: skip
    """The HTML page. All text is escaped: a prompt may hold anything, tags included."""
    return render(
        "commands/attention/page.html.j2", data=data, json=script_json(data), title=title,
        about=about, keywords=keywords, written=written, answers=answers,
    )  # fmt: skip
