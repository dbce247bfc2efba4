"""Prompts with keywords: a JSONL, or questions written on, as tokens with their spans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tl_headnorm.data.chat import as_chat
from tl_headnorm.data.prompts import Prompt
from tl_headnorm.data.spans import TokenText, encode_text, find_spans, positions
from tl_headnorm.data.templates import Sample
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Ready:
    """A prompt as tokens, the positions of its keywords, and whether distracting text is in it."""

    prompt: Prompt
    tokens: TokenText
    span: tuple[int, ...]
    distracted: bool = False


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
