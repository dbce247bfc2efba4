"""From a question to a prompt: registered templates, Jinja2 templates, few-shot examples."""

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tl_headnorm.data.lines import read_text
from tl_headnorm.data.questions import LETTERS, Question
from tl_headnorm.errors import InputError, first_line, unknown

TemplateFunction = Callable[[Question], str]
TEMPLATES: dict[str, "Template"] = {}


@dataclass(frozen=True)
class Sample:
    """A prompt and what it is to be answered with; serves measuring, scoring and fine-tuning."""

    prompt_text: str
    answer_letter: str
    option_labels: tuple[str, ...]
    target_text: str
    meta: Mapping[str, object]


def letter_target(question: Question) -> str:
    """The answer as its letter."""
    return question.answer_letter


def text_target(question: Question) -> str:
    """The answer as a space and the option's text."""
    return f" {question.options[question.answer]}"


@dataclass(frozen=True)
class Template:
    """A named prompt template and the text that answers it.

    `sha256` is of what it makes of a few fixed questions, so it changes with the wording.
    """

    name: str
    render: TemplateFunction
    target: TemplateFunction = letter_target

    @property
    def sha256(self) -> str:
        text = "\0".join(self.render(probe) for probe in _PROBES)
        return hashlib.sha256(text.encode()).hexdigest()


_PROBES = tuple(
    Question("probe", "Which?", tuple(f"option {i}" for i in range(n)), tuple(LETTERS[:n]), 0)
    for n in (3, 4, 5)
)
_OTHER = Question("other", "Why?", ("a", "b", "c", "d"), ("A", "B", "C", "D"), 0)


def register_template(
    name: str, target: TemplateFunction = letter_target
) -> Callable[[TemplateFunction], TemplateFunction]:
    """Add a prompt template: a function from a Question to the prompt's text.

    `target` gives the text of the right answer, for few-shot examples and fine-tuning.
    """

    def add(function: TemplateFunction) -> TemplateFunction:
        TEMPLATES[name] = Template(name, function, target)
        return function

    return add


def letters_in_words(letters: Sequence[str]) -> str:
    """ "A, B, C, or D"."""
    head, last = ", ".join(letters[:-1]), letters[-1]
    return f"{head}, or {last}" if len(letters) > 2 else f"{head} or {last}"


@register_template("arc_mcq_v1")
def arc_mcq_v1(question: Question) -> str:
    """Instruction, question, lettered options, "Answer: " with the space."""
    options = "".join(
        f"{letter}. {text}\n"
        for letter, text in zip(question.letters, question.options, strict=True)
    )
    return (
        "You are a careful reasoner. Read the question and choose the single best answer from "
        "the options.\n"
        "Think step-by-step privately, but do not reveal your reasoning.\n"
        f"Return only the letter of the correct option ({letters_in_words(question.letters)}).\n"
        f"\nQuestion: {question.stem}\nOptions:\n{options}\nAnswer: "
    )


@register_template("cloze", target=text_target)
def cloze(question: Question) -> str:
    """lm-evaluation-harness's ARC prompt: the options are not shown, each is scored as text."""
    return f"Question: {question.stem}\nAnswer:"


def jinja_template(source: str) -> Template:
    """A template from Jinja2 text, or from a file with it; rendered in the sandbox.

    Variables: `question` (text), `options` (pairs of letter and text), `letters`,
    `letters_in_words`. Raises InputError for a file that is not there or a broken template.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    if "{" in source:
        text = source
    else:
        what = "Jinja2 text with {{ question }} or a readable file"
        text = re.sub("\r\n?", "\n", read_text(source, "template", what).text)
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise InputError(f"template: expected Jinja2, found {first_line(error)}") from None

    def render(question: Question) -> str:
        pairs = list(zip(question.letters, question.options, strict=True))
        try:
            return compiled.render(
                question=question.stem, options=pairs, letters=list(question.letters),
                letters_in_words=letters_in_words(question.letters),
            )  # fmt: skip
        except Exception as error:  # a template can raise anything at all
            raise InputError(
                f"template: could not be rendered ({first_line(error)}); it may use question, "
                "options, letters and letters_in_words"
            ) from None

    # `{question}` with single braces is plain text to Jinja2: every prompt would be the same.
    if render(_PROBES[1]) == render(_OTHER):
        raise InputError(
            "template: expected {{ question }} or {% for letter, text in options %} in it, found "
            f"the same text for every question ({text.strip()[:60]!r})"
        )
    return Template("jinja" if text is source else Path(source).name, render)


def get_template(name: str, template: str | None = None) -> Template:
    """The registered template `name`, or the Jinja2 `template` where one is given."""
    if template is not None:
        return jinja_template(template)
    if name not in TEMPLATES:
        raise unknown("template", name, TEMPLATES)
    return TEMPLATES[name]


def build_samples(
    questions: Sequence[Question],
    template: Template,
    *,
    examples: Sequence[Question] = (),
    few_shot: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """A sample per question, each after `few_shot` solved examples.

    The same `few_shot` examples precede every question, drawn by `seed`; where one of them
    is the question itself (same id or same text), the next one drawn takes its place.
    """
    if few_shot and len(examples) < few_shot + 1:
        raise InputError(
            f"few_shot: expected at least {few_shot + 1} examples to draw {few_shot} from, "
            f"found {len(examples)}; lower --few_shot"
        )
    drawn = random.Random(seed).sample(list(examples), len(examples)) if few_shot else []
    return [_sample(q, template, _without(drawn, q, few_shot)) for q in questions]


def _without(drawn: Sequence[Question], question: Question, k: int) -> list[Question]:
    others = [e for e in drawn if e.id != question.id and e.stem != question.stem][:k]
    if len(others) < k:
        raise InputError(
            f"few_shot: expected {k} examples other than question {question.id} itself, found "
            f"{len(others)}; lower --few_shot"
        )
    return others


def _sample(question: Question, template: Template, examples: Sequence[Question]) -> Sample:
    solved = "".join(f"{template.render(e)}{template.target(e)}\n\n" for e in examples)
    return Sample(
        prompt_text=solved + template.render(question),
        answer_letter=question.answer_letter,
        option_labels=tuple(question.letters),
        target_text=template.target(question),
        meta={"id": question.id, "n_examples": len(examples), **question.meta},
    )
