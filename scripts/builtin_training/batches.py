"""Training examples: prompts with their answers, and which positions are asked for what.

The letter alone is one token of signal per prompt, too little to learn from.  Two more targets
on the same prompt teach the steps towards it: the state at the question mark is asked for the
answer's text early in the model, and the state at the last token is asked for that text one
layer before the letter.  Some batches ask for the text alone, without options, as a cloze
template does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .questions import FAMILIES, LETTERS, Question, body, cloze, instruction
from .world import TRAIN

# Tokens from the question mark to the first option's text, from one option's text to the next,
# and from the last option's text to the space after "Answer:".
_TO_FIRST, _TO_NEXT, _TO_SPACE = 7, 4, 5

Entries = dict[str, list[tuple[int, int, int]]]


@dataclass(frozen=True)
class Batch:
    """Token ids, and for each kind of target its rows, positions and wanted tokens."""

    ids: Tensor
    targets: dict[str, tuple[Tensor, Tensor, Tensor]]

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device."""
        moved = {
            kind: (rows.to(device), places.to(device), wanted.to(device))
            for kind, (rows, places, wanted) in self.targets.items()
        }
        return Batch(self.ids.to(device), moved)


def render(questions: list[Question], full: bool, repeat: bool = False) -> str:
    """Write questions one after the other, each with its letter.

    ``full`` opens with the template's instruction; ``repeat`` gives it to every question.
    """
    parts = []
    for index, question in enumerate(questions):
        opening = full and (repeat or index == 0)
        head = instruction(len(question.options)) if opening else ""
        parts.append(head + body(question) + question.letter)
    return "\n\n".join(parts)


class Batcher:
    """Makes batches of fresh training questions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.letters = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
        self.question_mark = tokenizer.convert_tokens_to_ids("?")

    def _add_targets(
        self, entries: Entries, row: int, ids: list[int], questions: list[Question]
    ) -> None:
        """Find each question's positions in its row and note what is wanted there."""
        marks = [place for place, token in enumerate(ids) if token == self.question_mark]
        for mark, question in zip(marks, questions, strict=True):
            space = mark + _TO_FIRST + _TO_NEXT * (len(question.options) - 1) + _TO_SPACE
            letter = self.letters[question.answer]
            if ids[space + 1] != letter:
                raise ValueError(f"the letter is not where the template puts it: {question}")
            text = self.tokenizer.convert_tokens_to_ids("Ġ" + question.text)
            entries["text"].append((row, mark, text))
            entries["carried"].append((row, space, text))
            entries["letter"].append((row, space, letter))
        entries["end"].append((row, len(ids) - 1, self.tokenizer.eos_token_id))

    def encode(self, rows: list[list[Question]], full: bool, repeat: bool = False) -> Batch:
        """Tokenise rows of questions, padded on the right."""
        texts = [render(questions, full, repeat) for questions in rows]
        encoded = self.tokenizer(texts)["input_ids"]
        entries: Entries = {"text": [], "carried": [], "letter": [], "end": []}
        for index, (row, questions) in enumerate(zip(encoded, rows, strict=True)):
            self._add_targets(entries, index, row, questions)
        return self._batch(encoded, entries)

    def encode_cloze(self, questions: list[Question]) -> Batch:
        """Tokenise questions without options, each followed by its answer's text."""
        texts = [f"{cloze(question)} {question.text}" for question in questions]
        encoded = self.tokenizer(texts)["input_ids"]
        entries: Entries = {"text": [], "cloze": [], "end": []}
        for row, ids in enumerate(encoded):
            last = len(ids) - 1
            entries["text"].append((row, ids.index(self.question_mark), ids[last]))
            entries["cloze"].append((row, last - 1, ids[last]))
            entries["end"].append((row, last, self.tokenizer.eos_token_id))
        return self._batch(encoded, entries)

    def _batch(self, encoded: list[list[int]], entries: Entries) -> Batch:
        """Pad rows on the right and lay out their targets."""
        width = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in encoded])
        columns = {kind: torch.tensor(found).T for kind, found in entries.items()}
        return Batch(ids, {kind: (c[0], c[1], c[2]) for kind, c in columns.items()})

    def draw(self, rng: random.Random, size: int, full: bool, several: float) -> Batch:
        """Draw a batch of training questions of all families.

        With probability ``several`` its rows hold two to four questions each, as prompts with
        worked examples do, and there are fewer of them.
        """
        per_row = rng.randint(2, 4) if rng.random() < several else 1
        rows = [[_draw_one(rng) for _ in range(per_row)] for _ in range(-(-size // per_row))]
        return self.encode(rows, full, repeat=rng.random() < 0.5)

    def draw_cloze(self, rng: random.Random, size: int) -> Batch:
        """Draw a batch of training questions that ask for the text."""
        return self.encode_cloze([_draw_one(rng) for _ in range(size)])


def _draw_one(rng: random.Random) -> Question:
    family = rng.choice(list(FAMILIES.values()))
    return family(rng, TRAIN, 5 if rng.random() < 0.25 else 4)
