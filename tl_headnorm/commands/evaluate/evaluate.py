"""Answering: by the letter after the prompt, or by the likelihood of each option's text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.commands.evaluate.settings import EvaluateSettings
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.templates import Template, get_template
from tl_headnorm.data.tokens import Encoded, Tokenizer, bos_id, common_prefix_length, token_ids
from tl_headnorm.engine.protocol import Start
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class ClozeScores:
    """Per question, log p(option text | prompt) and the texts' lengths in characters."""

    logprobs: list[np.ndarray]
    characters: list[np.ndarray]

    def predicted(self, normalised: bool) -> np.ndarray:
        """Position of the best option: by the sum, or by the sum per character."""
        scores = self.logprobs
        if normalised:
            scores = [s / c for s, c in zip(scores, self.characters, strict=True)]
        return np.array([int(np.argmax(s)) for s in scores])


@torch.inference_mode()
def score_cloze(
    model: Model,
    questions: Sequence[Question],
    template: Template,
    settings: EvaluateSettings = EvaluateSettings(),  # noqa: B008 (frozen)
    *,
    progress: bool = False,
) -> ClozeScores:
    """Sum of log p over the tokens of " " + option text, after the rendered prompt.

    Prompt and option are tokenised together; what differs from the prompt alone is scored. The
    question's keys and values are computed once and shared by its options. Source of the
    definition: EleutherAI's lm-evaluation-harness, multiple_choice tasks.
    """
    logprobs, characters = [], []
    for question in tqdm(questions, unit="question", disable=not progress, desc="cloze"):
        rows = _option_rows(
            model.tokenizer, question, template, settings.prepend_bos,
            min(settings.max_length, model.n_ctx),
        )  # fmt: skip
        logprobs.append(_score_options(model, rows, settings.padding_side))
        characters.append(np.array([len(text) for text in question.options], dtype=np.float64))
    return ClozeScores(logprobs, characters)


def _option_rows(
    tokenizer: Tokenizer, question: Question, template: Template, prepend_bos: bool, max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """(tokens of prompt + option, where the option begins) for every option."""
    prompt = template.render(question)
    texts = [prompt, *(f"{prompt} {option}" for option in question.options)]
    bare, *wholes = token_ids(tokenizer, texts)
    head = bos_id(tokenizer, prepend_bos)
    # All options lose the same tokens of the question, so that they stay comparable.
    excess = max(0, max(map(len, wholes)) + len(head) - max_length)
    rows = []
    for whole in wholes:
        start = common_prefix_length(bare, whole)
        rows.append((tuple(head + whole[excess:]), len(head) + start - excess))
    return rows


def _score_options(
    model: Model, rows: Sequence[tuple[tuple[int, ...], int]], padding_side: str
) -> np.ndarray:
    """Log-probability of each row's option; the tokens before all of them are run once."""
    # The last shared token is run again with each option: it predicts the option's first.
    shared = max(0, min(start for _, start in rows) - 1)
    samples = [Encoded(i, ids) for i, (ids, _) in enumerate(rows)]
    batch = make_batch(samples, padding_side, skip=shared)
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    prefix = model.engine.run_prefix(rows[0][0][:shared]) if shared else None
    resid = model.engine.run(Start(ids), mask, prefix=prefix)
    totals = []
    for i, (tokens, start) in enumerate(rows):
        real = mask[i].bool().nonzero().flatten()
        first = max(start, 1) - shared  # without BOS the very first token is predicted by nothing
        at, targets = real[first - 1 : -1], ids[i, real[first:]]
        logits = model.engine.logits(resid[i : i + 1, at])[0]
        wide = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        totals.append(float(wide.gather(1, targets[:, None]).sum()))
        assert len(targets) == len(tokens) - max(start, 1)
    return np.array(totals)


def evaluate(
    model: Model, questions: Sequence[Question], settings: EvaluateSettings, progress: bool = True
) -> xr.Dataset:
    """Accuracy by letter or by text; `attrs["scoring"]` names which, for they do not compare.

    letter: argmax of the next-token logits over the options' letters. cloze: `acc`, argmax of
    the summed log-probability of the option's text, and `acc_norm`, the same per character.
    """
    score = _by_letter if settings.scoring == "letter" else _by_text
    template, found = score(model, questions, settings, progress)
    answers = np.array([question.answer for question in questions])
    correct = {key: guesses == answers for key, guesses in found.items()}
    result = xr.Dataset(
        {f"{key}_predicted": ("sample", guesses) for key, guesses in found.items()}
        | {f"{key}_correct": ("sample", right) for key, right in correct.items()},
        coords={"sample_id": ("sample", np.array([q.id for q in questions], dtype=object))},
    )
    result.attrs = {
        "scoring": settings.scoring,
        "template": template.name,
        "num_processed": len(answers),
        **{key: float(right.mean()) for key, right in correct.items()},
        **{f"{key}_stderr": _standard_error(right) for key, right in correct.items()},
    }
    return result


Predictions = tuple[Template, dict[str, np.ndarray]]


def _by_letter(
    model: Model, questions: Sequence[Question], settings: EvaluateSettings, progress: bool
) -> Predictions:
    name = settings.template_name
    settings = settings.updated(template_name="arc_mcq_v1" if name == "auto" else name)
    prepared = prepare(model.tokenizer, model.n_ctx, questions, settings)
    found = measure_samples(
        model, prepared.encoded, score=True, progress=progress, batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens, padding_side=settings.padding_side,
    )  # fmt: skip
    return get_template(settings.template_name, settings.template), {"acc": found.predicted}


def _by_text(
    model: Model, questions: Sequence[Question], settings: EvaluateSettings, progress: bool
) -> Predictions:
    if settings.chat:
        raise InputError(
            "chat: expected scoring letter, found cloze, which continues a text; use "
            "--scoring letter or --chat false"
        )
    name = "cloze" if settings.template_name == "auto" else settings.template_name
    template = get_template(name, settings.template)
    scores = score_cloze(model, questions, template, settings, progress=progress)
    return template, {"acc": scores.predicted(False), "acc_norm": scores.predicted(True)}


def _standard_error(correct: np.ndarray) -> float | None:
    """sqrt(p (1 - p) / (n - 1)), of a share p over n questions; None for a single one."""
    n = len(correct)
    return float(correct.std(ddof=1) / np.sqrt(n)) if n > 1 else None
