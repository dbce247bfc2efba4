"""The report: what is packed comes back, what is said is true, no text leaves its place."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import asked, made_run, question

from tl_headnorm import load_run
from tl_headnorm.commands.report import command as jobs
from tl_headnorm.commands.report.page import report_html
from tl_headnorm.commands.report.related_runs import head_scores, related_runs
from tl_headnorm.commands.report.texts import Texts, texts_of
from tl_headnorm.measures import MEASURES
from tl_headnorm.plots.templates import formula, script_json

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, the text in scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.texts, self.open = [], {}, [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.open.append(dict(attributes).get("id", f"{tag}{len(self.scripts)}"))

    def handle_endtag(self, tag):
        if tag in ("script", "style") and self.open:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.scripts[self.open[-1]] = self.scripts.get(self.open[-1], "") + data
        else:
            self.texts.append(data)

    @property
    def payload(self):
        return json.loads(self.scripts["payload"])

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def values(self, measure, layer, head):
        """One head's values, decoded without the page's own script."""
        m, n_heads = self.payload["measures"][measure], self.payload["heads"]
        row = layer * n_heads + head
        text = self.scripts[f"values-{measure}"][row * m["stride"] :][: m["stride"]]
        codes = np.frombuffer(base64.b64decode(text), "<u2").astype(float)
        codes = codes[: len(self.payload["samples"]["index"])]
        if m["low"][row] is None:
            return np.full(len(codes), np.nan)
        values = m["low"][row] + codes / 65534 * (m["high"][row] - m["low"][row])
        return np.where(codes == 65535, np.nan, values)


def page_of(run, path="nowhere/run_1", questions=None, **more):
    texts = Texts(asked(run.sizes["sample"]) if questions is None else questions or None)
    return Page(report_html(run, Path(path), texts, **more))


@pytest.fixture(scope="module")
def plain_page():
    run = made_run()
    return run, page_of(run)


def test_values_in_the_page_are_those_of_the_run(plain_page):
    run, page = plain_page
    for k, name in enumerate(MEASURES if set(MEASURES) <= set(run) else page_names(page)):
        for layer, head in [(0, 0), (1, 4), (2, 2)]:
            wanted = run[name].values[:, layer, head]
            assert np.abs(page.values(k, layer, head) - wanted).max() <= np.ptp(wanted) / 131_000
        mean = np.array(page.payload["measures"][k]["mean"]).reshape(3, 5)
        np.testing.assert_allclose(mean, run[f"{name}_mean"].values, rtol=1e-6)
        std = np.array(page.payload["measures"][k]["std"]).reshape(3, 5)
        np.testing.assert_allclose(std, run[f"{name}_std"].values, rtol=1e-6)


def page_names(page):
    return [m["name"] for m in page.payload["measures"]]


def test_whatever_measures_a_run_holds():
    words = {f"measure_{i}": (f"m_{i}", "") for i in range(4)}
    page = page_of(made_run(words=words))
    assert page_names(page) == list(words)
    maps = [a["id"] for tag, a in page.elements if tag == "div" and a.get("class") == "map"]
    assert maps == [f"map-{i}" for i in range(4)]
    alone = page_of(made_run(words={"only": ("x", "")}))
    assert page_names(alone) == ["only"]
    assert "relation" not in {a.get("id") for _, a in alone.elements}


def test_samples_left_out_are_said():
    run = made_run(n=200)
    most = 2 * 15 * 2 * 50
    page = page_of(run, most_bytes=most)
    assert len(page.payload["samples"]["index"]) == 50
    assert "50 of the run's 200 questions are on this page" in page.text
    index = page.payload["samples"]["index"]
    wanted = run["head_output_norm"].values[index, 1, 1]
    assert np.abs(page.values(0, 1, 1) - wanted).max() <= np.ptp(wanted) / 131_000
    assert page.payload["samples"]["text"][7] == f"What about number {index[7]}?"
    np.testing.assert_allclose(
        page.payload["measures"][0]["mean"], run["head_output_norm_mean"].values.ravel(), rtol=1e-6
    )
    assert "are on this page" not in page_of(run).text


HOSTILE = [SCRIPT, "</script><img src=x onerror=alert(1)>", "<!--<script>", "π ≤ \u2028 😀 \x00",
           "{{ 7 * 7 }} {% raw %}", "]]>", "${alert(1)}"]  # fmt: skip


def test_hostile_text_stays_text():
    n = len(HOSTILE)
    run = made_run(n=n, ids=HOSTILE, right=np.arange(n) % 2 == 0)
    run.attrs["model"]["source"] = f"a/{SCRIPT}"
    run.attrs["dataset"]["name"] = SCRIPT
    run.attrs["num_skipped"] = {SCRIPT: 2}
    questions = [question(text, text, (text, "b", "c", "d")) for text in HOSTILE]
    calm = [tag for tag, _ in page_of(made_run(n=n, right=np.arange(n) % 2 == 0)).elements]
    page = page_of(run, questions=questions)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == calm.count("script")
    assert "img" not in tags
    assert page.payload["samples"]["text"] == HOSTILE
    assert page.payload["samples"]["id"] == HOSTILE
    assert f"2 records were skipped: {SCRIPT} (2)." in page.text


@given(st.lists(st.text(st.characters(codec=None), max_size=30), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_in_the_payload(texts):
    made = script_json(texts)
    assert json.loads(made) == texts
    assert not set("<>&\u2028\u2029") & set(made)
    assert made.encode("utf-8")


def test_pages_stay_under_25_megabytes():
    """Measures and samples of LLaMA 3.2-1B on ARC and more, with questions of ARC's length."""
    words = {f"measure_{i}": ("m", "") for i in range(4)}
    for n, whole in ((1168, True), (3000, False)):
        run = made_run(16, 32, n, right=False, words=words)
        made = report_html(run, Path("nowhere/run"), Texts(asked(n, "x" * 350 + "{i}")))
        assert len(made.encode()) < 25e6
        assert ("are on this page" in " ".join(made.split())) != whole


def test_the_parser_would_notice():
    """What plain json.dumps would have let through."""
    rival = f'<script id="payload">{json.dumps([SCRIPT])}</script>'
    assert Page(rival).scripts["payload"] != json.dumps([SCRIPT])
    assert json.loads(script_json([*HOSTILE])) == HOSTILE
    assert not set("<>&\u2028") & set(script_json([*HOSTILE]))


def test_formulas():
    assert str(formula("‖z_h W_O^h‖")) == "‖z<sub>h</sub> W<sub>O</sub><sup>h</sup>‖"
    assert str(formula("<b>_x")) == "&lt;b&gt;<sub>x</sub>"


def test_no_network_and_plotly_once(plain_page):
    page = plain_page[1]
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:,", "../")), (tag, target)
    source = zlib.decompress(base64.b64decode(page.scripts["plotly"]))
    assert source.count(b"plotly.js v") == 1
    assert sum(len(text) > 1_000_000 for text in page.scripts.values()) == 1


def test_no_per_sample_values():
    page = page_of(made_run(per_sample=False))
    ids = {a.get("id") for _, a in page.elements}
    assert "samples" not in ids
    assert "spread" not in ids
    assert "explorer" in ids
    assert page.payload["samples"] is None
    assert "with per_sample: true to get the explorer" in page.text.replace("Run collect ", "")
    assert "no text of any question" in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"missing_layers": [1]}, "No values for layers 1"),
        ({"num_truncated": 3}, "3 of 40 prompts were longer than allowed"),
        ({"num_skipped": {"3 options": 4}}, "4 records were skipped: 3 options (4)."),
        ({"validated_against_hf": None}, "Not compared with Hugging Face in this run"),
        ({"validated_against_hf": 0.1}, "Hugging Face disagrees: the worst relative difference"),
        ({"token_agg": "all"}, "includes the first one, where attention sinks sit"),
    ],
)
def test_warnings(change, said):
    assert said in page_of(made_run(**change)).text
    assert said not in page_of(made_run()).text


def test_accuracy_near_chance():
    right = np.arange(100) < 30
    said = "Accuracy (30.0%, 95 % interval from 21.9%) is not clearly above chance (25.0%)"
    assert said in page_of(made_run(n=100, right=right)).text
    assert "above chance" not in page_of(made_run(n=100, right=np.arange(100) < 60)).text
    unknown = page_of(made_run(n=100, right=right), questions=[]).text
    assert "not clearly above chance (20.0% to 25.0%)" in unknown


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"n_layers": 1, "n_heads": 1, "n": 1}, "Only 1 sample: means and spreads are rough"),
        ({"n_layers": 100, "n_heads": 2, "n": 30}, "100 × 2"),
        ({"right": np.zeros(40, bool)}, "0 questions were answered right and 40 wrong"),
        ({"right": False}, "Answers were not scored in this run."),
        ({"missing": (1,), "missing_layers": [1]}, "No values for layers 1"),
        ({"missing": (0, 1, 2), "missing_layers": [0, 1, 2]}, "No values."),
    ],
)
def test_odd_runs_give_pages(made, said):
    page = page_of(made_run(**made))
    assert said in page.text
    assert "NaN" not in page.scripts["payload"]


def test_ranking(plain_page):
    run, page = plain_page
    order = np.argsort(-run["head_output_norm_mean"].values.ravel())
    names = [f"{i // 5}.{i % 5}" for i in order]
    listed = [f"{a['data-layer']}.{a['data-head']}" for tag, a in page.elements
              if tag == "button" and a.get("class") == "head"]  # fmt: skip
    assert listed[:15] == names


def test_texts_cut_short_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("tl_headnorm.commands.report.payload.MOST_TEXT", 20_000)
    page = page_of(made_run(), questions=asked(40, "x" * 3000 + "{i}"))
    texts = page.payload["samples"]["text"]
    assert max(map(len, texts)) <= 200
    assert all(text.endswith("…") for text in texts)
    assert "Long questions are cut short on this page." in page.text


def other(folder, name, meta, **tables):
    path = folder / name
    path.mkdir(parents=True)
    (path / "meta.json").write_text(json.dumps(meta))
    for file, table in tables.items():
        table.to_parquet(path / f"{file}.parquet")
    return path


def test_related_runs(tmp_path):
    run = made_run()
    meta = {key: run.attrs[key] for key in ("model", "dataset")}
    table = pd.DataFrame(
        {"set": ["clean", "head 0.1", "head 2.4", "all"], "method": ["none", *["zero"] * 3],
         "layer": [-1, 0, 2, -1], "head": [-1, 1, 4, -1], "accuracy_drop": [0, 0.25, -0.5, 1.0],
         "loss_delta": [0.0, 1.0, 2.0, 3.0]}
    )  # fmt: skip
    path = other(tmp_path, "ablation & <b>", meta, ablation=table)
    (path / "ablation.html").write_text("x")
    scores = pd.DataFrame(
        {"method": ["ig"], "layer": [1], "head": [3], "mean": [0.5], "stderr": [0.125]}
    )
    other(tmp_path, "attribution_1", meta, attribution=scores)
    other(tmp_path, "other_model", {"model": {"source": "x"}}, ablation=table)
    changed = {**meta, "dataset": {**meta["dataset"], "sha256": "ff"}}
    other(tmp_path, "other_data", changed, ablation=table)
    other(tmp_path, "texts_only", {**meta, "dataset": None}, dims=table)
    other(tmp_path, "compared", {"runs": ["/x/run_0", "/y/run_1"]}, compare=table)
    other(tmp_path, "compared_others", {"runs": ["/x/run_0", "/y/run_11"]}, compare=table)
    (tmp_path / "unfinished").mkdir()
    mine = other(tmp_path, "run_1", meta)
    found = related_runs(mine, run.attrs)
    assert [(s.kind, s.name) for s in found] == [
        ("ablation", "ablation & <b>"), ("attribution", "attribution_1"),
        ("comparison", "compared"), ("massive activations", "texts_only"),
    ]  # fmt: skip
    by_name = {s.name: s.values for s in head_scores(found, (3, 5))}
    drop = by_name["zero: accuracy lost (share)"]
    assert (drop[0, 1], drop[2, 4], np.isnan(drop).sum()) == (0.25, -0.5, 13)
    assert by_name["ig: attribution"][1, 3] == 0.5
    page = page_of(run, mine)
    links = [a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("..")]
    assert links == ["../ablation%20%26%20%3Cb%3E/ablation.html"]
    (ig,) = [s for s in page.payload["scores"] if s["name"] == "ig: attribution"]
    assert (ig["values"][8], ig["stderr"][8]) == (0.5, 0.125)


def test_a_damaged_study_is_no_fault_of_the_run(tmp_path):
    run = made_run()
    path = other(tmp_path, "ablation_1", {key: run.attrs[key] for key in ("model", "dataset")})
    (path / "ablation.parquet").write_bytes(b"PAR1 no")
    mine = other(tmp_path, "run_1", {})
    assert page_of(run, mine).payload["scores"] == []


def test_collect_writes_it_and_report_writes_it_again(run_cli, finished, small, tmp_path):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    run = load_run(finished)
    for k, m in enumerate(page.payload["measures"]):
        wanted = run[m["name"]].values[:, 2, 5]
        assert np.abs(page.values(k, 2, 5) - wanted).max() <= np.ptp(wanted) / 131_000
    assert page.payload["samples"]["text"][0] == "Which planet is closest to the Sun? (0)"
    assert finished.stat().st_mtime > 0
    made = run_cli("collect", *small, "--output_dir", tmp_path).run_dir
    first = (made / "report.html").read_text(encoding="utf-8")
    (made / "report.html").unlink()
    result = run_cli("report", made)
    assert result.run_dir == made
    assert "report.html (" in result.err
    again = Page((made / "report.html").read_text(encoding="utf-8"))
    assert again.payload == Page(first).payload
    assert run_cli("report", made, "--texts", "false").code == 0
    assert Page((made / "report.html").read_text()).payload["samples"]["text"] is None


def test_texts_need_an_unchanged_data_set(finished, tmp_path):
    run = load_run(finished)
    assert texts_of(run).questions is not None
    run.attrs["dataset"] = {**run.attrs["dataset"], "sha256": "another"}
    assert "changed since" in texts_of(run).why_not
    run.attrs["settings"] = {**run.attrs["settings"], "data_dir": str(tmp_path / "gone")}
    assert "could not be read again" in texts_of(run).why_not
    run.attrs["dataset"] = {"name": "custom"}
    assert "'custom' is not registered here" in texts_of(run).why_not


def test_a_merged_run_reads_its_questions_again(finished, tmp_path):
    run = load_run(finished)
    run.attrs["merged"] = [{"run": "a<b", "num_skipped": {}}]
    jobs.report_of_new_run(run, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.payload["samples"]["text"][1].startswith("What do plants need")
    assert 'merged {"run": "a<b", "num_skipped": {}}' in page.text


def test_a_fault_in_the_page_does_not_cost_the_run(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(jobs, "write_report", broken)
    with pytest.warns(UserWarning, match=r"report.html was not written \(ZeroDivisionError: no\)"):
        jobs.report_of_new_run(made_run(), tmp_path, asked(40))


def test_refusals(run_cli, tmp_path):
    assert "expected one run directory or more" in run_cli("report").error_line
    assert "expected a finished run directory" in run_cli("report", tmp_path).error_line


def test_assets_are_in_the_package():
    """Read as an installed package would; the build takes every file below tl_headnorm."""
    from importlib.resources import files

    folder = files("tl_headnorm.commands.report")
    names = {f.name for f in folder.iterdir()}
    assert names >= {"page.html.j2", "report.css", "core.js", "figures.js", "samples.js",
                     "explorer.js"}  # fmt: skip
    assert not re.search(r"https?://", (folder / "page.html.j2").read_text())
