"""Token spans of a text in a prompt by character offsets, and readable token labels."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from tl_headnorm.data.tokens import ChatText, Tokenizer, bos_id
from tl_headnorm.errors import InputError

NO_TEXT = (0, 0)


@dataclass(frozen=True)
class TokenText:
    """A text, its token ids, and each token's character range.

    `offsets[i]` is the half-open range of characters of token i; BOS has none. `cut` is
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
    tokenizer: Tokenizer, text: str, *, prepend_bos: bool = True, max_length: int | None = None
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
    shown, cut = offsets[-room:] if ids else [], 0
    if len(shown) < len(offsets):
        cut = shown[0][0]
    return TokenText(
        str(text),
        tuple(head + ids[-room:] if ids else head),
        (NO_TEXT,) * len(head) + (*shown,),
        cut,
    )


def find_spans(tokens: TokenText, keyword: str, *, name: str = "keyword") -> list[Span]:
    """Every occurrence of a text, overlapping ones included, by character offsets.

    Upper and lower case differ, and a text is found inside words too. A token that holds only a
    part of an occurrence belongs to it. Raises InputError for a text that is empty, absent (with
    the nearest text of the prompt), or found only where the prompt was cut.
    """
    if not keyword.strip():
        raise InputError(f"{name}: expected a text to look for, found {keyword!r}")
    # A lookahead, so that overlapping occurrences are found.
    places = [m.start() for m in re.finditer(f"(?={re.escape(keyword)})", tokens.text)]
    if not places:
        raise InputError(
            f"{name}: expected a text that stands in the prompt, found {keyword!r}, which does not"
            f"{_nearest(tokens.text, keyword)}"
        )
    spans = [_span(tokens, keyword, at) for at in places if at >= tokens.cut]
    found = [span for span in spans if span is not None]
    if not found:
        raise InputError(
            f"{name}: expected a text among the prompt's {len(tokens)} tokens, found {keyword!r} "
            "only where the prompt was cut or where no token stands; raise --max_length"
        )
    return found


def positions(spans: Iterable[Span]) -> tuple[int, ...]:
    """The tokens of all spans, each once, in ascending order."""
    return tuple(sorted({at for span in spans for at in span.positions}))


def _span(tokens: TokenText, keyword: str, at: int) -> Span | None:
    end = at + len(keyword)
    inside = [i for i, (a, b) in enumerate(tokens.offsets) if a < end and b > at and a < b]
    return Span(keyword, inside[0], inside[-1] + 1, at, end) if inside else None


def _nearest(text: str, keyword: str) -> str:
    """The part of the text that is most like the keyword, as a question."""
    forms = [(unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", keyword))]
    forms.append((forms[0][0].casefold(), forms[0][1].casefold()))
    for (folded, wanted), how in zip(forms, ("Unicode form", "case"), strict=True):
        at = folded.find(wanted)
        if at >= 0 and len(folded) == len(text):
            return f"; did you mean {text[at : at + len(wanted)]!r} (in another {how})?"
        if at >= 0:
            return f"; it is there in another {how}"
    words = text.split()
    n = len(keyword.split())
    choices = {" ".join(words[i : i + n]).strip(".,;:!?()\"'") for i in range(len(words))}
    if not keyword.isascii():  # scripts without spaces
        choices |= {text[i : i + len(keyword)] for i in range(len(text) - len(keyword) + 1)}
    close = difflib.get_close_matches(keyword, sorted(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text as in running text: with its spaces, special tokens by name.

    Characters made of several tokens (emoji, Chinese in byte-level vocabularies) are shown with
    each token's share: "🙂 1/4". Bytes that make no character are shown as "�".
    """
    # After another token: at the very start decoders drop a space.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]

    @cache
    def pieces(some: tuple[int, ...]) -> str:
        return tokenizer.decode([*before, *some], clean_up_tokenization_spaces=False)

    skip = len(pieces(()))
    labels: list[str] = []
    while len(labels) < len(ids):
        start = len(labels)
        for stop in range(start + 1, min(start + 9, len(ids) + 1)):
            text = pieces(tuple(ids[start:stop]))[skip:]
            if "�" not in text:
                n = stop - start
                labels += [text] if n == 1 else [f"{text} {i}/{n}" for i in range(1, n + 1)]
                break
        else:
            labels.append("�")
    return labels
