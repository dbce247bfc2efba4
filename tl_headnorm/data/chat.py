"""Prompts as an instruct model expects them: one user turn, up to where the answer starts."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tl_headnorm.data.templates import Sample
from tl_headnorm.data.tokens import ChatText, Encoded, Tokenizer
from tl_headnorm.errors import InputError, first_line


def chat_template_sha256(tokenizer: Tokenizer) -> str:
    """Digest of the chat template, for meta.json."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def as_chat(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Sample]:
    """Every prompt as the user's turn of a conversation, with the header of the answer.

    The conversation's own markers become special tokens; BOS is left out here, where encode puts
    it. Raises InputError for a tokenizer without a chat template, and for a prompt that spells
    one of its special tokens: it could not be told from a marker.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat: expected a tokenizer with a chat template, found none; use --chat false, or "
            "an instruct model"
        )
    return [replace(s, prompt_text=_conversation(s, tokenizer)) for s in samples]


def special_token_in(text: str, tokenizer: Any) -> str | None:
    """The first special token that the tokenizer would read in a text, or None.

    It is asked, not searched for: of a tokenizer's special tokens only those with a role are in
    `all_special_tokens` (Llama 3's <|start_header_id|> is not), and some are found in any case.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = next((i for i in ids if i in special), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def _conversation(sample: Sample, tokenizer: Tokenizer) -> ChatText:
    spelled = special_token_in(sample.prompt_text, tokenizer)
    if spelled is not None:
        raise InputError(
            f"chat: expected prompts without special tokens, found {spelled!r} in sample "
            f"{sample.meta.get('id')}; change that question, or use --chat false"
        )
    turn = [{"role": "user", "content": sample.prompt_text}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything at all
        raise InputError(
            f"chat: expected a chat template that takes one user turn, found one that says: "
            f"{first_line(error)}"
        ) from error
    return ChatText(text.removeprefix(tokenizer.bos_token or ""))


def check_whole(samples: Sequence[Sample], encoded: Sequence[Encoded]) -> None:
    """Refuse a conversation that was cut: it would begin without its header."""
    for sample, tokens in zip(samples, encoded, strict=True):
        if tokens.truncated:
            raise InputError(
                f"chat: expected prompts that fit into max_length, found a longer one, sample "
                f"{sample.meta.get('id')}; raise --max_length"
            )
