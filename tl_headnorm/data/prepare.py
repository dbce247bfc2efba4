"""From questions to tokenised prompts by the settings of a run, with their entries in meta.json."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_headnorm.data.chat import as_chat, chat_template_sha256, check_whole
from tl_headnorm.data.questions import Question, Questions, load_questions
from tl_headnorm.data.templates import Sample, Template, build_samples, get_template
from tl_headnorm.data.tokens import (
    Encoded,
    Tokenizer,
    bos_id,
    check_template_fits,
    common_prefix_length,
    encode,
    token_ids,
)
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """Prompts, their tokens, and the part of meta.json that is known before the model runs."""

    samples: list[Sample]
    encoded: list[Encoded]
    record: dict[str, Any]


def prepare(
    tokenizer: Tokenizer, n_ctx: int, questions: Sequence[Question], settings: Settings
) -> Prepared:
    """Render and tokenise; raises InputError where the bare template does not fit."""
    template = get_template(settings.template_name, settings.template)
    if len(questions) == 0:
        raise InputError("questions: expected at least one, found none")
    examples = few_shot_examples(questions, settings) if settings.few_shot else []
    samples = build_samples(
        questions, template, examples=examples, few_shot=settings.few_shot, seed=settings.seed
    )
    if settings.chat:
        samples = as_chat(samples, tokenizer)
    bare = token_ids(tokenizer, [template.render(_bare(questions[0]))])[0]
    head = bos_id(tokenizer, settings.prepend_bos)
    check_template_fits(len(head) + len(bare), settings.max_length, n_ctx, template.name)
    encoded = encode(
        samples,
        tokenizer,
        prepend_bos=settings.prepend_bos,
        max_length=settings.max_length,
        score=settings.score_answers,
    )
    record = _record(questions, template, tokenizer, encoded, head)
    if settings.chat:
        check_whole(samples, encoded)
        record["template"]["chat_sha256"] = chat_template_sha256(tokenizer)
    if settings.few_shot:
        solved = "\0".join(template.render(e) + template.target(e) for e in examples)
        record["template"]["examples_sha256"] = hashlib.sha256(solved.encode()).hexdigest()
    return Prepared(samples, encoded, record)


def _bare(question: Question) -> Question:
    """The question with empty stem and options, only its letters."""
    return Question("", "", ("",) * len(question.options), question.labels, 0)


def few_shot_examples(questions: Sequence[Question], settings: Settings) -> Sequence[Question]:
    """Questions of the train split, else of the dev split, of the same dataset."""
    name = getattr(questions, "name", settings.dataset)
    data_dir = getattr(questions, "data_dir", settings.data_dir)
    if data_dir is not None and _holds_one_split(Path(data_dir).expanduser()):
        raise InputError(
            f"few_shot: expected data_dir to be a directory with a train or dev split, found one "
            f"split alone in {data_dir}; put them side by side, or use --few_shot 0"
        )
    problem = None
    for split in ("train", "validation"):
        try:
            return load_questions(
                name,
                data_dir,
                split,
                n_options=settings.n_options,
                on_bad_record=settings.on_bad_record,
            )
        except InputError as error:
            problem = problem or error
    raise InputError(
        f"few_shot: expected a train or dev split to draw from, found none ({problem})"
    )


def _holds_one_split(path: Path) -> bool:
    """A file, or a `Dataset` (not a `DatasetDict`) saved by the datasets library."""
    return path.is_file() or (path / "state.json").is_file()


def _record(
    questions: Sequence[Question],
    template: Template,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    head: list[int],
) -> dict[str, Any]:
    source = questions if isinstance(questions, Questions) else Questions(tuple(questions))
    answers = {
        (letter, token)
        for sample in encoded
        for letter, token in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", sample.letter_ids, strict=False)
    }
    return {
        "num_skipped": dict(source.skipped),
        "num_truncated": sum(sample.truncated for sample in encoded),
        "num_tokens": sum(len(sample) for sample in encoded),
        "dataset": {
            "name": source.name,
            "split": source.split,
            "path": source.path,
            "sha256": source.sha256,
            "shard": source.shard,
        },
        "template": {
            "name": template.name,
            "sha256": template.sha256,
            "common_prefix_length": shared_prefix(encoded),
        },
        "prepend_bos": bool(head),
        "answer_tokens": {
            letter: {"token": tokenizer.convert_ids_to_tokens(token), "id": token}
            for letter, token in sorted(answers)
        },
    }


def shared_prefix(encoded: Sequence[Encoded]) -> int:
    """Tokens in which all prompts that were not truncated agree from the start."""
    full = [sample.ids for sample in encoded if not sample.truncated] or [s.ids for s in encoded]
    # The longest common prefix of all is that of the smallest and the largest.
    return common_prefix_length(min(full), max(full))
