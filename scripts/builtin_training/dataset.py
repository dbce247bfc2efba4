"""The shipped question files: rows in the layout of the ARC data sets."""

from __future__ import annotations

import json
from pathlib import Path

from .questions import LETTERS, Question, balanced
from .world import SPLITS, TEST, TRAIN

SEED = 0
COUNTS = {TEST: 500, TRAIN: 100}
# One question in eight is labelled with digits, as some questions of the ARC sets are.
DIGITS_ONE_IN = 8


def to_row(question: Question, split: str, index: int) -> dict[str, object]:
    """Lay a question out as the ARC data sets do, with its family beside it."""
    n = len(question.options)
    digits = index % DIGITS_ONE_IN == DIGITS_ONE_IN - 1
    labels = [str(i + 1) for i in range(n)] if digits else list(LETTERS[:n])
    return {
        "id": f"tiny-{split}-{index:04d}",
        "question": question.stem,
        "choices": {"text": list(question.options), "label": labels},
        "answerKey": labels[question.answer],
        "family": question.family,
    }


def rows(split: str) -> list[dict[str, object]]:
    """Make the rows of one split from the fixed seed."""
    questions = balanced(split, SEED, COUNTS[split])
    return [to_row(question, split, index) for index, question in enumerate(questions)]


def to_question(row: dict) -> Question:
    """Read a row back; its facts are not in the file and stay empty."""
    options = tuple(row["choices"]["text"])
    answer = row["choices"]["label"].index(row["answerKey"])
    return Question(row["family"], row["question"], options, answer, ())


def as_text(split: str) -> str:
    """Return one split's file as it is shipped."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))


def write(folder: Path) -> None:
    """Write ``test.jsonl`` and ``train.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text(as_text(split), encoding="utf-8")


def read(path: Path) -> list[Question]:
    """Read a question file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [to_question(json.loads(line)) for line in lines]
