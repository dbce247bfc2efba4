"""summary.md of a look at attention: plain sentences with the numbers in them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.attention.distraction import Case
from tl_headnorm.commands.attention.generation import Writing
from tl_headnorm.commands.attention.keywords import Keyword, ranked
from tl_headnorm.commands.attention.scores import SCORES, WORDS

FOREMOST = 5


def quoted(text: str, most: int = 60) -> str:
    """A piece of text on one line, in quotation marks; the ends where it is long."""
    line = " ".join(text.split())
    return f"“{line}”" if len(line) <= most else f"“{line[: most // 2]} … {line[-most // 2 :]}”"


def _token(label: str) -> str:
    """A token, its spaces and line ends seen."""
    return f"“{label.replace(' ', '·').replace(chr(10), '↵')}”"


def score_lines(heads: pd.DataFrame, uniform: Mapping[str, float]) -> list[str]:
    """The foremost heads by each score, beside a uniform head. `heads` is heads.parquet."""
    lines = ["## What kind of heads", ""]
    for name in SCORES:
        if name not in heads or heads[name].isna().all():
            continue
        top = heads.sort_values(name, ascending=name == "entropy", kind="stable").head(FOREMOST)
        shown = ", ".join(
            f"{row['layer']}.{row['head']} ({row[name]:.3f})" for row in top.to_dict("records")
        )
        which = "lowest" if name == "entropy" else "highest"
        lines.append(f"- {WORDS[name]}: {which} {shown}; a uniform head has {uniform[name]:.3f}.")
        if name == "first_token":
            added = top["contribution"].median() / heads["contribution"].median()
            lines.append(
                f"  What these add to the residual stream is {added:.2g} times the median head's: "
                "a sink that adds little is a place to look at when there is nothing to take."
            )
    return lines


def focus_lines(run: xr.Dataset, keywords: Sequence[Keyword]) -> list[str]:
    """What each keyword matched, and who attends to it."""
    lines = ["", "## Keywords", ""]
    queries = ", ".join(str(int(q)) for q in run["query"].values[:8])
    if run.sizes["query"] > 8:
        queries += f" and {run.sizes['query'] - 8} more"
    lines.append(f"Attention from position {queries} (mean over them).")
    for word in keywords:
        lines.append("")
        lines.append(_matched(word))
        expected = float(run["focus"].coords["uniform"].sel(keyword=word.text).mean())
        if not expected:
            lines.append("It stands after every query, where no head can see it.")
            continue
        top = ranked(run["focus"], word.text)
        shown = ", ".join(f"{layer}.{head} ({w:.3f})" for layer, head, w in top[:FOREMOST])
        lines.append(f"Heads: {shown}; a uniform head has {expected:.3f}.")
    return lines


def _matched(word: Keyword) -> str:
    count = len(word.spans)
    tokens = len(word.positions)
    where = f"{count} occurrence{'s' * (count > 1)}, {tokens} token{'s' * (tokens > 1)}"
    if word.similarity is None:
        return f"{quoted(word.text)}: {where}."
    rivals = ", ".join(f"{quoted(text)} {cosine:.3f}" for text, cosine in word.rivals)
    return (
        f"{quoted(word.text)} is not in the prompt; by the model's embeddings the nearest word is "
        f"{quoted(word.matched)} (cosine {word.similarity:.3f}; then {rivals or 'none'}): {where}."
    )


def writing_lines(writing: Writing, keywords: Sequence[Keyword], how: str) -> list[str]:
    """What was written, and how attention to the keywords went."""
    steps = writing.weights.shape[1]
    said = f"{steps} new token{'s' * (steps != 1)}, {how}:"
    lines = ["", "## While writing", "", said, ""]
    lines += [f"> {line}" for line in (writing.text.strip("\n") or "(nothing)").split("\n")]
    for word in keywords:
        weights = writing.on(word.positions)
        shown = ", ".join(
            f"{layer}.{head} {row[0]:.3f} → {row[-1]:.3f} (mean {row.mean():.3f})"
            for (layer, head), row in zip(writing.heads, weights, strict=True)
        )
        lines += ["", f"On {quoted(word.text)}, first → last new token: {shown}."]
    return lines


def distraction_lines(cases: Sequence[Case], table: pd.DataFrame) -> list[str]:
    """What the distracting text did to the answer and to the keywords."""
    lines = ["", "## With distracting text", ""]
    lines += answer_lines(cases)
    for (place, word), rows in table.groupby(["place", "keyword"], sort=False):
        lost = rows.sort_values("change", kind="stable").head(3).to_dict("records")
        shown = ", ".join(f"{r['layer']}.{r['head']} ({r['change']:+.3f})" for r in lost)
        before, after = rows["weight_before"].mean(), rows["weight_after"].mean()
        lines.append(
            f"- {place}, {quoted(str(word))}: mean over heads {before:.4f} → {after:.4f} (uniform "
            f"{rows['uniform_before'].iloc[0]:.4f} → {rows['uniform_after'].iloc[0]:.4f}); most "
            f"lost at {shown}; on the distracting text {rows['distractor_weight'].mean():.4f}."
        )
    return lines


def answer_lines(cases: Sequence[Case]) -> list[str]:
    """The answer of every case, one sentence each."""
    clean = cases[0].answer
    lines = [f"- clean: {_token(clean.best)} with {max(clean.probabilities):.3f}"]
    for case in cases[1:]:
        kept = case.answer.probabilities[int(np.argmax(clean.probabilities))]
        changed = "the same" if case.answer.best == clean.best else _token(case.answer.best)
        lines.append(
            f"- {case.place}: {changed} with {max(case.answer.probabilities):.3f}; the clean "
            f"answer has {kept:.3f}"
        )
    return lines
