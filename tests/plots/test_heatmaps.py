"""Figures: what a heatmap says, that its PNG is one, that its page needs no network."""

import re
import struct
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from tl_headnorm.plots.heatmaps import heatmap, heatmap_png, save_heatmap
from tl_headnorm.plots.panel import tick_step

LAYERS, HEADS = 3, 5


def array(values=None, std=True, **attrs):
    """Values 0..14 over their layers and heads, as a run's mean would be."""
    values = np.arange(15.0).reshape(LAYERS, HEADS) if values is None else values
    attrs = {"statistic": "mean", "formula": "‖z_h‖", "units": "activation units (L2)", **attrs}
    if std:
        attrs["std"] = values / 10
    return xr.DataArray(values, dims=("layer", "head"), name="head_output_norm_mean", attrs=attrs)


def with_hole():
    values = np.arange(15.0).reshape(LAYERS, HEADS)
    values[1, 2] = np.nan
    return array(values)


def test_heatmap_is_layers_by_heads():
    figure = heatmap(array())
    assert isinstance(figure, go.Figure)
    (trace,) = figure.data
    assert np.array_equal(np.array(trace.z, float), array().values)
    assert (list(trace.x), list(trace.y)) == (list(range(HEADS)), list(range(LAYERS)))
    assert figure.layout.yaxis.range == (LAYERS - 0.5, -0.5), "layer 0 stands on top"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("head", "layer")


def test_hover_text():
    (trace,) = heatmap(array()).data
    assert trace.hoverinfo == "text"
    assert trace.text[2][4] == "layer 2, head 4<br>mean 14<br>std 1.4<br>rank 1 of 15"
    assert trace.text[0][0] == "layer 0, head 0<br>mean 0<br>std 0<br>rank 15 of 15"
    (plain,) = heatmap(array(std=False)).data
    assert plain.text[2][4] == "layer 2, head 4<br>mean 14<br>rank 1 of 15"


def test_ranks_of_ties_are_all_different():
    (trace,) = heatmap(array(np.ones((LAYERS, HEADS)))).data
    ranks = {text.split("rank ")[1] for row in trace.text for text in row}
    assert ranks == {f"{i} of 15" for i in range(1, 16)}


def test_title_and_colour_bar():
    figure = heatmap(array(title="llama · arc_challenge test · n=1,168 · last token"))
    title = figure.layout.title.text
    for piece in ("mean ‖z_h‖", "of every head", "llama", "arc_challenge test", "n=1,168", "last"):
        assert piece in title
    bar = figure.data[0].colorbar.title.text
    assert bar == "mean ‖z_h‖<br>activation units (L2)"
    assert heatmap(array(), title="Mine").layout.title.text == "Mine"


def test_a_mean_over_tokens_is_said_once():
    title = heatmap(array(formula="mean ‖z_h W_O‖")).layout.title.text
    assert title == "mean ‖z_h W_O‖ of every head"


def test_values_of_both_signs_are_centred_at_zero():
    (trace,) = heatmap(array(np.arange(15.0).reshape(LAYERS, HEADS) - 4)).data
    assert (trace.zmin, trace.zmax) == (-10, 10)
    (trace,) = heatmap(array()).data
    assert (trace.zmin, trace.zmax) == (0, 14)


def test_a_bare_array_will_do():
    bare = xr.DataArray(np.eye(2), dims=("layer", "head"))
    assert heatmap(bare).layout.title.text == "value of every head"
    assert heatmap_png(bare)[:4] == b"\x89PNG"


def test_a_run_s_own_array(finished):
    import tl_headnorm

    run = tl_headnorm.load_run(finished)
    title = heatmap(run["head_resid_contrib_norm_mean"]).layout.title.text
    for piece in ("mean ‖z_h W_O‖", "llama", "arc_challenge test", "n=7", "last token"):
        assert piece in title
    figure = heatmap(run["head_output_norm_mean"])
    (trace,) = figure.data
    assert {s.x0 for s in figure.layout.shapes} == {i - 0.5 for i in range(3, 6, 3)}
    std = float(run["head_output_norm_std"][1, 2])
    assert f"<br>std {std:.4g}<br>" in trace.text[1][2]


def test_cells_without_data():
    figure = heatmap(with_hole())
    (trace,) = figure.data
    assert trace.text[1][2] == "layer 1, head 2<br>no data"
    assert trace.hoverongaps
    assert trace.text[2][4].endswith("rank 1 of 14")
    assert figure.layout.xaxis.title.text == "head (grey: no data)"
    assert [shape.fillcolor for shape in figure.layout.shapes] == ["#d0d0d0"]
    assert not heatmap(array()).layout.shapes
    (empty,) = heatmap(array(np.full((LAYERS, HEADS), np.nan))).data
    assert {text.split("<br>")[1] for row in empty.text for text in row} == {"no data"}


def test_one_sample_has_no_spread():
    made = array()
    made.attrs["std"] = np.full((LAYERS, HEADS), np.nan)
    assert "std: one sample" in heatmap(made).data[0].text[0][0]


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 32), (80, 64)])
def test_png_is_a_picture_of_sensible_size(shape):
    values = np.random.default_rng(0).random(shape)
    width, height = png_size(heatmap_png(array(values, title="a · b")))
    assert 600 <= width <= 4000
    assert 500 <= height <= 4000


@pytest.mark.parametrize("made", [with_hole(), array(np.full((LAYERS, HEADS), np.nan))])
def test_png_of_holes(made):
    """Grey where there is no data; the picture with data has none of that grey."""
    from io import BytesIO

    from matplotlib.image import imread

    def grey(data):
        pixels = (imread(BytesIO(data))[..., :3] * 255).round().astype(int)
        return int((pixels == (0xD0, 0xD0, 0xD0)).all(axis=-1).sum())

    assert grey(heatmap_png(made)) > 1000
    assert grey(heatmap_png(array())) < 100


def test_ticks_stay_few():
    assert [tick_step(n) for n in (1, 20, 21, 40, 64, 128)] == [1, 1, 2, 2, 4, 8]


def test_html_needs_no_network(tmp_path):
    save_heatmap(array(), tmp_path / "figure")
    page = (tmp_path / "figure.html").read_text()
    assert len(page) > 1_000_000, "plotly's own source is inside"
    assert "Plotly.newPlot" in page
    assert linked(page) == []
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.html", "figure.png"]


def linked(page):
    """Everything a page would fetch."""
    found = re.findall(r"<script[^>]+src=[\"']?([^\"'>\s]+)", page)
    found += re.findall(r"<link[^>]+href=[\"']?([^\"'>\s]+)", page)
    return [target for target in found if not target.startswith("data:")]


def test_the_guard_can_fail():
    assert linked(heatmap(array()).to_html(include_plotlyjs="cdn")) != []


def test_figures_need_no_torch():
    script = """
import sys, numpy as np, xarray as xr
from tl_headnorm.plots.heatmaps import heatmap, heatmap_png
array = xr.DataArray(np.eye(3), dims=("layer", "head"))
assert heatmap(array).to_html(include_plotlyjs=True)
assert heatmap_png(array)[:4] == bytes([0x89]) + b"PNG"
print("torch" in sys.modules, "kaleido" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
