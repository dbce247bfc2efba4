"""The page of one prompt's attention: self-contained HTML, patterns packed into it. No torch."""

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

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


def packed(array: np.ndarray) -> str:
    """Bytes of an array, deflated, as text."""
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()


def as_shares(array: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 as little-endian uint16; NaN (not seen) is 0."""
    shares = np.nan_to_num(np.asarray(array, np.float64)).clip(0, 1)
    return np.rint(shares * FULL).astype("<u2")


def pack_patterns(patterns: Mapping[str, np.ndarray], n_tokens: int) -> str:
    """Lower triangles of the patterns, row by row, one after another."""
    rows, columns = np.tril_indices(n_tokens)
    parts = [as_shares(pattern[rows, columns]) for pattern in patterns.values()]
    return packed(np.concatenate(parts) if parts else np.zeros(0, "<u2"))


def _numbers(grid: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in grid]


def score_map(
    label: str, grid: np.ndarray, uniform: float | None, group: str, *, signed: bool = False
) -> dict[str, Any]:
    """A map of layers by heads for the page; entropy alone does not begin at 0."""
    return {
        "label": label, "values": _numbers(grid), "group": group, "signed": signed,
        "uniform": None if uniform is None or np.isnan(uniform) else float(uniform),
        "from_zero": True,
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


def keyword_entries(run: xr.Dataset, keywords: Sequence[Any]) -> list[dict[str, Any]]:
    """What the page says of every keyword: its tokens, and the heads by weight."""
    found = []
    for i, word in enumerate(keywords):
        grid = run["focus"].isel(keyword=i).mean("query").values
        order = np.argsort(-grid, axis=None, kind="stable")[:RANKED]
        layers, heads = np.unravel_index(order, grid.shape)
        names = run["layer"].values
        found.append(
            {
                "text": word.text, "positions": list(word.positions),
                "uniform": float(run["focus"].coords["uniform"].isel(keyword=i).mean()),
                "ranked": [
                    [int(names[a]), int(b), float(grid[a, b])]
                    for a, b in zip(layers, heads, strict=True)
                ],
            }
        )  # fmt: skip
    return found


def page_data(found: Any, writing: Any = None, distraction: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything the page's script reads. `found` is a Look, `writing` a Writing."""
    run, n = found.run, len(found.labels)
    patterns = {f"{layer}.{head}": p for (layer, head), p in found.kept.items()} | found.means
    data = {
        "labels": list(found.labels),
        "pieces": list(_pieces(found.labels)),
        "layers": [int(i) for i in run["layer"].values],
        "n_heads": run.sizes["head"],
        "start": list(_foremost(found)),
        "side": found.thumbnails.shape[-1],
        "step": -(-n // found.thumbnails.shape[-1]),
        "thumbs": packed(np.ascontiguousarray(found.thumbnails)),
        "names": list(patterns),
        "patterns": pack_patterns(patterns, n),
        "maps": score_maps(run),
        "reach": run.sizes["distance"],
        "profile": packed(as_shares(run["profile"].values)),
        "uniform_profile": [round(float(v), 6) for v in run["uniform_profile"].values],
        "keywords": keyword_entries(run, found.keywords),
        "writing": None,
        "distraction": list(distraction) or None,
    }
    if writing is not None:
        data["writing"] = {
            "labels": list(writing.labels), "n_prompt": writing.n_prompt,
            "heads": [list(pair) for pair in writing.heads], "steps": writing.weights.shape[1],
            "weights": packed(as_shares(writing.weights)),
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


def _foremost(found: Any) -> tuple[int, int]:
    """The head shown first: the one with most weight on the first keyword, or the first kept."""
    run = found.run
    if "focus" in run:
        grid = run["focus"].isel(keyword=0).mean("query").values
        layer, head = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
        return int(run["layer"].values[layer]), int(head)
    return next(iter(found.kept), (int(run["layer"].values[0]), 0))


_BODY = """<header><div><h1>{title}</h1><p class="soft">{about}</p></div>
<label>colours <select id="theme"><option>auto<option>light<option>dark</select></label></header>
<div class="row"><section>
<div class="bar"><label>every head: <select id="cells"><option value="patterns">patterns</select>
</label><span class="soft">click, or arrow keys</span></div>
<canvas id="grid" tabindex="0" role="img" aria-label="Heads: layers down, heads across"></canvas>
</section><section>
<div class="bar"><b id="what" aria-live="polite"></b>
<label>show <select id="view"><option value="head">this head
<option value="over heads">mean over the layer's heads<option value="over layers">mean over layers
<option value="all">mean over all</select></label>
<label>colour by <select id="scale"><option value="sqrt">√ weight<option value="linear">weight
</select></label></div>
<canvas id="large" tabindex="0" role="img" aria-label="A pattern: queries down, keys across">
</canvas>
</section></div>
<h2>The prompt</h2><p id="asked" class="soft"></p><div id="text" class="text"></div>
<div class="row"><section><h2>This head</h2><div id="facts"></div></section>
<section><h2>How far back it looks</h2><canvas id="profile"></canvas></section></div>
<h2>Scores of every head</h2><p class="soft">{scores}</p><div id="scores" class="maps"></div>
{more}"""
_FOCUS = """<h2>Keywords</h2><p class="soft">{}</p>
<div id="focus" class="maps"></div><div id="ranked" class="maps"></div>"""
_WRITING = """<h2>While writing</h2><div class="text">{}</div>
<div class="bar"><label>head <select id="watched"></select></label><span class="soft">a row per new
token: what the head attends to where it is chosen; the line is the prompt's end</span></div>
<div><canvas id="writing"></canvas></div>"""
_DISTRACTED = """<h2>With distracting text</h2>{}<p class="soft">Change of attention to the keywords
from the last token, distracted minus clean.</p><div id="distraction" class="maps"></div>"""


def page(
    data: Mapping[str, Any], *, title: str, about: str, keywords: str = "", written: str = "",
    answers: Sequence[str] = (),
) -> str:  # fmt: skip
    """The whole page. All text is escaped: a prompt may hold anything, tags included."""
    here = Path(__file__)
    style = here.with_suffix(".css").read_text(encoding="utf-8")
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    more = _FOCUS.format(html.escape(keywords)) if data["keywords"] else ""
    more += _WRITING.format(html.escape(written)) if data["writing"] else ""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in answers)
    more += _DISTRACTED.format(said) if data["distraction"] else ""
    about_scores = (
        "The mark on a colour bar is a uniform head's score. Induction and duplicate tokens are "
        "measured on repeated random tokens, the others on this prompt."
    )
    body = _BODY.format(
        title=html.escape(title), about=html.escape(about), scores=about_scores, more=more
    )
    # "<" inside a script element could end it: JSON says it as \\u003c.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{style}</style></head>'
        f'<body>{body}<div id="tip" role="tooltip"></div>'
        f'<script type="application/json" id="data">{text}</script><script>{script}</script>'
        "</body></html>"
    )
