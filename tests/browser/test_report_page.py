"""The report in a real browser: from disk, with the network blocked, by pointer and by keyboard."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chromium import find_chromium, opened
from made_runs import asked, made_run, question

from tl_headnorm import load_run
from tl_headnorm.commands.report.page import report_html
from tl_headnorm.commands.report.texts import Texts

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def write_page(folder, run, questions=None, **more):
    path = folder / "report.html"
    texts = Texts(asked(run.sizes["sample"]) if questions is None else questions)
    path.write_text(report_html(run, folder, texts, **more), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of 3 x 5 heads over 400 questions, the eighth of them hostile, and its page."""
    run = made_run(n=400)
    questions = asked(400)
    questions[7] = question("q7", SCRIPT, (SCRIPT, "b", "c", "d"))
    return run, write_page(tmp_path_factory.mktemp("page"), run, questions)


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch):
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_chromium(["no-such-browser"])
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="expected Debian's chromium"):
        find_chromium(["no-such-browser"])


def test_the_guards_can_fail(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<script src="https://example.org/x.js"></script><script>alert(1)</script>')
    with opened(browser, bad, wait="") as seen:
        pass
    assert "https://example.org/x.js" in seen.requests
    assert any("ERR_" in fault for fault in seen.faults)
    assert "1" in seen.faults


def test_every_figure_is_drawn(browser, made):
    with opened(browser, made[1]) as seen:
        drawn = seen.page.evaluate(
            """[...document.querySelectorAll(".map, .chart")].map((e) =>
                 [e.id || e.dataset.difference, e.querySelectorAll(".main-svg").length > 0])"""
        )
        assert len(drawn) == 2 + 1 + 2 + 2 + 1
        assert all(there for _, there in drawn), drawn


def test_pointing_pinning_and_letting_go(browser, made):
    run, path = made
    with opened(browser, path) as seen:
        page = seen.page
        assert not page.locator("#samples-body").is_visible()
        page.mouse.move(*seen.at(1, 3))
        seen.head_is(1, 3)
        assert not page.locator("#samples-body").is_visible()
        page.mouse.click(*seen.at(2, 4, measure=1))
        seen.head_is(2, 4)
        assert page.locator("#samples-body").is_visible()
        values = run["head_resid_contrib_norm"].values[:, 2, 4]
        first = [int(text) for text in seen.column(1)]
        assert first == list(np.argsort(-values, kind="stable")[: len(first)])
        shown = [float(text) for text in seen.column(8)]
        np.testing.assert_allclose(shown, values[first], rtol=1e-3)
        page.mouse.move(*seen.at(0, 0))
        page.wait_for_timeout(100)
        seen.head_is(2, 4)
        page.mouse.click(*seen.at(0, 1, measure=1))
        seen.head_is(0, 1)
        assert [int(text) for text in seen.column(1)] != first
        page.locator("#state button").click()
        assert not page.locator("#samples-body").is_visible()
        page.mouse.move(*seen.at(1, 1))
        seen.head_is(1, 1)


def test_the_panel_says_what_the_run_says(browser, made):
    run, path = made
    with opened(browser, path) as seen:
        seen.page.mouse.click(*seen.at(1, 2))
        seen.head_is(1, 2)
        rows = seen.page.locator("#head-numbers tbody tr").all_inner_texts()
        for name, row in zip(("head_output_norm", "head_resid_contrib_norm"), rows, strict=True):
            _, mean, std, rank = row.split("\t")
            means = run[f"{name}_mean"].values
            assert float(mean) == pytest.approx(means[1, 2], rel=6e-4)
            assert float(std) == pytest.approx(run[f"{name}_std"].values[1, 2], rel=6e-3)
            assert rank == f"{1 + (means > means[1, 2]).sum()} / 15"


def test_the_spread_counts_every_question(browser, made):
    run, path = made
    with opened(browser, path) as seen:
        seen.page.mouse.click(*seen.at(1, 2))
        seen.head_is(1, 2)
        seen.page.wait_for_timeout(100)
        right, wrong = seen.page.evaluate(
            "document.getElementById('spread').data.map((t) => t.y.reduce((a, b) => a + b, 0))"
        )
        correct = np.array([bool(x) for x in run["correct"].values])
        assert (right, wrong) == (correct.sum(), (~correct).sum())


def test_sorting_and_finding(browser, made):
    run, path = made
    tokens = run["n_tokens"].values
    with opened(browser, path) as seen:
        seen.page.mouse.click(*seen.at(0, 0))
        header = seen.page.locator("#table thead")
        header.get_by_role("button", name="tokens").click()
        found = [int(text) for text in seen.column(3)]
        assert found == sorted(tokens, reverse=True)[: len(found)]
        assert header.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
        header.get_by_role("button", name="tokens").click()
        assert [int(text) for text in seen.column(3)] == sorted(tokens)[: len(found)]
        header.get_by_role("button", name="question").click()
        texts = seen.column(2)
        assert texts[0] == SCRIPT
        numbers = [int(text.split()[-1].rstrip("?")) for text in texts[1:]]
        assert numbers == sorted(numbers), "2 before 10"
        seen.page.locator("#find").fill("number 39")
        assert seen.text("#found") == "11 of 400"
        assert len(seen.column(1)) == 11
        seen.page.locator("#find").fill("no such thing")
        assert seen.column(1) == []


def test_hostile_text_is_text(browser, made):
    with opened(browser, made[1]) as seen:
        page = seen.page
        before = page.locator("script").count()
        page.mouse.click(*seen.at(0, 0))
        page.locator("#find").fill("alert")
        assert seen.column(2) == [SCRIPT]
        page.locator("#table tbody button").click()
        assert SCRIPT in seen.text("#detail")
        assert f"A. {SCRIPT}" in seen.text("#detail")
        assert page.locator("script").count() == before
        assert page.locator("img").count() == 0


def test_keyboard(browser, made):
    with opened(browser, made[1]) as seen:
        page = seen.page
        page.locator("#map-0").focus()
        page.keyboard.press("Home")
        for _ in range(9):
            page.keyboard.press("ArrowUp")
        seen.head_is(0, 0)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        seen.head_is(1, 1)
        assert not page.locator("#samples-body").is_visible()
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid", "where the focus is must be seen"
        page.keyboard.press("Enter")
        assert page.locator("#samples-body").is_visible()
        page.wait_for_function(
            "document.getElementById('announcement').textContent.endsWith('pinned')"
        )
        assert seen.text("#announcement").startswith("Layer 1, head 1: ")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        seen.head_is(1, 4)
        page.keyboard.press("Escape")
        assert not page.locator("#samples-body").is_visible()
        page.locator("#map-1").focus()
        page.keyboard.press("Enter")
        assert page.locator("#head-numbers tr.active td").first.get_attribute("title") == (
            "head_resid_contrib_norm"
        )


def brightness(seen, selector, what):
    text = seen.page.evaluate(
        f"getComputedStyle(document.querySelector('{selector}')).{what}.match(/\\d+/g).map(Number)"
    )
    return sum(text[:3]) / 3


def test_light_and_dark(browser, made):
    for scheme, other in (("light", "dark"), ("dark", "light")):
        with opened(browser, made[1], color_scheme=scheme) as seen:
            for now in (scheme, other, scheme):
                page, ink = (brightness(seen, "body", w) for w in ("backgroundColor", "color"))
                label = brightness(seen, "#map-0 .xtick text", "fill")
                assert (page < 60 < 180 < ink) == (now == "dark")
                assert (page > 200 > 60 > ink) == (now == "light")
                assert (label > page) == (now == "dark"), "figures change with the page"
                seen.page.locator("#theme").click()


def test_on_paper(browser, made):
    """Printed from the dark, the page is dark on light and no control is left."""
    with opened(browser, made[1], color_scheme="dark") as seen:
        seen.page.mouse.click(*seen.at(0, 0))
        seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        seen.page.emulate_media(media="print")
        assert brightness(seen, "body", "color") < 60
        for selector in ("nav", "#theme", "#scroller"):
            assert not seen.page.locator(selector).is_visible()
        assert seen.page.locator("#strongest li").count() == 5
        seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
        seen.page.emulate_media(media="screen")
        assert brightness(seen, "body", "backgroundColor") < 60
        assert seen.page.pdf()[:5] == b"%PDF-"


def test_the_run_s_own_numbers(browser, finished):
    """A run made by collect: what the page decodes is what load_run gives, head by head."""
    run = load_run(finished)
    with opened(browser, finished / "report.html") as seen:
        names = seen.page.evaluate("headReport.data.measures.map((m) => m.name)")
        for k, name in enumerate(names):
            found = np.array(seen.page.evaluate(
                f"""[...Array(headReport.data.layers).keys()].map((l) =>
                    [...Array(headReport.data.heads).keys()].map((h) =>
                        [...headReport.values({k}, l, h)]))"""
            ))  # fmt: skip
            wanted = run[name].values.transpose(1, 2, 0).astype(np.float64)
            step = np.ptp(wanted, axis=2, keepdims=True) / 65534
            assert (np.abs(found - wanted) <= 0.51 * step).all()
            assert np.abs(found - wanted).max() <= np.abs(wanted).max() * 2**-11, "float16's own"
            assert found.sum() == pytest.approx(wanted.sum(), rel=1e-5)
            assert np.array_equal(found.argsort(2), wanted.argsort(2)) or (step > 0).any()


def test_five_thousand_questions_stay_quick(browser, tmp_path):
    """Only the rows in sight exist, and only heads that were looked at are decoded."""
    run = made_run(n_layers=4, n_heads=8, n=5000)
    with opened(browser, write_page(tmp_path, run)) as seen:
        page = seen.page
        page.mouse.click(*seen.at(3, 7))
        seen.head_is(3, 7)
        assert page.locator("#table tbody tr").count() < 60
        page.locator("#scroller").evaluate("(e) => { e.scrollTop = e.scrollHeight; }")
        values = run["head_output_norm"].values[:, 3, 7]
        last = str(values.argmin())
        page.wait_for_function(
            "(n) => [...document.querySelectorAll('#table tbody tr:not(.space)')].at(-1)"
            "?.firstChild.textContent === n",
            arg=last,
        )
        assert page.locator("#table tbody tr").count() < 60
        milliseconds = page.evaluate(
            """async () => {
                 const frame = () => new Promise(requestAnimationFrame), all = [];
                 for (let k = 0; k < 8; k++) {
                   const start = performance.now();
                   headReport.pin(k % 4, k);
                   await frame(); await frame();
                   all.push(performance.now() - start);
                 }
                 return all.sort((a, b) => a - b)[4];
               }"""
        )
        assert milliseconds < 1500


def test_many_measures(browser, tmp_path):
    """Six: the first four are open, the rest is drawn when it is asked for."""
    run = made_run(words={f"measure_{i}": (f"m_{i}", "unit") for i in range(6)})
    with opened(browser, write_page(tmp_path, run)) as seen:
        page = seen.page
        drawn = "document.querySelectorAll('[data-layers] .main-svg:first-child').length"
        assert page.evaluate(drawn) == 4
        page.locator("#layers details.more summary").click()
        page.wait_for_function(f"{drawn} === 6")
        page.mouse.click(*seen.at(2, 1, measure=5))
        seen.head_is(2, 1)
        assert seen.text("#head-numbers tr.active td:first-child") == "m5"
        assert page.locator("#head-numbers tr.active").bounding_box() is not None


def test_scores_of_studies(browser, tmp_path):
    """With the head that has them; a head that no study looked at shows none."""
    run = made_run()
    meta = {key: run.attrs[key] for key in ("model", "dataset")}
    folder = tmp_path / "ablation_1"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "summary.md").write_text("found")
    pd.DataFrame(
        {"method": ["zero"], "layer": [2], "head": [4], "accuracy_drop": [0.25], "loss_delta": [-3]}
    ).to_parquet(folder / "ablation.parquet")
    mine = tmp_path / "run_1"
    mine.mkdir()
    with opened(browser, write_page(mine, run)) as seen:
        seen.page.mouse.click(*seen.at(2, 4))
        seen.head_is(2, 4)
        assert "zero: accuracy lost (share)\t0.250" in seen.text("#head-scores")
        assert "zero: loss added (nats)\t−3.00" in seen.text("#head-scores")
        seen.page.mouse.click(*seen.at(2, 3))
        seen.head_is(2, 3)
        assert seen.text("#head-scores") == ""
        link = seen.page.locator("#related a", has_text="summary.md")
        assert link.evaluate("(a) => a.href") == (folder / "summary.md").as_uri()


def test_a_caption_follows_the_mode(browser, made):
    with opened(browser, made[1]) as seen:
        for choice, said in (("rank", "rank of the mean"), ("share", "÷ the layer's mean head"),
                             ("mean", "mean over questions, activation units (L2)")):  # fmt: skip
            seen.page.locator("#shade").select_option(choice)
            assert said in seen.text('[data-mode="0"]')


def test_right_is_blue_and_wrong_is_orange_everywhere(browser, made):
    """In the bars of one head and in the map of differences, whose scale is not below its bound."""
    with opened(browser, made[1]) as seen:
        bars, scale, limit, bound = seen.page.evaluate(
            """(() => {
                 const map = document.querySelector("[data-difference]");
                 const bars = document.getElementById("spread").data.map((t) => t.marker.color);
                 const { colorscale, zmax } = map.data[0];
                 return [bars, [colorscale.at(-1)[1], colorscale[0][1]], zmax,
                         headReport.data.measures[0].difference.threshold];
               })()"""
        )
        assert bars == scale
        assert limit >= bound


def test_a_head_by_its_name_and_by_the_address(browser, made):
    with opened(browser, made[1]) as seen:
        page = seen.page
        page.keyboard.press("/")
        page.keyboard.type("2.3")
        page.keyboard.press("Enter")
        seen.head_is(2, 3)
        assert page.url.endswith("#h=2.3&m=head_output_norm")
        page.locator("#go").fill("7.1")
        page.keyboard.press("Enter")
        assert page.evaluate("document.getElementById('go').validationMessage") == (
            "expected layer.head up to 2.4"
        )
        page.evaluate("location.hash = '#h=1.4&m=head_resid_contrib_norm'")
        seen.head_is(1, 4)
        assert page.locator("#head-numbers tr.active td").first.get_attribute("title") == (
            "head_resid_contrib_norm"
        )
        page.locator("#state button").click()
        assert "#" not in page.url


def test_what_can_be_taken_along(browser, made):
    run, path = made
    with opened(browser, path) as seen:
        with seen.page.expect_download() as done:
            seen.page.locator("#csv").click()
        rows = pd.read_csv(done.value.path())
        assert len(rows) == 15
        np.testing.assert_allclose(
            rows["head_output_norm_mean"], run["head_output_norm_mean"].values.ravel(), rtol=1e-6
        )
        assert sorted(rows["head_resid_contrib_norm_rank"]) == list(range(1, 16))
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<svg")):
            with seen.page.expect_download() as done:
                seen.page.locator(f'[data-picture="{kind}"]').click()
            assert Path(done.value.path()).read_bytes().startswith(start)


def test_a_head_that_hardly_varies_says_so(browser, tmp_path):
    run = made_run()
    run["head_output_norm_std"][0, 0] = 0.01 * run["head_output_norm_mean"][0, 0]
    with opened(browser, write_page(tmp_path, run)) as seen:
        seen.page.evaluate("headReport.pin(0, 0)")
        seen.page.wait_for_function(
            "document.getElementById('head-spread').textContent.startsWith('near-constant')"
        )
        assert seen.text("#head-spread") == "near-constant: std is 1.0 % of the mean"
        seen.page.evaluate("headReport.pin(1, 1)")
        seen.page.wait_for_function(
            "document.getElementById('head-spread').textContent.startsWith('std is')"
        )


def test_on_a_phone(browser, made):
    """Nothing is wider than the screen, the contents are one row, a pinned head is a sheet."""
    with opened(browser, made[1]) as seen:
        page = seen.page
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_function("document.documentElement.scrollWidth <= 390")
        bar = page.locator("nav").bounding_box()
        assert bar["height"] < 60
        page.evaluate("document.getElementById('layers').scrollIntoView()")
        page.wait_for_timeout(800)
        heading = page.locator("#layers h2").bounding_box()
        assert heading["y"] > page.locator("nav").bounding_box()["height"] - 1
        page.evaluate("headReport.pin(1, 2)")
        sheet = page.locator("#inspector").bounding_box()
        assert sheet["y"] + sheet["height"] == pytest.approx(844, abs=1)
        assert sheet["height"] < 0.5 * 844


ODD = {
    "one head": {"n_layers": 1, "n_heads": 1, "n": 1},
    "a hundred layers": {"n_layers": 100, "n_heads": 3, "n": 9},
    "no values per sample": {"per_sample": False},
    "not scored": {"right": False},
    "all wrong": {"right": np.zeros(40, bool)},
    "a missing layer": {"missing": (1,), "missing_layers": [1]},
    "nothing at all": {"missing": (0, 1, 2), "missing_layers": [0, 1, 2]},
    "negative values": {"words": {"x": ("x", "")}},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_runs(browser, tmp_path, kind):
    run = made_run(**ODD[kind])
    if kind == "negative values":
        run["x_mean"] -= 1
        run["x"] -= 1
    with opened(browser, write_page(tmp_path, run)) as seen:
        seen.page.mouse.click(*seen.at(run.sizes["layer"] - 1, 0))
        seen.head_is(run.sizes["layer"] - 1, 0)
        there = seen.page.locator("#samples-body").count()
        assert there == (0 if kind == "no values per sample" else 1)
        if kind == "a missing layer":
            seen.page.mouse.click(*seen.at(1, 2))
            seen.head_is(1, 2)
            assert "no data" in seen.text("#head-numbers")
            assert seen.column(6)[0] in ("right", "wrong")
            assert seen.column(7)[0] == "–"
            assert "grey: no data" in seen.text("#map-0")
        for choice in ("rank", "share", "mean"):
            seen.page.locator("#shade").select_option(choice)
        seen.page.locator("#theme").click()
