"""Prompts to the letter, the registries, Jinja2 in its sandbox, few-shot examples."""

import pytest
from conftest import question_record, write_jsonl

from tl_headnorm.data.prepare import few_shot_examples
from tl_headnorm.data.questions import (
    DATASETS,
    Question,
    load_questions,
    parse_record,
    register_dataset,
)
from tl_headnorm.data.readers import Source
from tl_headnorm.data.templates import (
    TEMPLATES,
    build_samples,
    cloze,
    get_template,
    letters_in_words,
    register_template,
)
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings

FOUR = Question("four", "What melts ice?", ("heat", "cold", "wind", "rock"), tuple("1234"), 0)
FIVE = Question("five", "What is wet?", ("fire", "sand", "rain", "salt", "ash"), tuple("ABCDE"), 2)

FOUR_TEXT = """\
You are a careful reasoner. Read the question and choose the single best answer from the options.
Think step-by-step privately, but do not reveal your reasoning.
Return only the letter of the correct option (A, B, C, or D).

Question: What melts ice?
Options:
A. heat
B. cold
C. wind
D. rock

Answer: """

FIVE_TEXT = """\
You are a careful reasoner. Read the question and choose the single best answer from the options.
Think step-by-step privately, but do not reveal your reasoning.
Return only the letter of the correct option (A, B, C, D, or E).

Question: What is wet?
Options:
A. fire
B. sand
C. rain
D. salt
E. ash

Answer: """


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    before = dict(TEMPLATES), dict(DATASETS)
    yield
    for registry, content in zip((TEMPLATES, DATASETS), before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize(("question", "text"), [(FOUR, FOUR_TEXT), (FIVE, FIVE_TEXT)])
def test_arc_mcq_v1_to_the_letter(question, text):
    sample = build_samples([question], get_template("arc_mcq_v1"))[0]
    assert sample.prompt_text == text
    assert sample.prompt_text.endswith("Answer: ")
    assert (sample.answer_letter, sample.target_text) == (question.answer_letter,) * 2
    assert sample.option_labels == tuple("ABCDE"[: len(question.options)])
    assert sample.meta["id"] == question.id


def test_cloze():
    sample = build_samples([FOUR], get_template("cloze"))[0]
    assert sample.prompt_text == "Question: What melts ice?\nAnswer:"
    assert sample.target_text == " heat"


def test_letters_in_words():
    words = [letters_in_words("ABCDE"[:n]) for n in (2, 3, 4)]
    assert words == ["A or B", "A, B, or C", "A, B, C, or D"]


def test_digest_follows_the_wording():
    def worded(text):
        return get_template("unused", text).sha256

    assert worded("{{ question }}?") == worded("{{question}}?") != worded("{{ question }}!")
    assert get_template("cloze").sha256 != get_template("arc_mcq_v1").sha256


def test_a_template_of_ones_own():
    @register_template("terse", target=lambda question: question.options[question.answer])
    def terse(question):
        return f"{question.stem} "

    sample = build_samples([FOUR], get_template("terse"))[0]
    assert (sample.prompt_text, sample.target_text) == ("What melts ice? ", "heat")


def test_a_dataset_of_ones_own():
    @register_dataset("mine")
    def mine(data_dir, split):
        rows = [question_record(3, layout="hf"), FOUR]
        return Source([(f"mine, item {i}", row) for i, row in enumerate(rows)], f"mine:{split}")

    questions = load_questions("mine", split="train")
    assert [q.id for q in questions] == ["q3", "four"]
    assert questions[1] is FOUR
    assert (questions.name, questions.path, questions.sha256) == ("mine", "mine:train", None)


def test_unknown_names_list_the_choices_and_the_nearest():
    with pytest.raises(InputError) as caught:
        get_template("arc_mcq_v2")
    assert str(caught.value) == (
        "unknown template 'arc_mcq_v2'; did you mean 'arc_mcq_v1'? "
        "Expected one of: arc_mcq_v1, cloze"
    )
    with pytest.raises(InputError) as caught:
        load_questions("xyz")
    assert str(caught.value).startswith("unknown dataset 'xyz'. Expected one of: arc_challenge, ")


JINJA = """\
Q: {{ question }}
{% for letter, text in options %}({{ letter }}) {{ text }}
{% endfor %}One of {{ letters_in_words }}; {{ letters | length }} in all.
A: """
JINJA_TEXT = """\
Q: What melts ice?
(A) heat
(B) cold
(C) wind
(D) rock
One of A, B, C, or D; 4 in all.
A: """


def test_jinja_inline_and_from_a_file(tmp_path):
    path = tmp_path / "prompt.j2"
    path.write_text(JINJA)
    inline, from_file = get_template("unused", JINJA), get_template("unused", str(path))
    assert inline.render(FOUR) == from_file.render(FOUR) == JINJA_TEXT
    assert (inline.name, from_file.name) == ("jinja", "prompt.j2")
    assert inline.sha256 == from_file.sha256


def test_braces_in_a_question_are_text():
    tricky = Question("t", "What is {{ 1 + 1 }}?", ("2", "{% x %}"), ("A", "B"), 0)
    template = get_template("unused", "{{ question }} {{ options[1][1] }}")
    assert template.render(tricky) == "What is {{ 1 + 1 }}? {% x %}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ question }}{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ question }}{{ question.format.__globals__ }}", "is unsafe"),
        ("{{ question }}{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ questoin }}", "'questoin' is undefined"),
        ("{{ question }}{% if choices[0] %}x{% endif %}", "'choices' is undefined"),
        ("{{ question }", "expected Jinja2, found"),
        ("{% for x in options %}", "expected Jinja2, found"),
        ("{% include '/etc/passwd' %}{{ question }}", "could not be rendered"),
        ("Q: {question}\nA: ", "found the same text for every question ('Q: {question}"),
        ("no braces", "readable file, found 'no braces'"),
        ("", "readable file, found ''"),
    ],
)
def test_a_bad_template_is_one_clear_line(text, message):
    with pytest.raises(InputError) as caught:
        get_template("unused", text)
    assert message.replace("\n", " ") in str(caught.value)
    assert str(caught.value).startswith("template: ")
    assert "\n" not in str(caught.value)


def test_the_sandbox_is_what_stops_it():
    """Plain Jinja2, the rival, hands the classes out."""
    from jinja2 import Template

    assert "object" in Template("{{ ''.__class__.__mro__ }}").render()


EXAMPLES = [parse_record(question_record(i)) for i in range(6)]


def shots(questions, k, seed=0, template="arc_mcq_v1", examples=EXAMPLES):
    return build_samples(
        questions, get_template(template), examples=examples, few_shot=k, seed=seed
    )


def test_few_shot_puts_solved_examples_first():
    sample = shots([FOUR], 2)[0]
    assert sample.prompt_text.endswith("\n\n" + FOUR_TEXT)
    solved = sample.prompt_text.removesuffix(FOUR_TEXT)
    used = [e for e in EXAMPLES if e.stem in solved]
    assert len(used) == sample.meta["n_examples"] == 2
    for example in used:
        assert f"{example.stem}\nOptions:\nA. {example.options[0]}\n" in solved
    assert solved.count("Answer: ") == 2
    assert all(f"Answer: {e.answer_letter}" in solved for e in used)
    assert sample.target_text == "A"


def test_few_shot_cloze_shows_the_answer_text():
    text = shots([FOUR], 1, template="cloze")[0].prompt_text
    used = next(e for e in EXAMPLES if e.stem in text)
    assert text == f"{cloze(used)} {used.options[used.answer]}\n\n{cloze(FOUR)}"


def test_few_shot_is_fixed_by_the_seed():
    def drawn(seed):
        return [s.prompt_text for s in shots([FOUR, FIVE], 3, seed)]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed)[0] for seed in range(8)}) > 1
    four, five = drawn(1)
    assert four.removesuffix(FOUR_TEXT) == five.removesuffix(FIVE_TEXT), "a shared prefix"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("same", ["id", "stem"])
def test_few_shot_never_shows_the_question_itself(seed, same):
    def twin(example):
        stem = example.stem if same == "stem" else "Another wording?"
        name = example.id if same == "id" else "another"
        return Question(name, stem, FOUR.options, FOUR.labels, 1)

    k = len(EXAMPLES) - 1
    for example, sample in zip(EXAMPLES, shots([twin(e) for e in EXAMPLES], k, seed), strict=True):
        solved = sample.prompt_text.rsplit("You are a careful reasoner", 1)[0]
        assert example.stem not in solved
        assert sample.meta["n_examples"] == k


def test_too_few_examples():
    with pytest.raises(InputError, match="expected at least 7 examples to draw 6 from, found 6"):
        shots([FOUR], 6)
    twins = [FOUR, Question("other", FOUR.stem, FOUR.options, FOUR.labels, 0), EXAMPLES[0]]
    with pytest.raises(InputError, match="expected 2 examples other than question four itself"):
        shots([FOUR], 2, examples=twins)


def test_examples_come_from_train_else_dev(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [question_record(0)])
    write_jsonl(tmp_path / "dev.jsonl", [question_record(i) for i in (20, 21)])
    settings = Settings(data_dir=str(tmp_path), few_shot=1)
    questions = load_questions(data_dir=tmp_path)
    assert [q.id for q in few_shot_examples(questions, settings)] == ["q20", "q21"]
    write_jsonl(tmp_path / "train.jsonl", [question_record(i) for i in (30, 31)])
    assert [q.id for q in few_shot_examples(questions, settings)] == ["q30", "q31"]


def test_one_split_alone_gives_no_examples(tmp_path):
    """The rest of the test split must not become its own examples."""
    from datasets import Dataset

    rows = [question_record(i, layout="hf") for i in range(3)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (write_jsonl(tmp_path / "test.jsonl", rows), tmp_path / "saved"):
        settings = Settings(data_dir=str(path), few_shot=1)
        with pytest.raises(InputError, match="few_shot: expected data_dir to be a directory with"):
            few_shot_examples(load_questions(data_dir=path), settings)
