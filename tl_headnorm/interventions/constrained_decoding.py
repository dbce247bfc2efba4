"""Texts that must appear in what is written: a LogitsProcessor for transformers and for us.

transformers had `force_words_ids` (constrained beam search) in its core and no longer has; it
works by beams only. This one works greedy and sampled, in `model.hf.generate` and in ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from tl_headnorm.data.tokens import common_prefix_length, token_ids
from tl_headnorm.errors import InputError


def continuation_ids(tokenizer: Any, phrase: str) -> list[int]:
    """The tokens of a phrase as the next word of a text: after something, and a space."""
    before, after = token_ids(tokenizer, ["a", f"a {phrase}"])
    found = after[common_prefix_length(before, after) :]
    if not found:
        raise InputError(f"must_include: expected a text with tokens, found {phrase!r}")
    return found


class MustInclude(LogitsProcessor):
    """Every phrase appears before the text ends, within `max_new_tokens`.

    A missing phrase begins where its first token has a probability of at least `least`, or where
    only as many tokens are left as the missing ones take; once begun it is finished. No end of
    text is allowed before. `phrases` is a list a row, or one for all rows. A phrase counts as
    there when its text is, upper and lower case alike, however the model has split it.

    What it cannot do: make the phrase fit. It is put in, not meant.
    """

    def __init__(
        self,
        tokenizer: Any,
        phrases: Sequence[Sequence[str]],
        *,
        prompt_length: int,
        max_new_tokens: int,
        eos: Sequence[int] = (),
        least: float = 0.1,
    ) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.max_new_tokens, self.eos, self.least = max_new_tokens, list(eos), least
        self.phrases = [list(row) for row in phrases]
        self.tokens = {p: continuation_ids(tokenizer, p) for row in self.phrases for p in row}
        for row in self.phrases:
            needed = sum(len(self.tokens[p]) for p in row)
            if needed > max_new_tokens:
                raise InputError(
                    f"generate: expected room for the {needed} tokens of must_include, found "
                    f"{max_new_tokens}; raise --generate"
                )
        self.begun: dict[int, list[int]] = {}

    def __call__(
        self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Scores in which the tokens that may not come are -inf."""
        written = input_ids.shape[1] - self.prompt_length
        if written == 0:
            self.begun = {}
        changed = scores.clone()
        for row in range(len(scores)):
            forced = self._forced(row, input_ids[row, self.prompt_length :].tolist(), scores[row])
            if forced is not None:
                changed[row] = -torch.inf
                changed[row, forced] = 0
            elif self._missing(row, input_ids[row, self.prompt_length :].tolist()):
                changed[row, self.eos] = -torch.inf
        return changed

    def _missing(self, row: int, new: list[int]) -> list[str]:
        text = self.tokenizer.decode(new).casefold()
        phrases = self.phrases[0 if len(self.phrases) == 1 else row]
        return [phrase for phrase in phrases if phrase.casefold() not in text]

    def _forced(self, row: int, new: list[int], scores: Tensor) -> int | None:
        """The token that must come next, or None where the model may choose."""
        if self.begun.get(row):
            return self.begun[row].pop(0)
        missing = self._missing(row, new)
        if not missing:
            return None
        left = self.max_new_tokens - len(new)
        chances = torch.softmax(scores.float(), -1)
        likeliest = max(missing, key=lambda phrase: float(chances[self.tokens[phrase][0]]))
        wanted = float(chances[self.tokens[likeliest][0]]) >= self.least
        if not wanted and left > sum(len(self.tokens[phrase]) for phrase in missing):
            return None
        first, *rest = self.tokens[likeliest]
        self.begun[row] = rest
        return first
