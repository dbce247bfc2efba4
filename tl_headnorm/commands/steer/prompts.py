"""Prompts with keywords: a JSONL, or questions written on, as tokens with their spans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_headnorm.data.chat import as_chat
from tl_headnorm.data.lines import json_of, read_text
from tl_headnorm.data.prompts import texts_under
from tl_headnorm.data.spans import TokenText, encode_text, find_spans, positions
from tl_headnorm.data.templates import Sample
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """An instruction, the texts in it that steering looks at, and what the answer must hold."""

    id: str
    text: str
    keywords: tuple[str, ...]
    must_include: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """A prompt as tokens, the positions of its keywords, and whether distracting text is in it."""

    prompt: Prompt
    tokens: TokenText
    span: tuple[int, ...]
    distracted: bool = False


def read_prompts(path: str | Path) -> list[Prompt]:
    """A JSONL of `prompt`, `keywords` and optionally `must_include` and `id`.

    `must_include` defaults to the keywords. Raises InputError naming file, line and fault.
    """
    lines = read_text(path, "prompts", "a JSONL of prompt and keywords").lines()
    found = [_prompt(line, at, number) for number, (line, at) in enumerate(lines, 1)]
    if not found:
        raise InputError(f"prompts: expected at least one prompt in {path}, found none")
    return found


def _prompt(line: str, where: str, number: int) -> Prompt:
    record = json_of(line, where)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(
            f'{where}: expected {{"prompt": "...", "keywords": ["..."]}}, found {line[:60]}'
        )
    unknown = set(record) - {"prompt", "keywords", "must_include", "id"}
    if unknown:
        raise InputError(
            f"{where}: expected prompt, keywords, must_include and id, found {sorted(unknown)[0]!r}"
        )
    keywords = texts_under(record, "keywords", where)
    if not keywords:
        raise InputError(f"{where}: expected at least one text under keywords, found none")
    given = record.get("must_include") is not None
    included = texts_under(record, "must_include", where) if given else keywords
    return Prompt(str(record.get("id", number)), record["prompt"], keywords, included)


def with_distraction(prompt: Prompt, text: str, where: str) -> Prompt:
    """The same instruction with other text before or after it, one space between them."""
    joined = f"{text} {prompt.text}" if where == "before" else f"{prompt.text.rstrip()} {text}"
    return replace(prompt, text=joined)


def prepare_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, settings: Any, distract: str | None = None
) -> list[Ready]:
    """Tokens and keyword positions of every prompt; keywords of the distracting text count not.

    Raises InputError where a keyword is absent, or a prompt is longer than max_length.
    """
    found = []
    for prompt in prompts:
        shown = prompt if distract is None else with_distraction(
            prompt, distract, settings.distract_at
        )  # fmt: skip
        text = shown.text
        if settings.chat:
            sample = Sample(text, "", (), "", {"id": prompt.id})
            text = as_chat([sample], tokenizer)[0].prompt_text
        tokens = encode_text(tokenizer, text, prepend_bos=settings.prepend_bos)
        if len(tokens) > settings.max_length:
            raise InputError(
                f"prompt {prompt.id}: expected at most {settings.max_length} tokens, found "
                f"{len(tokens)}; raise --max_length"
            )
        begin = str(text).index(prompt.text.strip())
        end = begin + len(prompt.text.strip())
        spans = [
            span
            for keyword in prompt.keywords
            for span in find_spans(tokens, keyword, name=f"prompt {prompt.id}, keywords")
        ]
        inside = [s for s in spans if begin <= s.char_start and s.char_stop <= end]
        found.append(Ready(prompt, tokens, positions(inside), distract is not None))
    return found
