"""Panels: every kind in both drawings; texts that neither touch nor leave the picture."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tl_headnorm.plots import plotly, png
from tl_headnorm.plots.panel import (
    Figure,
    Heatmap,
    Panel,
    Series,
    group_size,
    layers_by_heads,
    side_by_side,
    tick_step,
)  # fmt: skip
from tl_headnorm.plots.text import drawable, wrapped

LONG = "SmolLM2-135M-Instruct-with-a-name-that-goes-on · arc_challenge test · n=1,168 · last token"
SHAPES = [(4, 8), (30, 9), (16, 32), (32, 32)]


def grid(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def curve(values, **more):
    return Series("a line", np.arange(len(values)), np.asarray(values, float), **more)


FIGURES = {
    "one_map": Figure(LONG, [layers_by_heads(grid((30, 9)), signed=True, groups=3)], 1, LONG),
    **{
        f"maps_{layers}_{heads}": Figure(LONG, [
            layers_by_heads(grid((layers, heads), seed) * 1e-5, LONG, signed=True, part=0.7,
                            label="loss added (nats)") for seed in range(5)
        ], subtitle=LONG)
        for layers, heads in SHAPES
    },
    "narrow_log": Figure("t", [Panel("", "layer", "|x|", series=[curve([3.1, 3.3, 3.9])], log="y"),
                               Panel("", "layer", "|x|", series=[curve([2, 9, 31])], log="y")], 2),
    "wide_log": Figure("t", [Panel("", "x", "|x|", series=[curve([1e-9, 3.0, 1e9])], log="y")], 1),
    "both_log": Figure("t", [Panel(LONG, "A", "B", series=[
        Series("heads", [4.6, 5, 30], [4.8, 9, 31], kind="points")], log="xy")], 1),
    "bars": Figure(LONG, [Panel("", "accuracy lost (points)", series=[
        Series(name, [3.0, -2.0], side_by_side(["a", "b"], ["a", "b"], i, 2), kind="bars",
               low=[2, -3], high=[4, -1], width=0.38, labels=["3", "-2"])
        for i, name in enumerate(("zero", "mean"))
    ], horizontal=True, y_ticks={0: "all heads", 1: "per input: below 0.8"})], 1, LONG),
    "names": Figure("t", [Panel(heatmap=Heatmap(np.eye(9), "r", signed=True, text=True),
                                y_ticks={i: f"method {i}" for i in range(9)}, size=(4, 3))], 1),
    "band": Figure("t", [Panel("", "layer", "%", series=[
        Series("noise", np.arange(4), kind="band", low=-np.ones(4), high=np.ones(4)),
        curve([1, 2, 3, 4], marker="s", hollow=True),
        curve([4, 3, 2, 1], dash="dot", hidden=True)])], 1),
    "tokens": Figure("t", [Panel("", "key", "query", Heatmap(np.tri(40), limits=(0, 1), root=True),
                                 x_ticks={i: f"·word{i}" for i in range(40)}, size=(6, 3))], 1),
    "spans": Figure(LONG, [
        *(Panel(f"mode {i}", "off (%)", "accuracy", series=[curve([1, 2])]) for i in range(3)),
        Panel(LONG, "area", series=[curve([1, 2], kind="points")], horizontal=True, span=3,
              y_ticks={0: "head_output_norm", 1: "attention_first"})], 3, LONG),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """The picture of each figure, laid out."""

    def draw(name):
        picture = png.draw(FIGURES[name])
        picture.draw_without_rendering()
        return picture

    return draw


def boxes(picture):
    """(text, its box) of all that is written straight or upright."""
    texts = [*picture.texts, *(t for legend in picture.legends for t in legend.get_texts())]
    for axes in picture.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            for tick in ticks:
                if low <= tick.get_loc() <= high:
                    texts += [t for t in (tick.label1, tick.label2) if t.get_visible()]
            texts.append(axis.get_offset_text())
    return [
        (t.get_text(), t.get_window_extent())
        for t in texts if t.get_text().strip() and t.get_rotation() in (0, 90)
    ]  # fmt: skip


def clashes(picture):
    """Pairs of texts that overlap by more than a pixel, and texts that are cut off."""
    found = boxes(picture)
    pairs = [
        (a, b) for (a, one), (b, other) in itertools.combinations(found, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]  # fmt: skip
    whole = picture.bbox
    return pairs, [t for t, b in found if b.x0 < -1 or b.x1 > whole.x1 + 1 or b.y1 > whole.y1 + 1]


@pytest.mark.parametrize("name", FIGURES)
def test_texts_neither_touch_nor_leave_the_picture(drawn, name):
    assert clashes(drawn(name)) == ([], [])


def test_the_check_can_fail():
    picture = png.draw(FIGURES["one_map"])
    picture.text(0.05, 0.985, "a title over the title")
    picture.text(0.9, 0.5, LONG)
    picture.draw_without_rendering()
    pairs, cut = clashes(picture)
    assert any("a title over the title" in pair for pair in pairs)
    assert cut == [LONG]


@pytest.mark.parametrize("name", FIGURES)
def test_both_drawings_show_every_panel(drawn, name):
    figure, page = FIGURES[name], plotly.draw(FIGURES[name])
    kinds = [trace.type for trace in page.data]
    assert kinds.count("heatmap") == sum(p.heatmap is not None for p in figure.panels)
    assert len(kinds) == sum(len(p.series) + (p.heatmap is not None) for p in figure.panels)
    axes = [a for a in drawn(name).axes if a.get_label() != "<colorbar>"]
    assert len(axes) == len(figure.panels)
    for one, panel in zip(axes, figure.panels, strict=True):
        assert one.get_xlabel() == panel.axis("x").label
        assert "".join(one.get_title(loc="left").split()) == "".join(panel.title.split())


def test_three_dimensions():
    peaks = np.zeros((6, 20))
    peaks[2, 5] = 900
    names = {i: f"token {i}" for i in range(6)}
    maps = Heatmap(peaks, limits=(0, 900)), Heatmap(peaks / 9)
    figure = Figure("t", [Panel("t", "dimension", "token", m, raised=True, y_ticks=names)
                          for m in maps])  # fmt: skip
    assert png.png(figure)[:4] == b"\x89PNG"
    page = plotly.draw(figure)
    assert [trace.type for trace in page.data] == ["surface", "surface"]
    assert page.layout.scene.zaxis.range == (0, 900)
    assert page.data[0].customdata[2][0] == "token 2"


def test_values_are_written_into_few_cells_only():
    def texts(n):
        figure = Figure("", [Panel(heatmap=Heatmap(np.eye(n), text=True, bar=False))], 1)
        page = plotly.draw(figure)
        return len(png.draw(figure).axes[0].texts), len(page.layout.annotations)

    assert texts(14) == (196, 196)
    assert texts(15) == (0, 0)


def test_signed_values_are_centred_at_a_marked_zero():
    z = np.array([[-1.0, 0.5], [np.nan, 0.0]])
    figure = Figure("", [layers_by_heads(z, signed=True)], 1)
    (trace,) = plotly.draw(figure).data
    assert (trace.zmin, trace.zmax) == (-1, 1)
    axes, bar = png.draw(figure).axes
    assert axes.images[0].get_clim() == (-1, 1)
    assert any(list(line.get_ydata()) == [0, 0] for line in bar.lines)
    assert axes.get_xlabel() == "head (grey: no data)"


def test_key_value_groups_are_parted():
    assert [group_size(*pair) for pair in ((3, 9), (8, 32), (9, 9), (None, 9))] == [
        3, 4, None, None,
    ]  # fmt: skip
    figure = Figure("", [layers_by_heads(grid((30, 9)), groups=3)], 1)
    assert sorted({s.x0 for s in plotly.draw(figure).layout.shapes}) == [2.5, 5.5]
    lines = png.draw(figure).axes[0].lines
    assert sorted({line.get_xdata()[0] for line in lines}) == [2.5, 5.5]


def test_ticks_are_whole_heads_and_layers():
    for shape in SHAPES:
        axes = png.draw(Figure("", [layers_by_heads(grid(shape))], 1)).axes[0]
        for ticks, n in ((axes.get_xticks(), shape[1]), (axes.get_yticks(), shape[0])):
            assert len(ticks) <= 20
            assert set(ticks) <= set(range(n))
    assert [tick_step(n) for n in (1, 20, 21, 40, 64, 128, 300)] == [1, 1, 2, 2, 4, 8, 20]


def test_layers_keep_their_numbers():
    panel = layers_by_heads(grid((2, 3)), layers=[4, 7])
    assert panel.y_ticks == {0: "4", 1: "7"}
    assert panel.heatmap.hover[1, 2].startswith("layer 7, head 2\n")
    assert layers_by_heads(grid((2, 3)), layers=[0, 1]).y_ticks is None


def test_text_of_any_script():
    """Warnings are errors here: a glyph that is missing would be one."""
    odd = "\ue000 🙂 气候 $\\frac{$"
    assert "U+E000" in drawable(odd)
    panel = Panel(odd, odd, odd, series=[Series(odd, [0, 1], [0, 1], labels=[odd, odd])],
                  x_ticks={0: odd, 1: odd})  # fmt: skip
    assert png.png(Figure(odd, [panel], 1, odd))[:4] == b"\x89PNG"
    assert max(map(len, wrapped("气" * 80, 400, 10))) < max(map(len, wrapped("a" * 80, 400, 10)))


def test_threads_draw_the_same_picture():
    figures = [FIGURES[name] for name in ("one_map", "bars", "band", "names")] * 2
    alone = [png.png(figure) for figure in figures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(png.png, figures)) == alone


def test_no_display_and_no_shared_state():
    script = """
import sys, numpy as np
from tl_headnorm.plots.panel import Figure, layers_by_heads
from tl_headnorm.plots.png import png
assert png(Figure("t", [layers_by_heads(np.eye(3))], 1))[:4] == bytes([0x89]) + b"PNG"
print([name for name in ("torch", "matplotlib.pyplot") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
