"""Tokens that are steered to: keywords, the question, an option, keywords of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_headnorm.data.questions import LETTERS, Question
from tl_headnorm.data.spans import TokenText, encode_text, find_spans, positions
from tl_headnorm.data.templates import Sample, Template
from tl_headnorm.data.texts import Texts, windows
from tl_headnorm.data.tokens import Encoded, bos_id
from tl_headnorm.errors import InputError

# Of the private use area: in no question, and no template changes it.
_MARK = "\ue000"


@dataclass(frozen=True)
class Targets:
    """Samples with the tokens each is steered to, and the option meant (-1: none in particular).

    `kept` are the numbers of the samples among those given; the others have no such span.
    """

    samples: tuple[Encoded, ...]
    spans: tuple[tuple[int, ...], ...]
    options: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def span_of(self) -> dict[int, tuple[int, ...]]:
        """The span by sample index."""
        return {s.index: span for s, span in zip(self.samples, self.spans, strict=True)}

    def part(self, rows: Sequence[int]) -> "Targets":
        """Some of them."""
        return Targets(*(tuple(x[i] for i in rows) for x in self._columns()))

    def _columns(self) -> tuple[tuple[Any, ...], ...]:
        return self.samples, self.spans, self.options, self.kept


def shifted(spans: Sequence[int], offset: int, length: int) -> tuple[int, ...]:
    """Positions moved to the right by `offset` tokens; those beyond the prompt are left out."""
    return tuple(at + offset for at in spans if 0 <= at + offset < length)


def question_targets(
    questions: Sequence[Question],
    samples: Sequence[Sample],
    encoded: Sequence[Encoded],
    tokenizer: Any,
    template: Template,
    what: str | Sequence[str],
    *,
    part: str = "line",
    offset: int = 0,
    seed: int = 0,
) -> Targets:
    """The span of every question: `question`, `option:answer`, `option:wrong`, `option:A`, texts.

    `option:wrong` is drawn per question by (seed, its place in the file). Questions that have no
    such span (a text that is absent, option E of four, cut away) are left out. Raises InputError
    where none is left.
    """
    found: list[tuple[Encoded, tuple[int, ...], int, int]] = []
    reason: InputError | None = None
    for row, (question, sample, one) in enumerate(zip(questions, samples, encoded, strict=True)):
        text = _tokens(tokenizer, sample.prompt_text, one)
        option = -1
        try:
            if isinstance(what, str):
                option = _option(question, what, seed, one.index)
                ranges = _ranges(question, str(sample.prompt_text), template, what, option, part)
                places = _inside(text, ranges)
            else:
                places = positions(s for phrase in what for s in find_spans(text, phrase))
        except InputError as error:
            reason = reason or error
            continue
        places = shifted(places, offset, len(one))
        if places:
            found.append((one, places, option, row))
    if not found:
        raise InputError(
            f"spans: expected a question with such a span, found none"
            f"{f' ({reason})' if reason else ' (cut away, or moved beyond the prompt)'}"
        )
    return Targets(*(tuple(column) for column in zip(*found, strict=True)))


def option_spans(
    question: Question,
    sample: Sample,
    one: Encoded,
    tokenizer: Any,
    template: Template,
    part: str = "line",
) -> list[tuple[int, ...]]:
    """The tokens of every option of a question."""
    text = _tokens(tokenizer, sample.prompt_text, one)
    prompt = str(sample.prompt_text)
    return [
        _inside(text, _ranges(question, prompt, template, "option", i, part))
        for i in range(len(question.options))
    ]


def _tokens(tokenizer: Any, prompt: str, one: Encoded) -> TokenText:
    """The prompt with its tokens' characters, the very tokens the model is given."""
    begins = tokenizer.bos_token_id is not None and one.ids[0] == tokenizer.bos_token_id
    longest = len(one) if one.truncated else None
    text = encode_text(tokenizer, prompt, prepend_bos=begins, max_length=longest)
    assert text.ids == one.ids, "a prompt's tokens must not depend on who makes them"
    return text


def _option(question: Question, what: str, seed: int, index: int) -> int:
    if what == "question":
        return -1
    name = what.removeprefix("option:")
    if name == "answer":
        return question.answer
    if name == "wrong":
        others = [i for i in range(len(question.options)) if i != question.answer]
        return int(np.random.default_rng([seed, index]).choice(others))
    option = LETTERS.index(name)
    if option >= len(question.options):
        raise InputError(f"spans: expected an option among {question.letters}, found {name}")
    return option


def _ranges(
    question: Question, prompt: str, template: Template, what: str, option: int, part: str
) -> list[tuple[int, int]]:
    """Ranges of the prompt's characters: where a template puts the stem, or an option."""
    if what == "question":
        marked = replace(question, stem=_MARK)
        text = question.stem
    else:
        options = [_MARK if i == option else t for i, t in enumerate(question.options)]
        marked, text = replace(question, options=tuple(options)), question.options[option]
    pieces = template.render(marked).split(_MARK)
    rendered = text.join(pieces)
    begin = prompt.rfind(rendered.strip())
    if len(pieces) < 2 or rendered != template.render(question) or begin < 0:
        raise InputError(
            f"spans: expected the template to show {text!r} as it stands, found that it does not; "
            "use --keyword"
        )
    at, found = begin - (len(rendered) - len(rendered.lstrip())), []
    for piece in pieces[:-1]:
        at += len(piece)
        found.append((at, at + len(text)))
        at += len(text)
    if what == "question" or part == "text":
        return found
    return [_with_letter(prompt, a, b, question.letters[option], part) for a, b in found]


def _with_letter(prompt: str, start: int, stop: int, letter: str, part: str) -> tuple[int, int]:
    line = prompt.rfind("\n", 0, start) + 1
    at = prompt.rfind(letter, line, start)
    if at < 0:
        raise InputError(
            f"spans: expected the letter {letter} before its option's text on the same line, "
            f"found {prompt[line:stop]!r}; use --option_part text"
        )
    return (at, stop) if part == "line" else (at, at + len(letter))


def _inside(text: TokenText, ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens that share characters with a range; none where the range was cut away."""
    return tuple(
        sorted(
            {
                i
                for start, stop in ranges
                if start >= text.cut
                for i, (a, b) in enumerate(text.offsets)
                if a < stop and b > start and a < b
            }
        )
    )


def text_targets(
    texts: Texts,
    tokenizer: Any,
    keywords: Sequence[str],
    *,
    length: int,
    most: int,
    prepend_bos: bool = True,
    offset: int = 0,
) -> Targets:
    """Windows of texts (see data/texts.py) with the keywords in them; the others are left out."""
    rows = windows(texts, tokenizer, length=length, most=most, prepend_bos=prepend_bos)
    head = len(bos_id(tokenizer, prepend_bos))
    room = length - head
    items = texts.items if texts.whole else [t for t in texts.items if t.strip()]
    found = []
    places: tuple[int, ...] = ()
    for number, row in enumerate(rows):
        if number == 0 or not texts.whole:
            source = items[0] if texts.whole else items[number]
            n_tokens = room * len(rows) if texts.whole else room
            places = _places(source, tokenizer, keywords, n_tokens)
        first = number * room if texts.whole else 0
        inside = [head + at - first for at in places if first <= at < first + len(row) - head]
        moved = shifted(inside, offset, len(row))
        if moved:
            found.append((row, moved, -1, number))
    if not found:
        raise InputError(
            f"keyword: expected {', '.join(map(repr, keywords))} in a window of {texts.path}, "
            "found it in none; take another keyword, or raise --max_texts"
        )
    return Targets(*(tuple(column) for column in zip(*found, strict=True)))


def _places(text: str, tokenizer: Any, keywords: Sequence[str], most: int) -> tuple[int, ...]:
    """Tokens of the keywords among the first `most` tokens of a text without BOS."""
    whole = encode_text(tokenizer, text, prepend_bos=False)
    ids, offsets = whole.ids[:most], whole.offsets[:most]
    part = TokenText(text[: offsets[-1][1]], ids, offsets)
    found: set[int] = set()
    for keyword in keywords:
        try:
            found.update(positions(find_spans(part, keyword)))
        except InputError:  # absent here; it may stand in another text
            continue
    return tuple(sorted(found))
