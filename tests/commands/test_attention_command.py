"""The page's content, the pictures, and the command that brings all together."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import question_record, write_jsonl

from tl_headnorm.commands.attention import page, plots
from tl_headnorm.commands.attention.distraction import insert
from tl_headnorm.commands.attention.generation import write
from tl_headnorm.commands.attention.keywords import find_keyword
from tl_headnorm.commands.attention.patterns import Wanted, foremost, look
from tl_headnorm.data.lines import text_or_file
from tl_headnorm.data.prompts import read_prompts
from tl_headnorm.data.spans import encode_text
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model
from tl_headnorm.plots import plotly
from tl_headnorm.plots.png import png
from tl_headnorm.plots.templates import asset
from tl_headnorm.plots.text import families, token_label

STORY = "Once upon a time there was a little dog. The dog liked the park. He saw a cat and"
NASTY = "a <script>alert('x')</script> & $x_1$ </body> 🙂 气候变化"


@pytest.fixture(scope="module")
def stories_dir(shared_data):
    return str(shared_data / "stories260K")


@pytest.fixture(scope="module")
def stories(stories_dir):
    return load_model(stories_dir, dtype="fp32", device_map="cpu")


def unpacked(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_the_page_holds_what_was_found(stories):
    tokens = encode_text(stories.tokenizer, f"{STORY} {NASTY}")
    words = [find_keyword(stories, tokens, text) for text in ("<script>", "🙂")]
    found = look(stories, tokens, Wanted((0, 2)), words, [len(tokens) - 1])
    found.run.attrs["uniform"]["extra"] = 1.0
    writing = write(stories, tokens, ((0, 1), (2, 2)), max_new_tokens=5)
    change = page.score_map("before", np.zeros((2, 8)), None, "distraction", signed=True)
    data = page.page_data(found, writing, [change])
    text = page.page(data, title="<b>", about=NASTY, written=NASTY, keywords=NASTY, answers=[NASTY])
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    held = json.loads(inside[1])
    assert held["labels"] == found.labels
    assert "".join(held["pieces"]).replace("‧", "") == f"<s> {tokens.text}"
    n, size = len(tokens), len(tokens) * (len(tokens) + 1) // 2
    triangles = unpacked(held["patterns"], "<u2").reshape(-1, size) / 65535
    assert len(triangles) == len(held["names"]) == 16 + 2 + 8 + 1
    kept = found.kept[2, 5].astype(float)[np.tril_indices(n)]
    np.testing.assert_allclose(triangles[held["names"].index("2.5")], kept, atol=1e-5)
    np.testing.assert_array_equal(unpacked(held["thumbs"], np.uint8), found.thumbnails.ravel())
    steps = unpacked(held["writing"]["weights"], "<u2").reshape(2, 5, n + 5) / 65535
    np.testing.assert_allclose(steps, np.nan_to_num(writing.weights), atol=1e-4)
    profile = unpacked(held["profile"], "<u2").reshape(2, 8, held["reach"]) / 65535
    np.testing.assert_allclose(profile, found.run["profile"], atol=1e-5)
    assert held["maps"]["first_token"]["uniform"] == found.run.attrs["uniform"]["first_token"]
    last = unpacked(held["last_rows"], "<u2").reshape(2, 8, n) / 65535
    np.testing.assert_allclose(last[1, 5], kept[-n:], atol=1e-4)
    # Text is text: the only scripts and ends of the body are the page's own.
    assert text.count("<script") == 3
    assert text.count("</script") == 3
    assert text.count("</body>") == 1
    assert "&lt;script&gt;alert(&#39;x&#39;)" in text
    assert "http" not in text.replace(NASTY, "")


def test_the_page_is_bounded(stories, monkeypatch):
    """The foremost heads and the means; every head by its last row and thumbnail."""
    tokens = encode_text(stories.tokenizer, STORY)
    found = look(stories, tokens, Wanted((0, 2)))
    n = len(tokens)
    monkeypatch.setattr(page, "MOST_BYTES", n * (n + 1) * (len(found.means) + 3))
    data = page.page_data(found)
    assert sorted(set(data["names"]) - set(found.means)) == sorted(
        f"{layer}.{head}" for layer, head in foremost(found.run)[:3]
    )
    assert unpacked(data["last_rows"], "<u2").size == 16 * n


def test_nothing_in_the_script_writes_html():
    script = asset("commands/attention/page.js") + asset("plots/page.js")
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_labels_that_any_font_can_write():
    assert token_label(" the") == "·the"
    assert token_label("a\nb") == "a↵b"
    assert token_label("  ") == "··"
    assert token_label("extraordinarily") == "extraordinari…"
    emoji = token_label("🙂 1/4")
    assert emoji in ("🙂 1/4", "U+1F642 1/4")
    assert "DejaVu Sans" in families()


def test_pictures_of_any_script(stories):
    """Warnings are errors here: a glyph that is missing would be one."""
    tokens = encode_text(stories.tokenizer, NASTY)
    words = [find_keyword(stories, tokens, text) for text in ("$x_1$", "气候")]
    found = look(stories, tokens, Wanted((0, 2)), words, [len(tokens) - 1])
    writing = write(stories, tokens, ((0, 1), (2, 2)), max_new_tokens=3)
    for figure in (
        plots.all_heads(found, NASTY),
        plots.pattern(found.kept[2, 5], found.labels, "$x_1$ {", NASTY),
        plots.scores(found.run, "气"),
        plots.keywords(found.run, "t"),
        plots.generation(writing, "t"),
        plots.changes([("$a$ 🙂", np.zeros((2, 8)))], [0, 2], "t"),
    ):
        assert png(figure)[:4] == b"\x89PNG"
        assert plotly.draw(figure).data


@pytest.fixture(scope="module")
def flags(stories_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return ["--model_path", stories_dir, "--dtype", "fp32", "--device_map", "cpu",
            "--repeat_length", 10, "--output_dir", out]  # fmt: skip


@pytest.fixture(scope="module")
def finished(run_cli, flags):
    return run_cli(
        "attention", *flags, "--prompt", f"{STORY} {NASTY}", "--keyword", "[dog, park]",
        "--generate", 4, "--generate_heads", "1.2,3.*", "--distract", "Zap!",
        "--distract_at", "before",
    )  # fmt: skip


def test_files_of_the_command(finished):
    path = finished.run_dir
    pages = {p.name for p in path.iterdir()}
    assert {
        "attention.html", "patterns.npz", "generation.npz", "focus.parquet", "heads.parquet",
        "distraction.parquet", "answers.parquet", "summary.md", "meta.json", "config.json",
        "heads.png", "scores.png", "focus.png", "generation.png", "distraction.png",
    } <= pages  # fmt: skip
    assert len([name for name in pages if name.startswith("head_")]) == 1
    arrays = np.load(path / "patterns.npz")
    n = len(arrays["tokens"])
    assert arrays["patterns"].shape == (5, 8, n, n)
    assert arrays["patterns"].dtype == np.float16
    np.testing.assert_allclose(arrays["patterns"].astype(float).sum(-1), 1, atol=5e-3)
    steps = np.load(path / "generation.npz")
    assert steps["weights"].shape == (9, 4, n + 4)
    assert steps["heads"][0].tolist() == [1, 2]
    focus = pd.read_parquet(path / "focus.parquet")
    wanted = ["layer", "head", "keyword", "query_pos", "weight", "uniform_weight"]
    assert list(focus)[:6] == wanted
    assert len(focus) == 80
    heads = pd.read_parquet(path / "heads.parquet")
    assert len(heads) == 40
    assert heads["induction"].notna().all()
    changes = pd.read_parquet(path / "distraction.parquet")
    np.testing.assert_allclose(
        changes["change"], changes["weight_after"] - changes["weight_before"]
    )
    text = (path / "summary.md").read_text(encoding="utf-8")
    assert "“dog”: 2 occurrences, 4 tokens." in text
    assert "4 new tokens, greedy" in text
    meta = json.loads((path / "meta.json").read_text())
    assert meta["num_processed"] == 1
    assert meta["num_tokens"] == n
    assert meta["uniform"]["first_token"] == heads["first_token_uniform"][0]


def test_its_heads_rank_for_ablate(finished, run_cli, small, tmp_path):
    heads = pd.read_parquet(finished.run_dir / "heads.parquet")
    from tl_headnorm.interventions.rankings import ranked_heads

    shape = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    top = ranked_heads("top:2", finished.run_dir, "previous_token", *shape, ("heads.parquet",))[1]
    best = heads.sort_values("previous_token").tail(2)
    assert set(top) == set(zip(best["layer"], best["head"], strict=True))


def test_a_question_and_its_answer(run_cli, tmp_path):
    flags = ["--model_path", "builtin:tiny", "--dtype", "fp32", "--device_map", "cpu",
             "--dataset", "builtin:questions", "--repeat_length", 0, "--layers", "0,2",
             "--output_dir", tmp_path]  # fmt: skip
    path = run_cli("attention", *flags, "--question", 3, "--distract", "What is heavy?",
                   "--keyword", "Options:", "--heads", "2.*").run_dir  # fmt: skip
    answers = pd.read_parquet(path / "answers.parquet")
    assert set(answers["answer"]) <= set("ABCDE")
    sums = answers.groupby("place")["probability"].sum()
    np.testing.assert_allclose(sums, 1)
    assert set(answers["place"]) == {"clean", "before", "inside", "after"}
    assert answers.groupby("place")["best"].sum().tolist() == [1, 1, 1, 1]
    arrays = np.load(path / "patterns.npz")
    assert arrays["heads"].tolist() == [[2, h] for h in range(8)]
    assert arrays["patterns"].shape[0] == 8
    text = (path / "summary.md").read_text()
    assert "8 of its patterns are kept whole, 8 were left out" in text
    assert re.search(r"Its right answer is [A-E]\.", text)
    meta = json.loads((path / "meta.json").read_text())
    assert meta["dataset"]["name"] == "builtin:questions"
    assert "induction" not in pd.read_parquet(path / "heads.parquet")
    table = pd.read_parquet(path / "distraction.parquet")
    assert table["layer"].unique().tolist() == [0, 2]
    lost = run_cli("attention", *flags, "--question", "no-such-id")
    assert lost.code == 2
    assert "expected an id of the dataset or a place from 0 to 499" in lost.error_line


CHAT = "{{ bos_token }}<user>{{ messages[0]['content'] }}</user>\n<bot>"


def test_chat_and_where_text_is_put_then(stories_dir, tmp_path, run_cli):
    """The instruction is the user's turn, and in a question all of it but the answer's line."""
    from transformers import AutoTokenizer

    from tl_headnorm.commands.attention.inputs import open_subjects
    from tl_headnorm.commands.attention.settings import AttentionSettings

    copy = tmp_path / "model"
    shutil.copytree(stories_dir, copy)
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(copy)
    common = {"model_path": str(copy), "dtype": "fp32", "device_map": "cpu", "chat": True}
    _, found = open_subjects(AttentionSettings(prompt="Say hello. Be kind. ", **common))
    [one] = found.items
    assert one.tokens.text == "<user>Say hello. Be kind. </user>\n<bot>"
    assert one.tokens.text[slice(*one.instruction)] == "Say hello. Be kind."
    text = insert(one.tokens.text, one.instruction, "Zap!", "before", []).text
    assert text == "<user>Zap! Say hello. Be kind. </user>\n<bot>"
    records = [question_record(i) for i in range(3)]
    file = write_jsonl(tmp_path / "q.jsonl", records)
    how = AttentionSettings(question="q1", data_dir=str(file), **common, max_length=512)
    _, found = open_subjects(how)
    [one] = found.items
    inside = one.tokens.text[slice(*one.instruction)]
    assert inside.startswith("You are a careful reasoner.")
    assert inside.endswith(f"D. {records[1]['question']['choices'][3]['text']}\n\n")
    assert one.tokens.text[one.instruction[1] :].startswith("Answer: </user>")
    assert [letter for letter, _ in one.letters] == list("ABCD")
    assert one.answer == "B"
    _, part = open_subjects(how.updated(distract="x", instruction="Think step-by-step"))
    assert part.items[0].tokens.text[slice(*part.items[0].instruction)] == "Think step-by-step"


def test_a_file_with_the_distracting_text(tmp_path):
    file = tmp_path / "other.txt"
    file.write_text("Look away.\n", encoding="utf-8")
    assert text_or_file(str(file), "distract") == "Look away.\n"
    for text in ("Look!", "Look! " * 2000, "~nobody looks", "a\0b"):  # not all can be paths
        assert text_or_file(text, "distract") == text
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="distract: expected a text or a UTF-8 file"):
        text_or_file(str(file), "distract")
    with pytest.raises(InputError, match="distract: expected a text, found none"):
        text_or_file(" ", "distract")


def test_the_bridge_makes_the_same_files(run_cli, flags, tmp_path):
    given = ["--prompt", STORY, "--keyword", "dog", "--generate", 3, "--generate_heads", "2.1",
             "--distract", "Zap!", "--layers", "1-2", "--heads", "all"]  # fmt: skip
    one, two = (
        run_cli("attention", *flags, *given, "--engine", engine, "--output_dir", tmp_path).run_dir
        for engine in ("hooked", "bridge")
    )
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for name in ("focus", "heads", "distraction", "answers"):
        a, b = (pd.read_parquet(path / f"{name}.parquet") for path in (one, two))
        numbers = a.select_dtypes("number").columns
        np.testing.assert_allclose(a[numbers], b[numbers], atol=1e-4)
    a, b = (np.load(path / "patterns.npz")["patterns"] for path in (one, two))
    assert a.shape[:2] == (2, 8)
    np.testing.assert_allclose(a, b, atol=1e-3)
    a, b = (np.load(path / "generation.npz")["weights"] for path in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_file_of_prompts(run_cli, flags, tmp_path):
    lines = [
        {"prompt": "The dog ran.", "keywords": "dog", "id": "first"},
        json.dumps("A cat and a dog sat."),
        {"prompt": "The park is big.", "keywords": ["park", "big"]},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", lines)
    path = run_cli("attention", *flags, "--prompts", file, "--pages", 2).run_dir
    assert (path / "prompt_000" / "attention.html").exists()
    assert not (path / "prompt_002").exists()
    focus = pd.read_parquet(path / "focus.parquet")
    assert sorted(focus["keyword"].unique()) == ["big", "dog", "park"]
    assert set(focus["prompt"]) == {0, 2}
    assert json.loads((path / "meta.json").read_text())["num_processed"] == 3
    text = (path / "summary.md").read_text()
    assert "# prompt first" in text
    assert "# prompt 2" in text
    few = run_cli("attention", *flags, "--prompts", file, "--max_samples", 1).run_dir
    assert json.loads((few / "meta.json").read_text())["num_processed"] == 1
    plain = tmp_path / "p.txt"
    plain.write_text("One prompt\n\nAnother\u2028one\r\n", encoding="utf-8")
    assert [p.text for p in read_prompts(plain).items] == ["One prompt", "Another\u2028one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected JSON"),
        ('{"text": "a"}', "line 1: expected a text, or an object with a text under 'prompt'"),
        ('{"prompt": " "}', "line 1: expected a text, or an object with a text under 'prompt'"),
        ('{"prompt": "a", "keywords": [3]}', "a list of texts under 'keywords', found [3]"),
        ('"\\ud800"', "line 1: expected Unicode text"),
        ("", "expected prompts in"),
    ],
)
def test_bad_files_of_prompts(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "prompt: expected one of --prompt, --question and --prompts, found none"),
        (["--prompt", "a", "--question", "1"], "found prompt and question"),
        (["--prompt", "a", "--top_k", 3], "top_k: expected --temperature with it"),
        (["--prompt", "a", "--generate_heads", "0.1"], "generate_heads: expected --generate with"),
        (["--prompt", "a", "--temperature", 1], "temperature: expected --generate with it"),
        (["--prompt", "a", "--instruction", "a"], "instruction: expected --distract with it"),
        (["--prompt", "a", "--match", "semantic"], "match: expected --keyword with it"),
        (["--prompt", "a", "--generate", -1], "generate: expected 0 or more, found -1"),
        (["--prompt", "a", "--keyword", "b"], "keyword: expected a text that stands in the prom"),
        (["--prompt", "a", "--layers", "7"], "layers: expected layers from 0 to 4"),
        (["--prompt", "a", "--heads", "0.9"], "heads: expected heads from 0 to 7"),
        (["--prompt", "a b c d e", "--max_length", 3], "expected at most 3 tokens"),
        (["--prompts", "no.txt"], "prompts: expected a UTF-8 file of prompts"),
        (["--prompt", "a", "--layers", "0", "--heads", "1.1"], "heads: expected heads of the lay"),
    ],
)  # fmt: skip
def test_refused(run_cli, flags, given, message, tmp_path):
    result = run_cli("attention", *flags, *given, "--output_dir", tmp_path / "runs")
    assert result.code == 2
    assert message in result.error_line
    assert not list((tmp_path / "runs").glob("*"))
