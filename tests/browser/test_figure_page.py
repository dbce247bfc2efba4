"""A page of figures in a browser: drawn by the library inside, in the page's colours and width."""

import numpy as np
import pytest
import xarray as xr
from chromium import opened

from tl_headnorm.plots.heatmaps import heatmap
from tl_headnorm.plots.page import write_page

DRAWN = "document.documentElement.dataset.drawn"
INK = "getComputedStyle(document.querySelector('.xtick text')).fill"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    values = np.arange(24.0).reshape(4, 6)
    values[1] = np.nan
    figure = heatmap(xr.DataArray(values, dims=("layer", "head"), name="x"))
    path = tmp_path_factory.mktemp("page") / "figures.html"
    write_page(path, "<b>Title</b>", {"first": figure, "<i>second</i>": figure})
    return path


def test_every_figure_is_drawn_and_holds_its_numbers(browser, path):
    with opened(browser, path, wait=DRAWN) as seen:
        assert seen.page.locator(".figure .main-svg").count() >= 2
        assert seen.text("h1") == "<b>Title</b>"
        assert seen.page.locator("h2").all_inner_texts() == ["first", "<i>second</i>"]
        z = seen.page.evaluate(
            "[...document.querySelector('.figure').calcdata[0][0].z].map((r) => [...r])"
        )
        assert z[2] == [12, 13, 14, 15, 16, 17]
        assert all(value is None or value != value for value in z[1])


def test_figures_follow_the_theme(browser, path):
    with opened(browser, path, wait=DRAWN, color_scheme="dark") as seen:
        dark = seen.page.evaluate(INK)
        seen.page.locator("#theme").click()
        seen.page.wait_for_function(f"{INK} !== '{dark}'")
        assert seen.text("#theme") == "Dark"


def test_a_figure_page_fits_a_phone(browser, path):
    with opened(browser, path, wait=DRAWN) as seen:
        seen.page.set_viewport_size({"width": 390, "height": 844})
        seen.page.wait_for_function("document.documentElement.scrollWidth <= 390")


def test_the_first_stop_of_the_keyboard_skips_to_the_content(browser, path):
    with opened(browser, path, wait=DRAWN) as seen:
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.className") == "skip"
        assert seen.page.locator(".skip").bounding_box()["x"] >= 0
