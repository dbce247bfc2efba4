"""Where a piece of text stands among the tokens of a prompt, and how tokens are shown."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_headnorm.data.tokens import ChatText, bos_id
from tl_headnorm.errors import InputError

NO_TEXT = (0, 0)


@dataclass(frozen=True)
class TokenText:
    """A text, its token ids, and which characters each token stands for.

    `offsets[i]` is the half-open range of characters of token i; BOS stands for none. `cut` is
    the number of characters whose tokens were left out at the beginning.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Span:
    """One occurrence of a text: tokens [start, stop), which may reach beyond its characters."""

    keyword: str
    start: int
    stop: int
    char_start: int
    char_stop: int

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))


def encode_text(
    tokenizer: Any, text: str, *, prepend_bos: bool = True, max_length: int | None = None
) -> TokenText:
    """The ids that `encode` makes of a prompt, with every token's characters.

    At most `max_length` tokens: a longer text loses its beginning right after BOS. Raises
    InputError for an empty text and for a tokenizer that keeps no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: expected one that knows its tokens' characters (a 'fast' one), found "
            f"{type(tokenizer).__name__}; convert it to a tokenizer.json"
        )
    found = tokenizer(
        str(text),
        add_special_tokens=False,
        split_special_tokens=not isinstance(text, ChatText),
        return_offsets_mapping=True,
        verbose=False,
    )
    head = bos_id(tokenizer, prepend_bos)
    ids, offsets = list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]
    if not ids and not head:
        raise InputError(f"prompt: expected a text with tokens, found {str(text)!r}")
    room = len(ids) if max_length is None else max_length - len(head)
    if room < 1 and ids:
        raise InputError(f"max_length: expected room for a token, found {max_length}")
    kept, cut = offsets[-room:] if ids else [], 0
    if len(kept) < len(offsets):
        cut = kept[0][0]
    return TokenText(
        str(text),
        tuple(head + ids[-room:] if ids else head),
        (NO_TEXT,) * len(head) + (*kept,),
        cut,
    )


def find_spans(tokens: TokenText, keyword: str, *, name: str = "keyword") -> list[Span]:
    """Every occurrence of a text, overlapping ones included, by character offsets.

    Upper and lower case differ, and a text is found inside words too. A token that holds only a
    part of an occurrence belongs to it. Raises InputError for a text that is empty, absent (with
    the nearest thing that is there), or stands only where the prompt was cut.
    """
    if not keyword.strip():
        raise InputError(f"{name}: expected a text to look for, found {keyword!r}")
    places = list(_occurrences(tokens.text, keyword))
    if not places:
        raise InputError(
            f"{name}: expected a text that stands in the prompt, found {keyword!r}, which does not"
            f"{_nearest(tokens.text, keyword)}"
        )
    spans = [_span(tokens, keyword, at) for at in places if at >= tokens.cut]
    whole = [span for span in spans if span is not None]
    if not whole:
        raise InputError(
            f"{name}: expected a text among the prompt's {len(tokens)} tokens, found {keyword!r} "
            "only where the prompt was cut or where no token stands; raise --max_length"
        )
    return whole


def positions(spans: Iterable[Span]) -> tuple[int, ...]:
    """The tokens of all spans, each once, in ascending order."""
    return tuple(sorted({at for span in spans for at in span.positions}))


def _occurrences(text: str, keyword: str) -> Iterable[int]:
    at = text.find(keyword)
    while at >= 0:
        yield at
        at = text.find(keyword, at + 1)


def _span(tokens: TokenText, keyword: str, at: int) -> Span | None:
    end = at + len(keyword)
    inside = [i for i, (a, b) in enumerate(tokens.offsets) if a < end and b > at and a < b]
    return Span(keyword, inside[0], inside[-1] + 1, at, end) if inside else None


def _nearest(text: str, keyword: str) -> str:
    """What stands in the text and is most like the keyword, as a question."""
    for fold, how in ((_same_form, "in another Unicode form"), (_same_case, "in another case")):
        folded = fold(text)
        if fold(keyword) in folded and len(folded) == len(text):
            at = folded.index(fold(keyword))
            return f"; did you mean {text[at : at + len(fold(keyword))]!r} ({how})?"
        if fold(keyword) in folded:
            return f"; it is there {how}"
    words = text.split()
    n = len(keyword.split())
    choices = {" ".join(words[i : i + n]).strip(".,;:!?()\"'") for i in range(len(words))}
    if not keyword.isascii():  # scripts without spaces
        choices |= {text[i : i + len(keyword)] for i in range(len(text) - len(keyword) + 1)}
    close = difflib.get_close_matches(keyword, sorted(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _same_form(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _same_case(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token says, as it reads in running text: spaces kept, special tokens named.

    Characters made of several tokens (emoji, Chinese in byte-level vocabularies) are shown with
    each token's share: "🙂 1/4". Bytes that make no character are shown as "�".
    """
    pieces = _Pieces(tokenizer)
    labels: list[str] = []
    while len(labels) < len(ids):
        start = len(labels)
        for stop in range(start + 1, min(start + 9, len(ids) + 1)):
            text = pieces(tuple(ids[start:stop]))
            if "�" not in text:
                n = stop - start
                labels += [text] if n == 1 else [f"{text} {i}/{n}" for i in range(1, n + 1)]
                break
        else:
            labels.append("�")
    return labels


class _Pieces:
    """The text of a few tokens after another one: at the very start decoders drop a space."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.skip = len(self._decode(()))
        self.known: dict[tuple[int, ...], str] = {}

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode([*self.before, *ids], clean_up_tokenization_spaces=False)

    def __call__(self, ids: tuple[int, ...]) -> str:
        if ids not in self.known:
            self.known[ids] = self._decode(ids)[self.skip :]
        return self.known[ids]
