"""What heads are judged by: the answer's letter, the answer's text, or the text itself."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.templates import text_target
from tl_headnorm.data.texts import read_texts, windows
from tl_headnorm.data.tokens import bos_id, common_prefix_length, token_ids
from tl_headnorm.engine.protocol import Tail
from tl_headnorm.engine.select import engine_of
from tl_headnorm.measures import last_real_position


@dataclass(frozen=True)
class Item:
    """Tokens and what is to be predicted: one of `letter_ids`, or the tokens from `start` on."""

    index: int
    ids: tuple[int, ...]
    letter_ids: tuple[int, ...] = ()
    answer: int = 0
    start: int = 1

    def __len__(self) -> int:
        return len(self.ids)


class LetterLoss:
    """-log p(right letter), p over the options' letters alone; only they are unembedded."""

    name = "letter"

    def tail(self, mask: Int[Tensor, "row pos"]) -> Tail | None:
        return Tail(last_real_position(mask), z_everywhere=False, resid=True)

    def logprobs(
        self, tl: Any, resid: Float[Tensor, "row 1 d_model"], items: Sequence[Item]
    ) -> Float[Tensor, "row option"]:
        width = max(len(item.letter_ids) for item in items)
        padded = [i.letter_ids + i.letter_ids[:1] * (width - len(i.letter_ids)) for i in items]
        logits = engine_of(tl).token_logits(resid[:, 0], torch.tensor(padded, device=resid.device))
        number = torch.tensor([len(i.letter_ids) for i in items], device=resid.device)
        absent = torch.arange(width, device=resid.device) >= number[:, None]
        return logits.masked_fill(absent, -torch.inf).log_softmax(-1)

    def __call__(
        self, tl: Any, resid: Tensor, mask: Tensor, ids: Tensor, items: Sequence[Item]
    ) -> Float[Tensor, " row"]:
        answers = torch.tensor([i.answer for i in items], device=resid.device)
        return -self.logprobs(tl, resid, items).gather(1, answers[:, None])[:, 0]


class TokenLoss:
    """-log p of the tokens from `start` on: their sum (text) or their mean (lm)."""

    def __init__(self, mean: bool) -> None:
        self.mean, self.name = mean, "lm" if mean else "text"

    def tail(self, mask: Tensor) -> Tail | None:
        return None

    def __call__(
        self, tl: Any, resid: Tensor, mask: Tensor, ids: Tensor, items: Sequence[Item]
    ) -> Float[Tensor, " row"]:
        nth = mask.cumsum(1) - 1  # the place of a real token in its own text
        starts = torch.tensor([max(i.start, 1) for i in items], device=ids.device)
        targets = mask.bool() & (nth >= starts[:, None])
        row, at = targets.nonzero(as_tuple=True)
        logits = engine_of(tl).logits(resid[row, at - 1][None])[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = -wide.log_softmax(-1).gather(1, ids[row, at][:, None])[:, 0]
        sums = nll.new_zeros(len(ids)).index_add(0, row, nll)
        return sums / targets.sum(1) if self.mean else sums


Loss = LetterLoss | TokenLoss


def make_loss(name: str) -> Loss:
    return LetterLoss() if name == "letter" else TokenLoss(mean=name == "lm")


def question_items(
    model: Any, questions: Sequence[Question], settings: AttributeSettings
) -> tuple[list[Item], Prepared]:
    """Items of the loss letter or text, in dataset order, and what to record of the prompts."""
    auto = "cloze" if settings.loss == "text" else "arc_mcq_v1"
    name = auto if settings.template_name == "auto" else settings.template_name
    letters = settings.loss == "letter"
    chosen = settings.updated(template_name=name, score_answers=letters)
    prepared = prepare(model.tokenizer, model.n_ctx, questions, chosen)
    if letters:
        items = [
            Item(e.index, e.ids, e.letter_ids, q.answer)
            for e, q in zip(prepared.encoded, questions, strict=True)
        ]
    else:
        limit = min(settings.max_length, model.n_ctx)
        items = _text_items(model.tokenizer, prepared, questions, settings.prepend_bos, limit)
    return items, prepared


def _text_items(
    tokenizer: Any,
    prepared: Prepared,
    questions: Sequence[Question],
    prepend_bos: bool,
    limit: int,
) -> list[Item]:
    head, items = bos_id(tokenizer, prepend_bos), []
    for index, (sample, question) in enumerate(zip(prepared.samples, questions, strict=True)):
        prompt = sample.prompt_text
        bare, whole = token_ids(tokenizer, [prompt, prompt + text_target(question)])
        start = common_prefix_length(bare, whole)
        excess = max(0, len(head) + len(whole) - limit)
        ids = tuple(head + whole[excess:])
        items.append(Item(index, ids, start=max(1, len(head) + start - excess)))
    return items


def text_file_items(model: Any, settings: AttributeSettings) -> list[Item]:
    """Windows of a text file, each with its own BOS; every token but the first is predicted."""
    rows = windows(
        read_texts(str(settings.texts)),
        model.tokenizer,
        length=min(settings.max_length, model.n_ctx),
        most=settings.max_samples if settings.max_samples > 0 else 10**9,
        prepend_bos=settings.prepend_bos,
    )
    return [Item(row.index, row.ids) for row in rows]


def corrupted_items(
    model: Any,
    items: Sequence[Item],
    questions: Sequence[Question],
    settings: AttributeSettings,
) -> list[Item]:
    """Prompts that call for another answer, aligned with the originals at their ends.

    letter: the same options, each moved up by one letter. text, lm: the tokens before what is
    predicted, shuffled but for the first (for lm, all but the first).
    """
    if settings.loss == "letter":
        moved = [replace(q, options=(*q.options[1:], q.options[0])) for q in questions]
        found, _ = question_items(model, moved, settings)
        return [replace(f, answer=i.answer) for f, i in zip(found, items, strict=True)]
    generator = random.Random(settings.seed)
    shuffled = []
    for item in items:
        end = item.start if settings.loss == "text" else len(item)
        middle = list(item.ids[1:end])
        generator.shuffle(middle)
        shuffled.append(replace(item, ids=(item.ids[0], *middle, *item.ids[max(end, 1) :])))
    return shuffled
