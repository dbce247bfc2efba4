"""Losses that heads are scored by: of the answer's letter, the answer's text, the text itself."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.templates import text_target
from tl_headnorm.data.texts import read_texts, windows
from tl_headnorm.data.tokens import Encoded, bos_id, common_prefix_length, token_ids
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import Letters, Loss, Resid, log_softmax
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class TokenLoss(Loss):
    """-log p of the tokens from `starts[index]` on (default: the second): their sum or mean."""

    mean: bool
    starts: Mapping[int, int] = field(default_factory=dict)

    @property
    def last_only(self) -> bool:
        return False

    def start(self, item: Encoded) -> int:
        """Position of the first token that is predicted."""
        return max(self.starts.get(item.index, 1), 1)

    def loss(self, rows: Rows, resid: Resid) -> Float[Tensor, " batch"]:
        nth = rows.mask.cumsum(1) - 1  # the place of a real token in its own text
        starts = torch.tensor([self.start(s) for s in rows.samples], device=nth.device)
        targets = rows.mask.bool() & (nth >= starts[:, None])
        row, at = targets.nonzero(as_tuple=True)
        logits = rows.model.engine.logits(resid[row, at - 1][None])[0]
        nll = -log_softmax(logits).gather(1, rows.ids[row, at][:, None])[:, 0]
        sums = nll.new_zeros(len(rows)).index_add(0, row, nll)
        return sums / targets.sum(1) if self.mean else sums


def question_items(
    model: Model, questions: Sequence[Question], settings: AttributeSettings
) -> tuple[list[Encoded], Loss, Prepared]:
    """Items in dataset order, their loss (letter or text), and what to record of the prompts."""
    auto = "cloze" if settings.loss == "text" else "arc_mcq_v1"
    name = auto if settings.template_name == "auto" else settings.template_name
    letters = settings.loss == "letter"
    chosen = settings.updated(template_name=name, score_answers=letters)
    prepared = prepare(model.tokenizer, model.n_ctx, questions, chosen)
    if letters:
        answers = {e.index: q.answer for e, q in zip(prepared.encoded, questions, strict=True)}
        return prepared.encoded, Letters(answers), prepared
    limit = min(settings.max_length, model.n_ctx)
    return *_text_items(model.tokenizer, prepared, questions, settings.prepend_bos, limit), prepared


def _text_items(
    tokenizer: Any,
    prepared: Prepared,
    questions: Sequence[Question],
    prepend_bos: bool,
    limit: int,
) -> tuple[list[Encoded], TokenLoss]:
    head, items, starts = bos_id(tokenizer, prepend_bos), [], {}
    for index, (sample, question) in enumerate(zip(prepared.samples, questions, strict=True)):
        prompt = sample.prompt_text
        bare, whole = token_ids(tokenizer, [prompt, prompt + text_target(question)])
        start = common_prefix_length(bare, whole)
        excess = max(0, len(head) + len(whole) - limit)
        items.append(Encoded(index, tuple(head + whole[excess:])))
        starts[index] = len(head) + start - excess
    return items, TokenLoss(mean=False, starts=starts)


def text_file_items(model: Model, settings: AttributeSettings) -> list[Encoded]:
    """Windows of a text file, each with its own BOS; every token but the first is predicted."""
    return windows(
        read_texts(str(settings.texts)),
        model.tokenizer,
        length=min(settings.max_length, model.n_ctx),
        most=settings.max_samples if settings.max_samples > 0 else 10**9,
        prepend_bos=settings.prepend_bos,
    )


def corrupted_items(
    model: Model,
    items: Sequence[Encoded],
    loss: Loss,
    questions: Sequence[Question],
    settings: AttributeSettings,
) -> list[Encoded]:
    """Prompts that call for another answer, aligned with the originals at their ends.

    letter: the same options, each moved up by one letter. text, lm: the tokens before what is
    predicted, shuffled but for the first (for lm, all but the first).
    """
    if settings.loss == "letter":
        moved = [replace(q, options=(*q.options[1:], q.options[0])) for q in questions]
        return question_items(model, moved, settings)[0]
    generator = random.Random(settings.seed)
    shuffled = []
    for item in items:
        partly = settings.loss == "text" and isinstance(loss, TokenLoss)
        end = loss.start(item) if partly else len(item)  # type: ignore[attr-defined]
        middle = list(item.ids[1:end])
        generator.shuffle(middle)
        shuffled.append(replace(item, ids=(item.ids[0], *middle, *item.ids[max(end, 1) :])))
    return shuffled
