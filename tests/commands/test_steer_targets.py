"""Where attention is steered to: spans of questions and texts, heads of finished runs, settings."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import question_record, train_tokenizer

from tl_headnorm.commands.steer.prompts import prepare_prompts
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.steer import bootstrap_interval
from tl_headnorm.commands.steer.targets import option_spans, question_targets, text_targets
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.prompts import Prompt
from tl_headnorm.data.questions import parse_record
from tl_headnorm.data.templates import get_template
from tl_headnorm.data.texts import read_texts, windows
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.rankings import choose_heads, random_heads
from tl_headnorm.settings import Settings
from tl_headnorm.stats import wilson

HEADS = {"heads": "all"}


@pytest.fixture(scope="module")
def questions():
    """Five questions of 4 and 5 options; one repeats an option's text in its stem."""
    found = [parse_record(question_record(i, 4 + (i == 2))) for i in range(5)]
    record = question_record(7)
    record["question"]["stem"] = f"Not {record['question']['choices'][1]['text']}. What then? 🙂"
    return [*found, parse_record(record)]


def ready(questions, tokenizer, **changes):
    settings = Settings(max_length=500).updated(**changes)
    prepared = prepare(tokenizer, 512, questions, settings)
    return prepared, get_template(settings.template_name, settings.template)


def said(tokenizer, one, places):
    return tokenizer.decode([one.ids[place] for place in places])


@pytest.mark.parametrize("split", [True, False])
def test_an_option_is_found_where_the_template_puts_it(questions, split):
    """By either tokenizer, BOS counted; never the same words in the question."""
    tokenizer = train_tokenizer([q.stem for q in questions], split=split)
    prepared, template = ready(questions, tokenizer)
    for q, sample, one in zip(questions, prepared.samples, prepared.encoded, strict=True):
        for part in ("text", "letter", "line"):
            spans = option_spans(q, sample, one, tokenizer, template, part)
            for i, places in enumerate(spans):
                letter, text = q.letters[i], q.options[i]
                wanted = {"text": text, "letter": letter, "line": f"{letter}. {text}"}[part]
                found = said(tokenizer, one, places)
                # A token at the edge may hold a neighbouring character more.
                assert wanted in found
                assert len(found) <= len(wanted) + 4
                assert places == tuple(range(places[0], places[-1] + 1))
        assert tokenizer.decode(one.ids[spans[0][0] :]).count("Options") == 0


def test_the_question_and_wrong_options_and_moved_spans(questions, bpe):
    prepared, template = ready(questions, bpe)
    args = (questions, prepared.samples, prepared.encoded, bpe, template)
    stems = question_targets(*args, "question")
    for q, one, places in zip(questions, stems.samples, stems.spans, strict=True):
        assert said(bpe, one, places).strip() == q.stem
    assert stems.options == (-1,) * len(questions)
    wrong = question_targets(*args, "option:wrong", seed=3)
    assert all(o != q.answer for q, o in zip(questions, wrong.options, strict=True))
    assert wrong == question_targets(*args, "option:wrong", seed=3)
    drawn = {question_targets(*args, "option:wrong", seed=s).options for s in range(8)}
    assert len(drawn) > 4
    moved = question_targets(*args, "option:wrong", seed=3, offset=2)
    assert moved.spans[0] == tuple(place + 2 for place in wrong.spans[0])
    right = question_targets(*args, "option:answer", part="text")
    assert right.options == tuple(q.answer for q in questions)
    fifth = question_targets(*args, "option:E")
    assert fifth.kept == (2,)
    assert fifth.samples[0].index == 2
    owl = question_targets(*args, ["an owl", "Mercury"])
    for row, one, places in zip(owl.kept, owl.samples, owl.spans, strict=True):
        prompt, text = prepared.samples[row].prompt_text, said(bpe, one, places)
        n_owl, n_mercury = prompt.count("an owl"), prompt.count("Mercury")
        assert text.count("an owl") == n_owl
        assert text.count("Mercury") == n_mercury


def test_few_shot_examples_are_not_taken_for_the_question(questions, bpe, tmp_path):
    """The same options stand in a solved example before it."""
    prepared, template = ready(questions, bpe)
    twice = [
        type(s)(**{**vars(s), "prompt_text": template.render(q) + "A\n\n" + s.prompt_text})
        for q, s in zip(questions, prepared.samples, strict=True)
    ]
    from tl_headnorm.data.tokens import encode

    encoded = encode(twice, bpe, max_length=10_000)
    targets = question_targets(questions, twice, encoded, bpe, template, "option:answer")
    for one, places in zip(targets.samples, targets.spans, strict=True):
        assert places[0] > len(one) / 2


def test_spans_inside_a_chat(questions):
    """The conversation's markers stand before the prompt and are tokens of their own."""
    tokenizer = train_tokenizer([q.stem for q in questions])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token }}user {{ m['content'] | trim }}{{ eos_token }}"
        "{% endfor %}answer:"
    )
    prepared, template = ready(questions, tokenizer, chat=True)
    args = (questions, prepared.samples, prepared.encoded, tokenizer, template)
    targets = question_targets(*args, "option:answer", part="text")
    for q, one, places in zip(questions, targets.samples, targets.spans, strict=True):
        assert q.options[q.answer] in said(tokenizer, one, places)
    settings = SteerSettings(**HEADS, prompts="p", generate=3, chat=True)
    asked = [Prompt(" light and a stone ", ("stone",), "1")]
    one = prepare_prompts(asked, tokenizer, settings)[0]
    assert said(tokenizer, one.tokens, one.span).strip() == "stone"
    assert one.tokens.ids.count(tokenizer.bos_token_id) >= 1


def test_a_span_that_was_cut_away_is_left_out(questions, bpe):
    prepared, template = ready(questions, bpe)
    short, _ = ready(questions, bpe, max_length=max(len(e) for e in prepared.encoded) - 1)
    assert any(e.truncated for e in short.encoded)
    args = (questions, short.samples, short.encoded, bpe, template)
    targets = question_targets(*args, "option:answer")
    assert len(targets.samples) == len(questions)
    with pytest.raises(InputError, match="expected a question with such a span, found none"):
        question_targets(*args, ["careful reasoner and nowhere"])
    with pytest.raises(InputError, match="moved beyond the prompt"):
        question_targets(*args, "option:answer", offset=10_000)


def test_a_template_that_changes_the_text_is_refused(questions, bpe):
    prepared, template = ready(questions, bpe, template="{{ question|upper }} {{ options }} A")
    args = (questions, prepared.samples, prepared.encoded, bpe, template)
    with pytest.raises(InputError, match=r"show .* as it stands"):
        question_targets(*args, "question")


def test_windows_of_text_keep_their_own_keywords(tmp_path, bpe):
    words = " ".join(f"word{i} light" if i % 3 == 0 else f"word{i}" for i in range(120))
    path = tmp_path / "text.txt"
    path.write_text(words)
    texts = read_texts(path)
    found = text_targets(texts, bpe, ["light"], length=40, most=9)
    rows = windows(texts, bpe, length=40, most=9)
    assert set(found.samples) <= set(rows)
    for one, places in zip(found.samples, found.spans, strict=True):
        assert "light" in bpe.decode([one.ids[p] for p in places])
        whole = bpe.decode(one.ids[1:])
        text = "".join(bpe.decode([one.ids[p]]) for p in places).replace(" ", "")
        assert abs(text.count("light") - whole.count("light")) <= 1  # one may be cut by the edge
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps(t) + "\n" for t in ("no such", "light", "", "a light day")))
    found = text_targets(read_texts(lines), bpe, ["light"], length=40, most=9)
    assert [s.index for s in found.samples] == [1, 2]
    with pytest.raises(InputError, match="found it in none"):
        text_targets(read_texts(lines), bpe, ["gravity"], length=40, most=9)


@pytest.fixture
def runs(tmp_path):
    """Three run directories' tables."""
    grid = [(la, h) for la in range(2) for h in range(3)]
    for name in ("focus", "attribution", "heads", "none"):
        (tmp_path / name).mkdir()
    focus = [
        {"layer": la, "head": h, "keyword": k, "query_pos": 9,
         "weight": 0.1 * i + 0.01 * (k == "b"), "uniform_weight": 0.4 if i > 3 else 0.0}
        for i, (la, h) in enumerate(grid) for k in "ab"
    ]  # fmt: skip
    pd.DataFrame(focus).to_parquet(tmp_path / "focus" / "focus.parquet")
    rows = [
        {"method": m, "layer": la, "head": h, "mean": float(i)}
        for m in ("grad_x_act", "michel") for i, (la, h) in enumerate(grid)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "attribution" / "attribution.parquet")
    table = pd.DataFrame(grid, columns=["layer", "head"])
    table["head_resid_contrib_norm_mean"] = [3.0, 1, 2, 6, 5, 4]
    table.to_parquet(tmp_path / "heads" / "heads.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("run", "statistic", "top", "bottom"),
    [
        ("focus", "auto", ((1, 1), (1, 2)), ((0, 0), (0, 1))),
        ("focus", "weight_over_uniform", ((0, 2), (1, 0)), ((0, 0), (1, 1))),
        # negative is useful, but for michel
        ("attribution", "auto", ((0, 0), (0, 1)), ((1, 1), (1, 2))),
        ("attribution", "michel", ((1, 1), (1, 2)), ((0, 0), (0, 1))),
        ("heads", "auto", ((1, 0), (1, 1)), ((0, 1), (0, 2))),
    ],
)
def test_heads_of_a_finished_run(runs, run, statistic, top, bottom):
    assert choose_heads("top:2", str(runs / run), statistic, 2, 3)[1] == top
    assert choose_heads("bottom:2", str(runs / run), statistic, 2, 3)[1] == bottom


def test_heads_that_cannot_be_chosen(runs):
    for text, run, statistic, said_of in (
        ("top:2", None, "auto", "expected a run directory to rank heads by"),
        ("top:2", "none", "auto", "expected a run directory with focus.parquet"),
        ("top:7", "focus", "auto", "a number from 1 to 6"),
        ("top:2", "focus", "wieght", "did you mean 'weight'"),
        ("top:2", "attribution", "mitchel", "did you mean 'michel'"),
        ("top:6", "focus", "auto", "a model with 1 layers"),
        ("9.1", None, "auto", "expected layers from 0 to 0"),
    ):
        with pytest.raises(InputError, match=said_of):
            choose_heads(text, run and str(runs / run), statistic, 1, 3)
    assert choose_heads("all", None, "auto", 1, 2)[1] == ((0, 0), (0, 1))
    assert choose_heads("0.1", None, "auto", 1, 2) == ("heads 0.1", ((0, 1),))


def test_random_sets_are_others_and_as_many():
    chosen = ((0, 1), (2, 3), (3, 0))
    sets = random_heads(chosen, 4, 4, 20, seed=1)
    assert all(len(set(heads)) == 3 and not set(heads) & set(chosen) for _, heads in sets)
    assert sets == random_heads(chosen, 4, 4, 20, seed=1)
    assert len({heads for _, heads in sets}) > 10
    few = random_heads(tuple((0, h) for h in range(3)), 1, 4, 2, seed=1)
    assert all(len(set(heads)) == 3 for _, heads in few)


def test_intervals_against_known_values():
    """Wilson's from the literature (Newcombe 1998, 81 of 263); coverage of the bootstrap."""
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 60):
        assert wilson(0, n)[0] == 0
        assert wilson(n, n)[1] == 1
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(size=40), 400, i)
        inside += low <= 0 <= high
    assert 175 <= inside <= 199
    assert bootstrap_interval(np.full(5, 2.0), 10, 0) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"spans": "question"}, "heads: expected either --heads or --profile"),
        ({**HEADS, "profile": True, "spans": "question"}, "found heads all and profile"),
        (HEADS, "spans: expected either spans"),
        ({**HEADS, "spans": "question", "keyword": "a"}, "found both"),
        ({**HEADS, "spans": "option:F1"}, "spans: expected question, option:answer"),
        ({**HEADS, "spans": "question", "boost": "1,-2"}, "boost: expected numbers of 0 or more"),
        ({**HEADS, "spans": "question", "boost": "1,x"}, "found 'x'"),
        ({**HEADS, "spans": "question", "boost": "inf"}, "found 'inf'"),
        ({"profile": True, "spans": "question", "profile_boost": -1.0}, "profile_boost: expected"),
        ({**HEADS, "dataset": "none"}, "expected questions, texts or prompts to run on"),
        ({**HEADS, "spans": "question", "texts": "t.txt"}, "keyword: expected a text to steer to"),
        ({**HEADS, "prompts": "p", "spans": "question"}, "prompts: expected neither texts nor"),
        ({**HEADS, "prompts": "p"}, "generate: expected a number of new tokens"),
        ({**HEADS, "spans": "question", "distract": "x"}, "distract: expected --prompts with it"),
        ({"profile": True, "prompts": "p", "generate": 4}, "profile: expected questions to pick"),
        ({**HEADS, "spans": "question", "seeds": 0}, "seeds: expected 1 or more, found 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, line):
    with pytest.raises(InputError, match=line):
        SteerSettings(**changes)


def test_boosts_and_keywords_as_they_are_given():
    assert SteerSettings(**HEADS, spans="question", boost="5, 0.5,5,1").boosts == (0.5, 1.0, 5.0)
    assert SteerSettings(**HEADS, spans="question", boost="1e12").boosts == (1e12,)
    assert SteerSettings(**HEADS, keyword="a b").keywords == ("a b",)
    assert SteerSettings(**HEADS, keyword=["a", "b"]).keywords == ("a", "b")


def test_the_configs_and_flags_are_understood():
    from conftest import ROOT

    from tl_headnorm.cli import parse

    settings = parse(["steer", "--config", str(ROOT / "configs" / "steer.yaml")])[1]
    assert settings.boosts == (0, 1, 1e4, 1e8, 1e12, 1e16)
    assert settings.profile
    one = ["steer", "--heads", "all", "--boost", "5", "--spans", "question"]
    assert parse(one)[1].boosts == (5.0,)
    both = parse(["steer", "--heads", "0.1", "--keyword", "[a b, c]"])[1]
    assert both.keywords == ("a b", "c")
    assert parse(["steer", "--heads", "0.1", "--keyword", "a b"])[1].keywords == ("a b",)
