"""Plain text: a file, or a JSONL of texts, as windows of tokens."""

from dataclasses import dataclass
from pathlib import Path

from tl_headnorm.data.lines import json_of, read_text
from tl_headnorm.data.tokens import Encoded, Tokenizer, bos_id, token_ids
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Texts:
    """Texts of a file and their origin; `whole`: one running text, to be cut into windows."""

    items: tuple[str, ...]
    whole: bool
    path: str
    sha256: str


def read_texts(path: str | Path) -> Texts:
    """One running text, or for .jsonl one text per line: a string or an object with `text`."""
    file = read_text(path, "texts", "a UTF-8 text file or a .jsonl of texts")
    lines = file.path.suffix == ".jsonl"
    items = tuple(_of_json(line, at) for line, at in file.lines()) if lines else (file.text,)
    if not any(item.strip() for item in items):
        raise InputError(f"texts: expected text in {path}, found none")
    return Texts(items, not lines, str(file.path), file.sha256)


def _of_json(line: str, at: str) -> str:
    record = json_of(line, at)
    item = record.get("text") if isinstance(record, dict) else record
    if not isinstance(item, str):
        raise InputError(
            f"{at}: expected a text or an object with 'text', found {type(item).__name__}"
        )
    return item


def windows(
    texts: Texts, tokenizer: Tokenizer, *, length: int, most: int, prepend_bos: bool = True
) -> list[Encoded]:
    """At most `most` windows of `length` tokens, BOS counted; a JSONL gives one per line.

    The windows of a running text do not overlap; a last one of fewer than half the tokens is
    left out, because its tokens would be predicted from less than the others.
    """
    head = bos_id(tokenizer, prepend_bos)
    room = length - len(head)
    if room < 2:
        raise InputError(f"text_length: expected 3 or more, found {length}")
    items = texts.items if texts.whole else [t for t in texts.items if t.strip()][:most]
    tokens = token_ids(tokenizer, items)
    if texts.whole:
        starts = range(0, len(tokens[0]), room)[:most]
        rows = [tokens[0][start : start + room] for start in starts]
        rows = [row for row in rows if len(row) >= room / 2] or rows[:1]
    else:
        rows = [row[:room] for row in tokens]
    rows = [row for row in rows if len(head) + len(row) > 1]
    if not rows:
        raise InputError(f"texts: expected at least two tokens in {texts.path}, found fewer")
    return [Encoded(i, tuple(head + row)) for i, row in enumerate(rows)]
