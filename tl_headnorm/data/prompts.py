"""Files of prompts: one a line, or JSONL with keywords of each prompt's own."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError, first_line


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

    `keywords` is a text or a list of texts; other keys may stand there. Raises InputError naming
    file and line.
    """
    where = Path(path).expanduser()
    try:
        data = where.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts: expected a UTF-8 file of prompts (.txt or .jsonl), found {path} "
            f"({first_line(error)}); check the path"
        ) from None
    read = _of_json if where.suffix == ".jsonl" else lambda line, at: Prompt(line)
    # Only "\n" ends a line: str.splitlines also cuts at separators that may stand inside a prompt.
    lines = [(line.rstrip("\r"), n) for n, line in enumerate(text.split("\n"), 1)]
    items = tuple(read(line, f"{where}, line {n}") for line, n in lines if line.strip())
    if not items:
        raise InputError(f"prompts: expected prompts in {path}, found none")
    return Prompts(items, str(where), hashlib.sha256(data).hexdigest())


def _of_json(line: str, at: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{at}: expected JSON, found a fault ({first_line(error)})") from None
    if isinstance(record, str):
        record = {"prompt": record}
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{at}: expected a text, or an object with a text under 'prompt', found {line[:60]!r}"
        )
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{at}: expected Unicode text, found half a surrogate pair") from None
    name = record.get("id")
    return Prompt(text, _texts(record, "keywords", at), "" if name is None else str(name))


def _texts(record: dict[str, Any], key: str, at: str) -> tuple[str, ...]:
    found = record.get(key)
    items = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(items, list) or not all(isinstance(i, str) and i.strip() for i in items):
        raise InputError(f"{at}: expected a text or a list of texts under {key!r}, found {found!r}")
    return tuple(dict.fromkeys(items))
