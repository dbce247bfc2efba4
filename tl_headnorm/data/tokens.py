"""From text to token ids: exactly one BOS, cut at the right end, the answer's own tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tl_headnorm.data.templates import Sample
from tl_headnorm.errors import InputError

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A tokenised prompt; `index` is its place in the dataset.

    `letter_ids` are the tokens that carry the option letters where the tokenizer is given prompt
    + letter: "A", or " A" where it merges with the prompt's final space.
    """

    index: int
    ids: tuple[int, ...]
    truncated: bool = False
    letter_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@runtime_checkable
class Tokenizer(Protocol):
    """The part of Hugging Face's `PreTrainedTokenizerBase` that is used."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None

    def __call__(self, text: str | list[str], **options: object) -> Mapping[str, Any]: ...
    def decode(self, token_ids: Sequence[int], **options: object) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def apply_chat_template(self, conversation: Sequence[object], **options: object) -> str: ...


class ChatText(str):
    """Text in which a special token's spelling is that token, also after something is added."""

    def __add__(self, more: str) -> "ChatText":
        return ChatText(str(self) + more)


def bos_id(tokenizer: Tokenizer, prepend_bos: bool) -> list[int]:
    """[BOS] or [] where none is wanted or the tokenizer has none."""
    bos = tokenizer.bos_token_id
    return [bos] if prepend_bos and bos is not None else []


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of plain text: nothing added, and text that spells a special token stays text."""
    if not texts:
        return []
    plain = not isinstance(texts[0], ChatText)
    encoded = tokenizer(
        [str(t) for t in texts], add_special_tokens=False, split_special_tokens=plain, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens in which both agree."""
    for i, (x, y) in enumerate(zip(a, b)):  # noqa: B905 (the shorter one ends it)
        if x != y:
            return i
    return min(len(a), len(b))


def encode(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    prepend_bos: bool = True,
    max_length: int = 384,
    score: bool = False,
) -> list[Encoded]:
    """Token ids of every prompt: one BOS, then the text, at most `max_length` tokens in all.

    A longer prompt loses its beginning right after BOS, never its end, where the answer is to
    come. With `score`, the letters' tokens are those the tokenizer makes of prompt + letter.
    """
    head = bos_id(tokenizer, prepend_bos)
    room = max_length - len(head)
    texts = token_ids(tokenizer, [sample.prompt_text for sample in samples])
    letters = _LetterTokens(tokenizer)
    # One object per token id, not per occurrence: a tenth of the memory on many prompts.
    shared: dict[int, int] = {}
    encoded = []
    for index, (sample, ids) in enumerate(zip(samples, texts, strict=True)):
        if not ids or room < 1:
            raise InputError(
                f"sample {sample.meta.get('id', index)}: expected a prompt with tokens, found "
                "none; check the template and max_length"
            )
        cut = tuple(shared.setdefault(token, token) for token in head + ids[-room:])
        found = letters(sample, ids) if score else ()
        encoded.append(Encoded(index, cut, len(ids) > room, found))
    return encoded


class _LetterTokens:
    """The tokens of prompt + letter that differ from the prompt's, remembered by last line.

    A letter after "Answer: " merges with tokens of the last line only.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, str], int] = {}

    def __call__(self, sample: Sample, ids: Sequence[int]) -> tuple[int, ...]:
        line = sample.prompt_text.rsplit("\n", 1)[-1]
        missing = [letter for letter in sample.option_labels if (line, letter) not in self.known]
        longer = token_ids(self.tokenizer, [sample.prompt_text + letter for letter in missing])
        for letter, extended in zip(missing, longer, strict=True):
            start = common_prefix_length(ids, extended)
            # A tokenizer that joins unknown characters may add no token at all.
            self.known[line, letter] = extended[start] if start < len(extended) else -1
        tokens = tuple(self.known[line, letter] for letter in sample.option_labels)
        if len(set(tokens)) < len(tokens) or -1 in tokens:
            raise InputError(
                f"score_answers: expected one token of its own for each of the letters "
                f"{', '.join(sample.option_labels)} after the prompt, found {tokens}; "
                "use --score_answers false or a template that ends otherwise"
            )
        return tokens


def check_template_fits(
    template_tokens: int, max_length: int, n_ctx: int, template_name: str
) -> None:
    """Raise InputError where the bare template is longer than a prompt may be."""
    if max_length > n_ctx:
        raise InputError(
            f"max_length: expected at most the model's context of {n_ctx} tokens, found "
            f"{max_length}; set --max_length {n_ctx} or less"
        )
    if template_tokens > max_length:
        raise InputError(
            f"max_length: expected room for the template {template_name}, which alone takes "
            f"{template_tokens} tokens, found {max_length}; raise --max_length"
        )


def build_sft_example(
    sample: Sample, tokenizer: Tokenizer, *, prepend_bos: bool = True, append_eos: bool = False
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of prompt + target, the prompt's labels -100.

    Prompt and prompt + target are tokenised in one call. Labels begin at the first token in
    which the two differ: where the tokenizer merges the prompt's end with the target's
    beginning, the merged token is the first one to learn.
    """
    prompt, full = token_ids(
        tokenizer, [sample.prompt_text, sample.prompt_text + sample.target_text]
    )
    start = common_prefix_length(prompt, full)
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise InputError(
            "append_eos: expected a tokenizer with an EOS token, found none; "
            "set tokenizer.eos_token or append_eos=False"
        )
    head = bos_id(tokenizer, prepend_bos)
    tail = [eos] if append_eos and eos is not None else []
    ids = head + full + tail
    return {"input_ids": ids, "labels": [IGNORED] * (len(head) + start) + full[start:] + tail}
