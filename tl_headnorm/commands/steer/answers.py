"""generations.html: every prompt's answers side by side, with the attention of each line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tl_headnorm.data.prompts import Prompt
from tl_headnorm.plots.templates import render
from tl_headnorm.run.files import write_text


def marked(text: str, phrases: Sequence[str]) -> Markup:
    """The text as HTML with every occurrence of a phrase marked, whatever its case."""
    wanted = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))
    if not wanted:
        return escape(text)
    parts = re.split(f"({wanted})", text, flags=re.IGNORECASE)
    mark = Markup("<mark>{}</mark>").format
    return Markup("").join(mark(part) if i % 2 else part for i, part in enumerate(parts))


def save_answers(
    answers: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], path: Path, title: str
) -> None:
    """Write the page; `answers` are rows of generations.jsonl."""
    steps = [step["keyword_weight"] for answer in answers for step in answer["steps"]]
    text = render(
        "commands/steer/answers.html.j2",
        title=title,
        most=max(steps, default=0.0) or 1.0,
        prompts=prompts,
        answers=answers,
        marked=marked,
    )
    write_text(path, text)
