"""Multiple-choice questions: what one is, how a record becomes one, and the dataset registry."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex, overload

from tl_headnorm.data.readers import Record, Source, open_split
from tl_headnorm.errors import InputError, unknown
from tl_headnorm.settings import parse_shard

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `answer` is the position of the right option."""

    id: str
    stem: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    answer: int
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def letters(self) -> str:
        """The letters A, B, ... shown in the prompt, whatever the file's own labels."""
        return LETTERS[: len(self.options)]

    @property
    def answer_letter(self) -> str:
        return self.letters[self.answer]


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """Questions in file order, what was skipped and why, and where they came from."""

    items: tuple[Question, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    name: str = "custom"
    split: str = ""
    path: str | None = None
    sha256: str | None = None
    data_dir: str | None = None
    shard: str | None = None
    places: range | None = None  # indices in the dataset, of a shard

    def __repr__(self) -> str:
        """One line: where they came from, how many, and what was skipped."""
        skipped = "".join(f", {n} skipped ({why})" for why, n in self.skipped.items())
        source = f"{self.name} {self.split}".strip()
        return f"Questions({source}: {len(self.items):,} questions{skipped})"

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "Questions": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Question | Questions":
        """A question, or for a slice the questions with the same provenance."""
        if not isinstance(index, slice):
            return self.items[index]
        return replace(self, items=self.items[index], places=self.places and self.places[index])

    def __iter__(self) -> Iterator[Question]:
        return iter(self.items)


class BadRecord(ValueError):
    """A record that is no question; the message says what is wrong with it."""


DatasetReader = Callable[[str | None, str], Source]
_ARC = "allenai/ai2_arc"
DATASETS: dict[str, DatasetReader] = {
    "arc_challenge": partial(open_split, hub=(_ARC, "ARC-Challenge")),
    "arc_easy": partial(open_split, hub=(_ARC, "ARC-Easy")),
    # A file or directory in AI2's or the Hugging Face layout of ARC; never the hub.
    "multiple_choice": partial(open_split, hub=None),
}


def register_dataset(name: str) -> Callable[[DatasetReader], DatasetReader]:
    """Add a dataset: a function (data_dir, split) -> Source, whose records `parse_record` knows.

    A record may also be a finished `Question`.
    """

    def add(reader: DatasetReader) -> DatasetReader:
        DATASETS[name] = reader
        return reader

    return add


@register_dataset("builtin:questions")
def _builtin_questions(data_dir: str | None, split: str) -> Source:
    """The built-in model's held-out questions (test) and examples for few-shot (train)."""
    from tl_headnorm.builtin import questions_dir

    if data_dir is not None:
        raise InputError(
            f"data_dir: expected none with the dataset builtin:questions, found {data_dir}; "
            "leave it out or choose another --dataset"
        )
    return open_split(str(questions_dir()), split, hub=None)


def _text(record: Mapping[str, object], key: str, where: str = "record") -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecord(f"expected text under {key!r} in the {where}, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _choices(question: object, record: Mapping[str, object]) -> tuple[str, list[Any], list[Any]]:
    """(stem, option texts, labels) of either layout."""
    if isinstance(question, Mapping):  # AI2: question.stem, question.choices[]
        choices = question.get("choices")
        if not isinstance(choices, Sequence) or isinstance(choices, str):
            raise BadRecord(f"expected a list under question.choices, found {_kind(choices)}")
        if not all(isinstance(choice, Mapping) for choice in choices):
            raise BadRecord("expected objects with text and label in question.choices")
        stem = _text(question, "stem", "question")
        return stem, [c.get("text") for c in choices], [c.get("label") for c in choices]
    stem = _text(record, "question")  # Hugging Face: question, choices.text, choices.label
    choices = record.get("choices")
    known = choices if isinstance(choices, Mapping) else {}
    texts, labels = known.get("text"), known.get("label")
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise BadRecord("expected choices with the lists text and label")
    return stem, texts, labels


def parse_record(record: object, where: str = "") -> Question:
    """A question from AI2's layout (`question.stem`) or Hugging Face's (`choices.text`).

    Labels may be letters or digits; `answerKey` must be one of them (or its counterpart:
    "1" for "A"). Raises BadRecord saying what is wrong.
    """
    if isinstance(record, Question):
        return record
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object, found {_kind(record)}")
    stem, texts, labels = _choices(record.get("question"), record)
    if not stem.strip():
        raise BadRecord("expected a question, found an empty one")
    if not texts:
        raise BadRecord("expected options, found none")
    if len(texts) != len(labels):
        raise BadRecord(f"expected a label for each option, found {len(labels)} for {len(texts)}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise BadRecord(f"expected text in every option, found {text!r}")
    names = [_label(label) for label in labels]
    if len(set(names)) != len(names):
        raise BadRecord(f"expected different labels, found {names}")
    for text in (stem, *texts, *names):
        _check_unicode(text)
    answer = _answer_position(record.get("answerKey"), names)
    known = {"id", "question", "choices", "answerKey"}
    meta = {key: value for key, value in record.items() if key not in known}
    identity = _identity(record.get("id"), where)
    return Question(identity, stem, tuple(texts), tuple(names), answer, {**meta, "source": where})


def _label(label: object) -> str:
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise BadRecord(f"expected a label of text for each option, found {_kind(label)}")
    return str(label).strip()


def _identity(given: object, where: str) -> str:
    """The id; where the record has none, its file and line."""
    if given is None or given == "":
        return where
    if isinstance(given, bool) or not isinstance(given, (str, int, float)):
        raise BadRecord(f"expected text or a number under 'id', found {_kind(given)}")
    _check_unicode(str(given))
    return str(given)


def _check_unicode(text: str) -> None:
    """JSON can spell half a character (\\ud800), which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"expected Unicode text, found half a surrogate pair ({text[error.start]!r})"
        ) from None


def _answer_position(key: object, labels: list[str]) -> int:
    """Position of answerKey among the labels; letters and digits count as each other."""
    if key is None or isinstance(key, (dict, list, bool)):
        raise BadRecord(f"expected a label under 'answerKey', found {_kind(key)}")
    name = str(key).strip()
    if name in labels:
        return labels.index(name)
    other = str(LETTERS.find(name) + 1) if name in set(LETTERS) else None
    if name.isdecimal() and 1 <= int(name) <= len(LETTERS):
        other = LETTERS[int(name) - 1]
    if other in labels:
        return labels.index(other)
    raise BadRecord(f"expected answerKey among the labels {labels}, found {key!r}")


def load_questions(
    dataset: str = "arc_challenge",
    data_dir: str | Path | None = None,
    split: str = "test",
    *,
    max_samples: int = -1,
    n_options: Sequence[int] = (4, 5),
    on_bad_record: str = "error",
    shard: str | None = None,
) -> Questions:
    """The first `max_samples` usable questions of a dataset, in file order (-1: all).

    Usable: as many options as `n_options` allows; the others are counted in `skipped` by
    reason. A malformed record raises InputError naming file, line and fault, or with
    `on_bad_record="skip"` is counted too. `shard="K/N"` takes every N-th of these questions from
    the K-th on, and counts what was skipped before each of them: over all N parts every question
    and every skipped record is there once. Memory holds the part's own questions only.
    Raises InputError where no question is left.
    """
    if dataset not in DATASETS:
        raise unknown("dataset", dataset, DATASETS)
    folder = None if data_dir is None else str(data_dir)
    part, parts = parse_shard(shard) or (1, 1)
    source = DATASETS[dataset](folder, split)
    records = _usable(source.records, set(n_options), on_bad_record) if max_samples else ()
    items, skipped, count = _shard(records, part, parts, max_samples)
    if not items:
        raise _no_question(source.path, count, +skipped, n_options, shard)
    return Questions(
        tuple(items), dict(+skipped), dataset, split, source.path, source.sha256(), folder,
        shard, range(part - 1, count, parts),
    )  # fmt: skip


def _shard(
    records: Iterable[Question | str], part: int, parts: int, most: int
) -> tuple[list[Question], Counter[str], int]:
    """(questions of the part, records skipped before each by reason, questions of all parts)."""
    items: list[Question] = []
    skipped: Counter[str] = Counter()
    count = 0
    for found in records:
        mine = count % parts == part - 1
        if isinstance(found, str):
            skipped[found] += mine
            continue
        if mine:
            items.append(found)
        count += 1
        if count == most:
            break
    return items, skipped, count


def _no_question(
    path: str, count: int, skipped: Counter[str], n_options: Sequence[int], shard: str | None
) -> InputError:
    if count:
        return InputError(
            f"shard: expected at most as many parts as questions, found {count} in {path} for "
            f"part {shard}; use {count} parts or fewer"
        )
    reasons = ", ".join(f"{reason} ({n})" for reason, n in skipped.items()) or "it is empty"
    return InputError(
        f"no usable question in {path}: expected questions with "
        f"{' or '.join(map(str, n_options))} options, found none: {reasons}"
    )


def _usable(
    records: Iterable[Record], n_options: set[int], on_bad_record: str
) -> Iterator[Question | str]:
    """Every usable question, and for every other record the reason why it is none."""
    ids: set[str] = set()
    for where, record in records:
        try:
            if isinstance(record, BaseException):
                raise BadRecord(str(record))
            question = parse_record(record, where)
            if question.id in ids:
                raise BadRecord(
                    f"expected an id of its own, found {question.id!r} again, which an earlier "
                    "question has"
                )
        except BadRecord as error:
            if on_bad_record == "skip":
                yield "malformed record"
                continue
            raise InputError(
                f"{where}: {error}; mend it, or pass --on_bad_record skip to count and skip"
            ) from None
        ids.add(question.id)
        n = len(question.options)
        yield question if n in n_options else f"{n} options"
