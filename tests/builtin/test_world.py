"""The tiny model's grammar, its questions, its tokenizer, and that it really answers."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from builtin_training import dataset, world
from builtin_training.questions import FAMILIES, LETTERS, balanced, cloze, prompt
from builtin_training.world import CATEGORIES, TEST, TRAIN, is_held_out

from tl_headnorm.builtin import model_dir, questions_dir

MEGABYTES = 4


def told(pattern, stem):
    return re.findall(pattern, stem.rsplit(". ", 1)[0] + ".")


def pairs_of(stem):
    """What a look-up question tells, from its text alone."""
    if " is in the " in stem:
        return "in", told(r"The (\w+) is in the (\w+)\.", stem)
    return "has", told(r"(\w+) has the (\w+)\.", stem)


def solve_lookup(stem):
    relation, pairs = pairs_of(stem)
    word = re.search(r"(\w+)\?$", stem).group(1)
    found = [b if a == word else a for a, b in pairs if word in (a, b)]
    return found, [(relation, a, b) for a, b in pairs]


def solve_comparison(stem):
    amounts = [(int(n), a) for a, n in told(r"(\w+) has (\d) \w+\.", stem)]
    extreme = (max if "the most" in stem else min)(n for n, _ in amounts)
    return [a for n, a in amounts if n == extreme], [("count", a, str(n)) for n, a in amounts]


def solve_order(stem):
    names = re.search(r"The queue is (.*?)\.", stem).group(1).split(", ")
    side, word = re.search(r"right (after|before) (\w+)\?", stem).groups()
    found = [names[names.index(word) + (1 if side == "after" else -1)]]
    return found, [("next", a, b) for a, b in pairwise(names)]


def solve_odd_one_out(stem):
    items = re.findall(r"\b(?:a|an) (\w+)[,.]", stem)
    category = re.search(r"not (?:a|an) (\w+)\?", stem).group(1)
    found = [item for item in items if item not in CATEGORIES[category]]
    return found, [("odd", item, category) for item in found]


def solve_negation(stem):
    lines = told(r"(\w+) (likes|does not like) (\w+)\.", stem)
    verb, food = re.search(r"Who (likes|does not like) (\w+)\?", stem).groups()
    found = [a for a, said, b in lines if (said, b) == (verb, food)]
    return found, [("likes", a, b) for a, _, b in lines]


SOLVERS = {
    "lookup": solve_lookup,
    "comparison": solve_comparison,
    "order": solve_order,
    "odd_one_out": solve_odd_one_out,
    "negation": solve_negation,
}


def shipped(split):
    return dataset.read(questions_dir() / f"{split}.jsonl")


def share_right(questions, choose):
    return sum(choose(q) == q.answer for q in questions) / len(questions)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


def test_importing_the_package_does_not_import_torch():
    code = "import sys, tl_headnorm.builtin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_grammar_is_deterministic():
    assert list(balanced(TEST, 3, 50)) == list(balanced(TEST, 3, 50))
    assert list(balanced(TEST, 3, 50)) != list(balanced(TEST, 4, 50))


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_a_rule_oracle_finds_the_same_answer_and_the_same_facts(split):
    for question in balanced(split, 1, 1500):
        found, facts = SOLVERS[question.family](question.stem)
        assert found == [question.text]
        assert sorted(facts) == sorted(question.facts)
        assert len(set(question.options)) == len(question.options)


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_every_option_also_stands_in_the_question(split):
    for question in balanced(split, 2, 500):
        words = re.findall(r"\w+", question.stem)
        assert set(question.options) <= set(words)


def test_letters_families_and_option_counts_are_balanced():
    questions = list(balanced(TEST, 0, 500))
    assert set(Counter(q.family for q in questions).values()) == {100}
    for n, count in ((4, 400), (5, 100)):
        letters = Counter(q.letter for q in questions if len(q.options) == n)
        assert letters == dict.fromkeys(LETTERS[:n], count // n)


def by_count(question, best):
    """Choose among the options by how often they stand in the question; ties by chance."""
    words = Counter(re.findall(r"\w+", question.stem))
    extreme = best(words[text] for text in question.options)
    tied = [i for i, text in enumerate(question.options) if words[text] == extreme]
    return random.Random(question.stem).choice(tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_words_does_not_find_the_answer(family):
    questions = [q for q in balanced(TEST, 5, 5000) if q.family == family]
    assert share_right(questions, lambda q: by_count(q, max)) < 0.30
    assert share_right(questions, lambda q: by_count(q, min)) < 0.30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_place_in_the_question_does_not_give_the_answer(family, rank):
    def choose(question):
        words = re.findall(r"\w+", question.stem)
        return sorted(range(len(question.options)), key=lambda i: words.index(question.options[i]))[
            rank
        ]

    questions = [q for q in balanced(TEST, 6, 5000) if q.family == family]
    assert share_right(questions, choose) < 0.35


def test_facts_of_training_and_held_out_questions_are_disjoint():
    facts = {
        split: {f for q in balanced(split, 7, 3000) for f in q.facts} for split in world.SPLITS
    }
    assert not facts[TRAIN] & facts[TEST]
    assert not any(map(is_held_out, facts[TRAIN]))
    assert all(map(is_held_out, facts[TEST]))


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_facts_read_from_the_shipped_questions_belong_to_their_split(split):
    for question in shipped(split):
        found, facts = SOLVERS[question.family](question.stem)
        assert found == [question.text]
        assert all(is_held_out(fact) == (split == TEST) for fact in facts)


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_the_shipped_questions_are_what_the_generator_makes(split):
    path = questions_dir() / f"{split}.jsonl"
    assert path.read_text(encoding="utf-8") == dataset.as_text(split)


def test_the_shipped_files_have_the_layout_of_the_arc_sets():
    text = (questions_dir() / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) >= 400
    assert len({row["id"] for row in rows}) == len(rows)
    kinds = set()
    for row in rows:
        labels = row["choices"]["label"]
        assert len(row["choices"]["text"]) == len(labels)
        assert row["answerKey"] in labels
        kinds.add("".join(labels))
    assert kinds == {"ABCD", "ABCDE", "1234", "12345"}


def test_the_model_folder_is_small_enough():
    assert sum(p.stat().st_size for p in model_dir().iterdir()) <= MEGABYTES * 2**20


def test_every_word_and_letter_is_one_token(tokenizer):
    words = {text for split in world.SPLITS for q in balanced(split, 8, 500) for text in q.options}
    for word in words:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    for letter in LETTERS:
        assert len(tokenizer(letter, add_special_tokens=False)["input_ids"]) == 1


def test_a_prompt_tokenises_to_a_prefix_of_prompt_and_answer(tokenizer):
    for question in shipped(TRAIN):
        for text, answer in (
            (prompt(question), question.letter),
            (cloze(question), f" {question.text}"),
        ):
            alone, both = tokenizer([text, text + answer])["input_ids"]
            assert both[:-1] == alone
            assert both[0] == tokenizer.bos_token_id
            assert tokenizer.decode(both[1:]) == text + answer


def test_the_tokenizer_takes_any_text(tokenizer):
    for text in ("Grüße, 世界! \t\r\n 🙂", "  two  spaces ", "I am A. B, x-ray 1234", "\x00"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[1:]) == text


def test_the_shipped_tokenizer_is_what_the_script_makes(tokenizer):
    from builtin_training.tokenizer import build

    assert build().get_vocab() == tokenizer.get_vocab()


def test_the_model_answers_held_out_questions(model, tokenizer):
    from builtin_training.evaluate import accuracy

    questions = shipped(TEST)[:200]
    assert accuracy(model, tokenizer, questions)["overall"] >= 0.95


def test_the_model_has_grouped_queries(model):
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, tokenizer):
    import torch
    from builtin_training.train import Trainer

    def trainer():
        return Trainer(tokenizer, 0, torch.device("cpu"))

    straight, first, second = trainer(), trainer(), trainer()
    losses = [straight.advance() for _ in range(4)]
    assert [first.advance() for _ in range(2)] == losses[:2]
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert [second.advance() for _ in range(2)] == losses[2:]
