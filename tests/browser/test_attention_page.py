"""The page of `attention` in a browser: keys, clicks, hovering, light and dark, no network."""

import pytest
from chromium import opened

from tl_headnorm.commands.attention.generation import write
from tl_headnorm.commands.attention.keywords import find_keyword
from tl_headnorm.commands.attention.page import page as html
from tl_headnorm.commands.attention.page import page_data
from tl_headnorm.commands.attention.patterns import Wanted, look
from tl_headnorm.data.spans import encode_text
from tl_headnorm.model.loading import load_model

TEXT = 'The dog ran.<script>window.hit = 1</script> A "🙂" sat & the dog'
KEEP_MB = 0.06  # of 24 heads


@pytest.fixture(scope="module")
def found(shared_data):
    model = load_model(shared_data / "stories260K", dtype="fp32", device_map="cpu")
    tokens = encode_text(model.tokenizer, TEXT)
    words = [find_keyword(model, tokens, "dog")]
    seen = look(model, tokens, Wanted((0, 2, 4), keep_mb=KEEP_MB), words, [len(tokens) - 1])
    assert 0 < len(seen.kept) < 24
    return seen, write(model, tokens, ((0, 1), (4, 2)), max_new_tokens=4)


@pytest.fixture(scope="module")
def page(browser, found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "attention.html"
    data = page_data(*found)
    path.write_text(html(data, title=TEXT, about=TEXT, keywords=TEXT, written=TEXT), "utf-8")
    drawn = "document.querySelectorAll('#scores canvas').length > 3"
    with opened(browser, path, wait=drawn, color_scheme="light") as seen:
        yield seen.page


def shown(page):
    return page.locator("#what").inner_text()


def test_keys_and_clicks_choose_a_head(page, found):
    run = found[0].run
    layer, head = divmod(int(run["focus"][:, :, 0, 0].values.argmax()), 8)
    assert shown(page).startswith(f"head {(0, 2, 4)[layer]}.{head}")  # the most attentive one
    page.locator("#grid").focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    for _ in range(4):
        page.keyboard.press("ArrowUp")
    assert shown(page).startswith("head 0.0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert shown(page).startswith("head 2.1")
    first = page.locator("#facts td").nth(1).inner_text()
    assert float(first) == pytest.approx(float(run["first_token"].sel(layer=2, head=1)), abs=6e-5)
    row = page.locator("#ranked tr[data-head]").nth(1)
    row.click()
    assert shown(page).startswith("head " + row.locator("td").first.inner_text())


def test_hovering_tells_both_tokens_and_the_weight(page, found):
    (layer, head), pattern = next(iter(found[0].kept.items()))
    page.evaluate(f"choose({layer}, {head})")
    canvas = page.locator("#large")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    n = len(found[0].labels)
    cell = (box["width"] - 96 - 6) / n
    page.mouse.move(box["x"] + 96 + 2.5 * cell, box["y"] + 8 + 5.5 * cell)
    text = page.locator("#tip").inner_text()
    assert text.startswith(f"query 5 “{found[0].labels[5].replace(' ', '·')}”")
    assert f"key 2 “{found[0].labels[2].replace(' ', '·')}”" in text
    assert f"weight {float(pattern[5, 2]):.4f} (uniform 0.1667)" in text
    page.mouse.move(box["x"] + 96 + 9.5 * cell, box["y"] + 8 + 5.5 * cell)
    assert "later than the query" in page.locator("#tip").inner_text()


def test_what_was_left_out_says_so(page, found):
    left = [(i, h) for i in (0, 2, 4) for h in range(8) if (i, h) not in found[0].kept]
    page.evaluate(f"choose({left[0][0]}, {left[0][1]})")
    assert f"thumbnail of {found[0].thumbnails.shape[-1]} ×" in shown(page)
    assert f"--heads {left[0][0]}.{left[0][1]}" in shown(page)
    # The last token's weights are kept of every head; those of another query are not.
    page.evaluate(f"state.query = n - 1; choose({left[0][0]}, {left[0][1]})")
    row = found[0].last_rows[(0, 2, 4).index(left[0][0]), left[0][1]]
    assert (
        f"(most: {float(row.max()):.4f}, to {int(row.argmax())} "
        in page.locator("#asked").inner_text()
    )
    page.locator("#text span").nth(3).click()
    assert "were not kept for this head" in page.locator("#asked").inner_text()


def test_means_tokens_and_writing(page, found):
    page.locator("#view").select_option("all")
    assert shown(page) == "mean over all heads"
    page.locator("#text span").nth(3).click()
    assert "What 3 " in page.locator("#asked").inner_text()
    mean = found[0].means["all heads"][3, :4].max()
    assert f"(most: {float(mean):.4f}, to" in page.locator("#asked").inner_text()
    page.locator("#watched").select_option("1")
    box = page.locator("#writing")
    box.scroll_into_view_if_needed()
    at = box.bounding_box()
    page.mouse.move(at["x"] + 99, at["y"] + 4)
    label = found[1].labels[found[1].n_prompt].replace(" ", "·")
    text = page.locator("#tip").inner_text()
    assert text.startswith(f"writing {found[1].n_prompt} “{label}”")
    assert f"weight {float(found[1].weights[1, 0, 0]):.4f}" in text


def test_text_stays_text(page):
    assert page.evaluate("window.hit") is None
    assert page.locator("h1").inner_text() == TEXT
    assert TEXT.split("🙂")[0] in page.locator("#text").inner_text()


def test_light_and_dark(page):
    def ground_becomes(colour):
        page.wait_for_function(
            "colour => getComputedStyle(document.body).backgroundColor === colour", arg=colour
        )

    ground_becomes("rgb(252, 251, 248)")
    page.emulate_media(color_scheme="dark")
    ground_becomes("rgb(23, 24, 27)")
    page.locator("#theme").click()
    ground_becomes("rgb(252, 251, 248)")
