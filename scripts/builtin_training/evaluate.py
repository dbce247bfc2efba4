"""Accuracy of the letter on a question file, by family.

``python -m builtin_training.evaluate`` measures the shipped model on the shipped questions.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_headnorm.builtin import model_dir, questions_dir

from . import dataset
from .questions import LETTERS, Question, prompt

_BATCH = 50


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], n_options: Sequence[int]
) -> list[int]:
    """Return for each prompt the option whose letter the model finds likeliest."""
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)), device=model.device)
    found: list[int] = []
    for start in range(0, len(prompts), _BATCH):
        encoded = tokenizer(list(prompts[start : start + _BATCH]))["input_ids"]
        width = max(map(len, encoded))
        pad = tokenizer.pad_token_id
        # Padding stands on the right, where a causal model's last real token never sees it.
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in encoded])
        logits = model(input_ids=ids.to(model.device)).logits
        for row, tokens in enumerate(encoded):
            scores = logits[row, len(tokens) - 1, letters[: n_options[start + row]]]
            found.append(int(scores.argmax()))
    return found


def accuracy(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question], shots: str = ""
) -> dict[str, float]:
    """Return the share of right letters by family, and over all as ``overall``."""
    prompts = [shots + prompt(question) for question in questions]
    sizes = [len(question.options) for question in questions]
    hits: dict[str, list[bool]] = defaultdict(list)
    found = answers(model, tokenizer, prompts, sizes)
    for question, answer in zip(questions, found, strict=True):
        hits[question.family].append(answer == question.answer)
        hits["overall"].append(answer == question.answer)
    return {family: sum(right) / len(right) for family, right in hits.items()}


def worked_examples(questions: Sequence[Question], count: int, seed: int = 0) -> str:
    """Write some questions with their letters, to stand before a prompt."""
    drawn = random.Random(seed).sample(list(questions), count)
    return "".join(f"{prompt(question)}{question.letter}\n\n" for question in drawn)


def report(folder: Path, questions: Path) -> None:
    """Print the accuracy of a saved model in both precisions, with and without examples."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test, train = dataset.read(questions / "test.jsonl"), dataset.read(questions / "train.jsonl")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for count in (0, 2):
            scores = accuracy(model, tokenizer, test, worked_examples(train, count))
            shown = ", ".join(f"{family} {score:.1%}" for family, score in scores.items())
            print(f"{str(dtype).removeprefix('torch.')}, {count} examples: {shown}", flush=True)


def main() -> None:
    """Measure a model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--questions", type=Path, default=questions_dir())
    args = parser.parse_args()
    report(args.model, args.questions)


if __name__ == "__main__":
    main()
