"""summary.md of attention: the numbers that its template says in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.attention.distraction import Case
from tl_headnorm.commands.attention.generation import Writing
from tl_headnorm.commands.attention.keywords import Keyword, ranked
from tl_headnorm.commands.attention.scores import SCORES, WORDS
from tl_headnorm.plots.templates import render

FOREMOST = 5
MOST_QUERIES = 8
MOST_LOST = 3


def summary(
    source: str,
    heads: pd.DataFrame,
    uniform: Mapping[str, float],
    prompts: Sequence[Mapping[str, Any]],
) -> str:
    """`heads` is heads.parquet, `uniform` a uniform head's scores, a part per prompt."""
    return render(
        "commands/attention/summary.md.j2",
        source=source,
        scores=_scores(heads, uniform),
        prompts=prompts,
        quoted=quoted,
    )


def keyword_sentences(run: xr.Dataset, keywords: Sequence[Keyword]) -> str:
    """Each keyword's matches, and the heads that attend to it."""
    words = [_keyword(run, word) for word in keywords]
    return render("commands/attention/keywords.md.j2", keywords=words, quoted=quoted).strip()


def quoted(text: str, most: int = 60) -> str:
    """A piece of text on one line, in quotation marks; the ends where it is long."""
    line = " ".join(text.split())
    return f"“{line}”" if len(line) <= most else f"“{line[: most // 2]} … {line[-most // 2 :]}”"


def _scores(heads: pd.DataFrame, uniform: Mapping[str, float]) -> list[dict[str, Any]]:
    """The foremost heads by each score, and a uniform head's."""
    found = []
    for name in SCORES:
        if name not in heads or heads[name].isna().all():
            continue
        top = heads.sort_values(name, ascending=name == "entropy", kind="stable").head(FOREMOST)
        added = top["contribution"].median() / heads["contribution"].median()
        found.append(
            {
                "words": WORDS[name],
                "lowest": name == "entropy",
                "top": list(zip(top["layer"], top["head"], top[name], strict=True)),
                "uniform": uniform[name],
                "added": added if name == "first_token" else None,
            }
        )
    return found


def queries(run: xr.Dataset) -> str:
    """The positions attended from."""
    named = ", ".join(str(int(q)) for q in run["query"].values[:MOST_QUERIES])
    more = run.sizes["query"] - MOST_QUERIES
    return f"{named} and {more} more" if more > 0 else named


def _keyword(run: xr.Dataset, word: Keyword) -> dict[str, Any]:
    return {
        "text": word.text,
        "matched": word.matched,
        "similarity": word.similarity,
        "rivals": word.rivals,
        "n_spans": len(word.spans),
        "n_tokens": len(word.positions),
        "uniform": float(run["focus"].coords["uniform"].sel(keyword=word.text).mean()),
        "top": ranked(run["focus"], word.text)[:FOREMOST],
    }


def generated(writing: Writing, keywords: Sequence[Keyword], how: str) -> dict[str, Any]:
    """The continuation, and each watched head's attention to the keywords along it."""
    return {
        "steps": writing.weights.shape[1],
        "how": how,
        "lines": (writing.text.strip("\n") or "(nothing)").split("\n"),
        "keywords": [
            (word.text, list(zip(writing.heads, writing.on(word.positions), strict=True)))
            for word in keywords
        ],
    }


def distracted(cases: Sequence[Case], table: pd.DataFrame) -> dict[str, Any]:
    """The answers, and the change of attention to each keyword by place."""
    changes = [
        {
            "place": place,
            "keyword": str(word),
            "lost": rows.nsmallest(MOST_LOST, "change").to_dict("records"),
            "mean": rows.mean(numeric_only=True).to_dict(),
        }
        for (place, word), rows in table.groupby(["place", "keyword"], sort=False)
    ]
    return {"answers": answers(cases), "changes": changes}


def answers(cases: Sequence[Case]) -> list[str]:
    """The answer of every case, the clean one first."""
    clean = cases[0].answer
    found = [f"clean: {_token(clean.best)} with {max(clean.probabilities):.3f}"]
    for case in cases[1:]:
        still = case.answer.probabilities[int(np.argmax(clean.probabilities))]
        changed = "the same" if case.answer.best == clean.best else _token(case.answer.best)
        found.append(
            f"{case.place}: {changed} with {max(case.answer.probabilities):.3f}; the clean answer "
            f"has {still:.3f}"
        )
    return found


def _token(label: str) -> str:
    """A token with its spaces and line ends visible."""
    return f"“{label.replace(' ', '·').replace(chr(10), '↵')}”"
