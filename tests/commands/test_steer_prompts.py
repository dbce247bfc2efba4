"""Answers plain, steered and constrained; and the command from settings to files."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_jsonl

from tl_headnorm.commands.steer import instructions
from tl_headnorm.commands.steer.answers import marked
from tl_headnorm.commands.steer.plots import boost_labels
from tl_headnorm.commands.steer.prompts import prepare_prompts
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.data.prompts import Prompt, read_instructions
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.constrained_decoding import MustInclude, continuation_ids
from tl_headnorm.interventions.generation import generate
from tl_headnorm.interventions.metrics import Metric
from tl_headnorm.interventions.steering import Steering
from tl_headnorm.model.loading import load_model

DOG = {"id": "dog", "prompt": "Once upon a time Lily had a big red dog. One day, Lily",
       "keywords": ["dog", "Lily"], "must_include": ["purple", "tree"]}  # fmt: skip
CAT = {"prompt": "The cat lost its hat. Then", "keywords": "hat"}


@pytest.fixture(scope="module")
def stories(shared_data):
    return load_model(shared_data / "stories260K", dtype="fp32", self_check=False)


def settings_of(**changes):
    given = {"heads": "all", "prompts": "p.jsonl", "generate": 24, "seeds": 2, "boost": "1,20"}
    return SteerSettings(**{**given, **changes})


@pytest.fixture
def prompts():
    return [
        Prompt(DOG["prompt"], ("dog", "Lily"), "dog", ("purple", "tree")),
        Prompt(CAT["prompt"], ("hat",), "cat", ("hat",)),
    ]


def test_phrases_are_tokenised_as_they_stand_in_running_text(stories, bpe):
    for tokenizer in (stories.tokenizer, bpe):
        for phrase in ("dog", "big red dog", "Zürich", "猫"):
            ids = continuation_ids(tokenizer, phrase)
            whole = tokenizer.decode(
                [*tokenizer("so", add_special_tokens=False)["input_ids"], *ids]
            )
            assert whole == f"so {phrase}"


@pytest.mark.parametrize("least", [0.05, 2.0])
def test_forced_texts_appear_alike_in_transformers_and_here(stories, least):
    """2.0 waits for the last moment: then nothing but the deadline puts the texts in."""
    ids = torch.tensor([stories.tokenizer(DOG["prompt"])["input_ids"]])
    eos = [int(stories.tokenizer.eos_token_id)]

    def processor():
        return MustInclude(
            stories.tokenizer, [["purple tree", "Zoo"]], prompt_length=ids.shape[1],
            max_new_tokens=30, eos=eos, least=least,
        )  # fmt: skip

    theirs = stories.hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
        logits_processor=[processor()], pad_token_id=0,
    )[0, ids.shape[1] :]  # fmt: skip
    step = processor()
    ours = generate(
        stories, ids, torch.ones_like(ids), max_new_tokens=30, eos=eos,
        on_step=lambda s: step(s.ids, s.logits),
    ).rows()[0]  # fmt: skip
    assert ours == theirs.tolist()[: len(ours)]
    text = stories.tokenizer.decode(ours)
    assert "purple tree" in text
    assert "Zoo" in text
    free = generate(stories, ids, torch.ones_like(ids), max_new_tokens=30, eos=eos).rows()[0]
    plain = stories.tokenizer.decode(free)
    assert "purple" not in plain
    needed = sum(len(continuation_ids(stories.tokenizer, p)) for p in ("purple tree", "Zoo"))
    if least > 1:  # untouched up to the deadline
        assert ours[: 30 - needed] == free[: 30 - needed]


def test_no_end_of_text_before_the_texts_are_there(stories):
    processor = MustInclude(
        stories.tokenizer, [["dog"], []], prompt_length=2, max_new_tokens=9, eos=[2], least=2.0
    )
    scores = torch.zeros(2, 512)
    scores[:, 2] = 50.0
    changed = processor(torch.tensor([[1, 5], [1, 5]]), scores)
    assert changed[0, 2] == -torch.inf
    assert torch.equal(changed[1], scores[1])  # a row that asks for nothing
    assert scores[0, 2] == 50  # the model's own logits stay
    with pytest.raises(InputError, match="raise --generate"):
        MustInclude(stories.tokenizer, [["a long phrase"]], prompt_length=2, max_new_tokens=1)


def test_keywords_of_the_distracting_text_are_not_steered_to(stories, prompts):
    settings = settings_of()
    given = prepare_prompts(prompts, stories.tokenizer, settings)
    for where in ("before", "after"):
        other = prepare_prompts(
            prompts, stories.tokenizer, settings.updated(distract_at=where), "A dog, a hat. Lily."
        )
        for one, two in zip(given, other, strict=True):
            said = [[r.tokens.ids[i] for i in r.span] for r in (one, two)]
            assert said[0] == said[1]
            assert len(two.tokens) > len(one.tokens)
            assert two.distracted


def test_weights_by_step_are_those_of_the_whole_text(stories, prompts):
    """The watch's numbers, against one pass over prompt and answer with the same hooks."""
    settings = settings_of(temperature=0.0, generate=12, heads="1.2,3.0")
    ready = prepare_prompts(prompts, stories.tokenizer, settings)
    way = instructions.Way("steered", Steering("s", ((1, 2), (3, 0)), 6.0))
    answers = instructions.write_answers(stories, ready, [way], settings)
    plain = instructions.write_answers(
        stories, ready, [instructions.Way("plain", Steering("s", ((1, 2), (3, 0)), 1.0))], settings
    )
    from tl_headnorm.data.tokens import Encoded
    from tl_headnorm.interventions.runner import run
    from tl_headnorm.interventions.steering import SpanWeight

    class Nothing(Metric):
        def shapes(self, n_layers, n_heads):
            return {}

        def __call__(self, runs, resid, clean):
            return {}

    for one, answer, other in zip(ready, answers, plain, strict=True):
        new = stories.tokenizer(one.tokens.text + answer.text, add_special_tokens=False)[
            "input_ids"
        ]
        ids = (one.tokens.ids[0], *new)[: len(one.tokens) + len(answer.weights) - 1]
        steering = replace(way.steering, spans={0: one.span})
        metric = SpanWeight(Nothing(), {0: one.span}, steering.heads)
        mean = run(stories, [Encoded(0, ids)], [steering], metric)["weight"][1, 0]
        if ids == (*one.tokens.ids, *ids[len(one.tokens) :]):
            assert abs(mean - answer.weights[-1]) < 1e-4
        assert np.mean(answer.weights) > np.mean(other.weights)


def test_the_same_seed_is_the_same_luck_whatever_stands_beside(stories, prompts):
    settings = settings_of(batch_size=1)
    ready = prepare_prompts(prompts, stories.tokenizer, settings)
    ways = instructions.ways_of("all", ((0, 1), (2, 3)), settings)
    assert [w.name for w in ways] == ["plain", "steered x20", "constrained"]
    one = instructions.write_answers(stories, ready, ways, settings)
    two = instructions.write_answers(stories, ready, ways, settings.updated(batch_size=4))
    assert [(a.way, a.prompt, a.seed, a.text) for a in one] == [
        (a.way, a.prompt, a.seed, a.text) for a in two
    ]
    assert len({a.text for a in one if a.way == "plain"}) == 4
    assert all(a.hit for a in one if a.way == "constrained")
    assert not any(a.hit for a in one if a.way == "plain" and a.prompt == "dog")


def test_a_prompt_that_asks_for_nothing_is_no_hit(stories, prompts):
    asks, free = prompts[0], Prompt(CAT["prompt"], ("hat",), "free", ())
    settings = settings_of(temperature=0.0, generate=16)
    ready = prepare_prompts([asks, free], stories.tokenizer, settings)
    ways = instructions.ways_of("all", ((0, 1),), settings)
    answers = instructions.write_answers(stories, ready, ways, settings)
    table = instructions.prompts_table(answers, ways).set_index(["prompt", "way"])
    assert table.loc[("all", "plain"), ["n_answers", "n_asked"]].tolist() == [2, 1]
    assert table.loc[("all", "plain"), "hit_rate"] == 0
    assert np.isnan(table.loc[("free", "plain"), "hit_rate"])
    assert ("free", "constrained") not in table.index
    assert [a.hit for a in answers if a.prompt == "free"] == [None, None]


def test_steps_are_the_lines_of_the_answer(stories):
    tokenizer = stories.tokenizer
    text = "First, a dog.\n\nThen a cat.\nEnd"
    prompt, whole = tokenizer("Say:")["input_ids"], tokenizer(f"Say: {text}")["input_ids"]
    new = whole[len(prompt) :]
    weights = list(np.linspace(0, 1, len(new)))
    steps = instructions.steps_of(tokenizer, prompt, new, weights)
    assert [step["text"] for step in steps] == ["First, a dog.", "Then a cat.", "End"]
    assert sum(step["tokens"] for step in steps) == len(new)
    total = sum(step["tokens"] * step["keyword_weight"] for step in steps)
    assert total == pytest.approx(sum(weights))
    assert instructions.steps_of(tokenizer, prompt, [], []) == []


def test_agreement_and_hits():
    assert instructions.agreement(["a b", "a b"]) == 1
    assert instructions.agreement(["a b", "b c", "d"]) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert np.isnan(instructions.agreement(["a"]))
    assert instructions.hit_agreement([True, True, False]) == pytest.approx(1 / 3)
    assert instructions.missing_texts("A Big DOG", ["dog", "big", "cat"]) == ["cat"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: expected JSON"),
        ('{"keywords": ["a"]}', "line 2: expected a text, or an object with a text under 'prompt'"),
        ("[" * 100_000, "line 2: expected JSON, found a fault (maximum recursion"),
        ('{"prompt": "\\ud800", "keywords": ["a"]}', "line 2: expected Unicode text, found half"),
        ('{"prompt": "a"}', "line 2: expected at least one text under keywords"),
        ('{"prompt": "a", "keywords": []}', "at least one text under keywords"),
        ('{"prompt": "a", "keywords": ["a"], "must": []}', "found 'must'"),
        ('{"prompt": "a", "keywords": ["a"], "must_include": [3]}', "under 'must_include'"),
    ],
)
def test_a_faulty_prompt_is_named_by_its_line(tmp_path, line, said):
    import re

    path = write_jsonl(tmp_path / "p.jsonl", [DOG, line])
    with pytest.raises(InputError, match=re.escape(said)):
        read_instructions(path)
    cut = tmp_path / "cut.jsonl"  # U+2028 stands inside a string here, and ends no line
    cut.write_text('{"prompt": "a\u2028b", "keywords": ["a"]}\r\n', encoding="utf-8")
    assert [prompt.text for prompt in read_instructions(cut).items] == ["a\u2028b"]
    assert read_instructions(write_jsonl(tmp_path / "q.jsonl", [CAT])).items[0].must_include == (
        "hat",
    )


def test_steer_over_a_file_of_prompts(run_cli, shared_data, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [DOG, CAT])
    run = run_cli(
        "steer", "--model_path", shared_data / "stories260K", "--dtype", "fp32", "--prompts", path,
        "--heads", "1.*,3.0-2", "--boost", "1,9", "--generate", 20, "--seeds", 2,
        "--distract", "There was a bird.", "--output_dir", tmp_path,
    )  # fmt: skip
    folder = run.run_dir
    table = pd.read_parquet(folder / "prompts.parquet")
    assert set(table["prompt"]) == {"dog", "2", "all"}
    assert set(table["way"]) == {"plain", "steered x9", "constrained"}
    rows = table[table["prompt"] == "all"].set_index(["way", "distracted"])
    assert (rows["n_answers"] == 4).all()
    assert (rows.loc["constrained", "hit_rate"] == 1).all()
    attention = rows["keyword_weight"]
    for distracted in (False, True):
        assert attention["steered x9", distracted] > 1.5 * attention["plain", distracted]
    lines = (folder / "generations.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 2 * 2 * 2 * 3
    assert all(a["hit"] == (not a["missing"]) for a in answers)
    assert {a["asked"] for a in answers} == {1, 2}
    page = (folder / "generations.html").read_text()
    assert "<mark>" in page
    assert "http" not in page
    names = {p.name for p in folder.iterdir()}
    assert {
        "hits.html",
        "hits.png",
        "summary.md",
        "meta.json",
        "heads.json",
        "config.json",
    } <= names
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["heads"] == {"1": list(range(8)), "3": [0, 1, 2]}
    assert "| constrained | yes | 100.0%" in " ".join((folder / "summary.md").read_text().split())
    absent = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a dog", "keywords": ["cat"]}])
    refused = run_cli(
        "steer", "--model_path", shared_data / "stories260K", "--prompts", absent, "--heads", "all",
        "--generate", 4, "--output_dir", tmp_path / "none",
    )  # fmt: skip
    assert refused.code == 2
    assert "prompt 1, keywords: expected a text that stands in the prompt" in refused.error_line


def test_the_heads_of_a_run_of_attention(run_cli, shared_data, tmp_path):
    model = ("--model_path", shared_data / "stories260K", "--dtype", "fp32")
    looked = run_cli(
        "attention", *model, "--prompt", CAT["prompt"], "--keyword", "hat", "--output_dir", tmp_path
    ).run_dir
    focus = pd.read_parquet(looked / "focus.parquet")
    best = focus.groupby(["layer", "head"])["weight"].mean().nlargest(3).index
    path = write_jsonl(tmp_path / "p.jsonl", [CAT])
    folder = run_cli(
        "steer", *model, "--prompts", path, "--heads", "top:3", "--run", looked, "--generate", 3,
        "--temperature", 0, "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    heads = json.loads((folder / "heads.json").read_text())
    assert {(int(la), h) for la, hs in heads.items() for h in hs} == set(best)


def test_texts_alone(run_cli, shared_data, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("Lily saw a dog. The dog was big. Lily was happy. " * 12)
    folder = run_cli(
        "steer", "--model_path", shared_data / "stories260K", "--dtype", "fp32", "--dataset",
        "none", "--texts", text, "--text_length", 48, "--max_texts", 3, "--keyword", "dog",
        "--heads", "0.*", "--boost", "1,30", "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    table = pd.read_parquet(folder / "perplexity.parquet")
    clean, same, steered = table.iloc[0], table.iloc[1], table.iloc[2]
    assert clean["perplexity"] == pytest.approx(np.exp(clean["loss"]))
    assert same["perplexity"] == clean["perplexity"]
    assert steered["keyword_weight"] > 2 * clean["keyword_weight"]
    assert steered["kl"] > 1e-4
    assert pd.read_parquet(folder / "steer.parquet")["accuracy"].isna().all()


def test_marks_and_labels():
    assert marked("A <b> Dog's dog", ["dog"]) == (
        "A &lt;b&gt; <mark>Dog</mark>&#39;s <mark>dog</mark>"
    )
    assert marked("a<b", []) == "a&lt;b"
    assert boost_labels([0.0, 0.5, 20.0, 1e4, 12345.0, 1e16]) == [
        "0", "0.5", "20", "1e4", "12345", "1e16"
    ]  # fmt: skip
