"""Files of prompts: one a line, or JSONL with keywords of each prompt's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tl_headnorm.data.lines import TextFile, json_of, read_text
from tl_headnorm.errors import InputError

_KEYS = ("prompt", "keywords", "must_include", "id")


@dataclass(frozen=True)
class Prompt:
    """A prompt, the keywords that matter in it, and the texts that its answer must hold."""

    text: str
    keywords: tuple[str, ...] = ()
    id: str = ""
    must_include: tuple[str, ...] = ()


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
    if file.path.suffix != ".jsonl":
        return _prompts(file, [Prompt(line) for line, _ in file.lines()])
    return _prompts(file, [_prompt(json_of(line, at), at) for line, at in file.lines()])


def read_instructions(path: str | Path) -> Prompts:
    """A JSONL of `prompt`, `keywords` and optionally `must_include` and `id`, no other key.

    `must_include` defaults to the keywords, `id` to the prompt's number from 1.
    """
    file = read_text(path, "prompts", "a JSONL of prompt and keywords")
    found = []
    for number, (line, at) in enumerate(file.lines(), 1):
        record = json_of(line, at)
        prompt = _prompt(record, at)
        unknown = sorted(set(record) - set(_KEYS)) if isinstance(record, dict) else []
        if unknown:
            raise InputError(f"{at}: expected {', '.join(_KEYS)}, found {unknown[0]!r}")
        if not prompt.keywords:
            raise InputError(f"{at}: expected at least one text under keywords, found none")
        if record.get("must_include") is None:
            prompt = replace(prompt, must_include=prompt.keywords)
        found.append(replace(prompt, id=prompt.id or str(number)))
    return _prompts(file, found)


def _prompts(file: TextFile, items: Sequence[Prompt]) -> Prompts:
    if not items:
        raise InputError(f"prompts: expected prompts in {file.path}, found none")
    return Prompts(tuple(items), str(file.path), file.sha256)


def _prompt(record: object, at: str) -> Prompt:
    fields = record if isinstance(record, dict) else {"prompt": record}
    text = fields.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{at}: expected a text, or an object with a text under 'prompt', found "
            f"{str(record)[:60]!r}"
        )
    keywords, required = (_texts(fields.get(key), key, at) for key in _KEYS[1:3])
    name = fields.get("id")
    return Prompt(text, keywords, "" if name is None else str(name), required)


def _texts(found: object, key: str, at: str) -> tuple[str, ...]:
    """A text or a list of texts, each once; none for null."""
    items = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(items, list) or not all(isinstance(i, str) and i.strip() for i in items):
        raise InputError(f"{at}: expected a text or a list of texts under {key!r}, found {found!r}")
    return tuple(dict.fromkeys(items))
