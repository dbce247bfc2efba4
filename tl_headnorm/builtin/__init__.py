"""A tiny LLaMA-like model that answers multiple-choice questions, shipped with the package.

It gives examples and tests a model with grouped-query attention that loads in a second, needs
no network, and really does the task: it was trained on questions of a generated grammar and is
measured on questions whose facts training never showed.  ``python -m builtin_training.train``
makes data, tokenizer and weights again.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """Return the folder with the weights, the configuration and the tokenizer."""
    return _HERE / "model"


def questions_dir() -> Path:
    """Return the folder with the held-out ``test.jsonl`` and the few-shot ``train.jsonl``."""
    return _HERE / "questions"


__all__ = ["model_dir", "questions_dir"]
