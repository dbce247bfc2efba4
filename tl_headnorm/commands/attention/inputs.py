"""Inputs of `attention`: a prompt, a question of a dataset, or the prompts of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_headnorm.commands.attention.settings import AttentionSettings
from tl_headnorm.data.chat import as_chat
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.prompts import Prompt, read_prompts
from tl_headnorm.data.spans import TokenText, encode_text, find_spans
from tl_headnorm.data.templates import Sample
from tl_headnorm.errors import InputError, nearest
from tl_headnorm.model.loading import Model
from tl_headnorm.run.loading import open_both, open_model


@dataclass(frozen=True)
class Subject:
    """A prompt with its tokens, the keywords asked for in it, and which of it is instruction.

    `letters` are the option letters of a question and their tokens, `answer` the right one.
    """

    id: str
    tokens: TokenText
    keywords: tuple[str, ...]
    instruction: tuple[int, int]
    letters: tuple[tuple[str, int], ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class Subjects:
    """All that is looked at, and the part of meta.json that says where it came from."""

    items: tuple[Subject, ...]
    record: dict[str, Any] = field(default_factory=dict)


def open_subjects(settings: AttentionSettings) -> tuple[Model, Subjects]:
    """Files first: they fail fast, a model is slow to load."""
    if settings.question is not None:
        model, questions = open_both(settings.updated(max_samples=-1))
        return model, _of_question(model, questions, settings)
    found = None if settings.prompts is None else read_prompts(settings.prompts)
    items = (Prompt(settings.prompt or ""),) if found is None else found.items
    if settings.max_samples >= 0:
        items = items[: settings.max_samples]
    model = open_model(settings)
    subjects = [_of_prompt(model, item, i, settings) for i, item in enumerate(items)]
    record = {} if found is None else {"prompts": {"path": found.path, "sha256": found.sha256}}
    return model, Subjects(tuple(subjects), record)


def _of_prompt(model: Model, prompt: Prompt, number: int, settings: AttentionSettings) -> Subject:
    text = prompt.text
    if settings.chat:
        [sample] = as_chat([Sample(text, "", (), "", {"id": prompt.id or number})], model.tokenizer)
        text = sample.prompt_text
    tokens = encode_text(model.tokenizer, text, prepend_bos=settings.prepend_bos)
    most = min(settings.max_length, model.n_ctx)
    if len(tokens) > most:
        raise InputError(
            f"prompt {prompt.id or number}: expected at most {most} tokens (max_length "
            f"{settings.max_length}, context {model.n_ctx}), found {len(tokens)}; shorten it or "
            "raise --max_length"
        )
    keywords = tuple(dict.fromkeys((*settings.keywords, *prompt.keywords)))
    start = text.rindex(prompt.text.strip())  # a chat template may strip the turn
    whole = (start, start + len(prompt.text.strip()))
    instruction = _instruction(tokens, settings, whole)
    return Subject(prompt.id or str(number), tokens, keywords, instruction)


def _of_question(model: Model, questions: Any, settings: AttentionSettings) -> Subjects:
    at = _place(questions, str(settings.question))
    most = min(settings.max_length, model.n_ctx)
    how = settings.updated(max_length=most, score_answers=True, max_samples=-1)
    made = prepare(model.tokenizer, model.n_ctx, questions[at : at + 1], how)
    sample, encoded = made.samples[0], made.encoded[0]
    tokens = encode_text(
        model.tokenizer, sample.prompt_text, prepend_bos=settings.prepend_bos, max_length=most
    )
    assert tokens.ids == encoded.ids, "the prompt's tokens are not those that are measured"
    bare = prepare(model.tokenizer, model.n_ctx, questions[at : at + 1], how.updated(chat=False))
    plain = bare.samples[0].prompt_text.strip()
    start = sample.prompt_text.index(plain)
    whole = (max(start, tokens.cut), start + (plain.rfind("\n") + 1 or len(plain)))
    letters = tuple(zip(sample.option_labels, encoded.letter_ids, strict=True))
    subject = Subject(
        questions[at].id, tokens, settings.keywords, _instruction(tokens, settings, whole),
        letters, sample.answer_letter,
    )  # fmt: skip
    return Subjects((subject,), made.record)


def _place(questions: Sequence[Any], wanted: str) -> int:
    ids = [question.id for question in questions]
    if wanted in ids:
        return ids.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(ids):
        return int(wanted)
    raise InputError(
        f"question: expected an id of the dataset or a place from 0 to {len(ids) - 1}, found "
        f"{wanted!r}{nearest(wanted, ids)}"
    )


def _instruction(
    tokens: TokenText, settings: AttentionSettings, whole: tuple[int, int]
) -> tuple[int, int]:
    if settings.instruction is None:
        return whole
    span = find_spans(tokens, settings.instruction, name="instruction")[0]
    return span.char_start, span.char_stop
