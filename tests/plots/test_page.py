"""The shell of all pages: colours that can be read, titles as text, one library."""

import base64
import re
import zlib

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tl_headnorm.plots.heatmaps import heatmap
from tl_headnorm.plots.page import packed, page
from tl_headnorm.plots.templates import asset, cell, interval, markdown, number, percent, signed

HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }} $x$"
PAIR = re.compile(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)")
TEXT = ("ink", "soft", "accent", "warn", "right", "wrong", "less", "more")


def luminance(colour):
    """WCAG 2.1."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#fcfbf8", "#d97b29") < 3, "an orange that this page once had"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", TEXT)
def test_text_can_be_read(name, theme):
    colours = {
        found[0]: found[1 + (theme == "dark")] for found in PAIR.findall(asset("plots/style.css"))
    }
    for ground in ("paper", "card"):
        assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground, theme)


def figure():
    return heatmap(xr.DataArray(np.eye(3), dims=("layer", "head")))


def test_a_page_of_figures():
    made = page(HOSTILE, {HOSTILE: figure(), "second": figure()}, HOSTILE)
    assert "<script>alert" not in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}") == 4
    assert made.count('class="figure"') == 2
    library = re.search(r'id="plotly">([^<]*)<', made)[1]
    assert zlib.decompress(base64.b64decode(library)).startswith(b"/**\n* plotly.js v")
    assert len(made) < 2.2e6
    assert not re.search(r"(src|href)=[\"']?http", made)


def test_packed_data_comes_back():
    data = bytes(range(256)) * 9
    assert zlib.decompress(base64.b64decode(packed(data))) == data


def test_numbers_in_words():
    assert number(-0.5, 3, "+") == "−0.500"
    assert (signed(0.25), signed(float("nan"))) == ("+0.25", "–")
    assert (percent(0.123), interval(0.1, 0.25)) == ("12.3%", "0.100 to 0.250")
    assert [cell(v) for v in (None, float("nan"), np.float32(1 / 3), "a\nb", 3)] == [
        "–", "–", "0.3333", "a b", "3"
    ]  # fmt: skip


def test_a_table_stays_a_table():
    rows = markdown(pd.DataFrame({"name": ["a|b", "c"], "value": [1.0, float("nan")]}))
    assert [line.split() for line in rows.splitlines()[2:]] == [
        ["|", "a\\|b", "|", "1", "|"], ["|", "c", "|", "–", "|"]
    ]  # fmt: skip
