"""Files of prompts: one a line, or JSONL with keywords of each prompt's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_headnorm.data.lines import json_of, read_text
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """A prompt and the keywords that matter in it."""

    text: str
    keywords: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Prompts:
    """Prompts of a file and where they came from."""

    items: tuple[Prompt, ...]
    path: str
    sha256: str


def read_prompts(path: str | Path) -> Prompts:
    """A .txt with one prompt a line, or a .jsonl: a text, or {prompt, keywords, id}.

    `keywords` is a text or a list of texts; other keys are ignored. Raises InputError naming
    file and line.
    """
    file = read_text(path, "prompts", "a UTF-8 file of prompts (.txt or .jsonl)")
    read = _of_json if file.path.suffix == ".jsonl" else lambda line, at: Prompt(line)
    items = tuple(read(line, at) for line, at in file.lines())
    if not items:
        raise InputError(f"prompts: expected prompts in {path}, found none")
    return Prompts(items, str(file.path), file.sha256)


def _of_json(line: str, at: str) -> Prompt:
    record: Any = json_of(line, at)
    if isinstance(record, str):
        record = {"prompt": record}
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{at}: expected a text, or an object with a text under 'prompt', found {line[:60]!r}"
        )
    name = record.get("id")
    return Prompt(text, texts_under(record, "keywords", at), "" if name is None else str(name))


def texts_under(record: dict[str, Any], key: str, at: str) -> tuple[str, ...]:
    """The text or texts under a key, each once; none where the key is not there."""
    found = record.get(key)
    items = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(items, list) or not all(isinstance(i, str) and i.strip() for i in items):
        raise InputError(f"{at}: expected a text or a list of texts under {key!r}, found {found!r}")
    return tuple(dict.fromkeys(items))
