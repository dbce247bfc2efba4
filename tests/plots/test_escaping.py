"""Names and samples' text in pages and figures show as text, whatever they spell."""

import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from conftest import question_record, write_jsonl

from tl_headnorm.plots import page as pages
from tl_headnorm.plots import plotly
from tl_headnorm.plots.heatmaps import heatmap, heatmap_png
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series
from tl_headnorm.plots.png import png
from tl_headnorm.plots.text import on_page

# A directory's name holds no slash; mathematics that matplotlib cannot set, and an unclosed tag.
NAME = "<img src=x onerror=alert(1)> <b>$\\frac{$ {{7*7}} %{x}"
TEXT = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & <!-- "
ANSWER = "<svg onload=alert(3)>"


class Live(HTMLParser):
    """What a browser would run: the tags' handlers, and the scripts' text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.handlers, self.tags, self.scripts, self.inside = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag if tag in ("script", "style") else None
        self.handlers += [f"{tag} {k}" for k, v in attrs if "alert" in f"{k}{v}"]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def live(page):
    """The faults of a page: handlers of ours, scripts of ours."""
    found = Live()
    found.feed(page)
    found.close()
    scripts = [s for s in found.scripts if s.strip().startswith("alert(")]
    return [*found.handlers, *scripts], found.tags


def test_the_check_can_fail():
    assert live(f"<p>{TEXT}</p>")[0] == ["img onerror", "alert(1)"]
    assert live(f"<script>x = '{TEXT}'</script>")[0] == ["img onerror", "alert(1)"]
    assert live(f"<p>{NAME}{ANSWER}</p>")[0] == ["img onerror", "svg onload"]
    assert live(f"<p>{on_page(TEXT)}</p>")[0] == []


@pytest.fixture(scope="module")
def hostile_flags(llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    records = [{**question_record(i), "id": f"{i}{TEXT}", "topic": f"{i % 2}{TEXT}"}
               for i in range(6)]  # fmt: skip
    for record in records:
        record["question"]["stem"] += TEXT
        for i, choice in enumerate(record["question"]["choices"]):
            choice["text"] = f"{i} {ANSWER}"
    model = shutil.copytree(llama_dir, folder / NAME)
    data = write_jsonl(folder / "<img src=x onerror=alert(5)>.jsonl", records)
    return ["--model_path", model, "--data_dir", data, "--dtype", "fp32", "--device_map", "cpu",
            "--max_length", 512, "--output_dir", folder / "<img onerror=alert(6)>"]  # fmt: skip


COMMANDS = {
    "collect": ["collect"],
    "ablate": ["ablate", "--heads", "0.1,1.2", "--reference_samples", 2],
    "massive": ["massive", "--dataset", "arc_challenge", "--prune", 2, "--max_texts", 3],
    "attribute": ["attribute", "--methods", "[grad_x_act]", "--group_by", "topic", "--stability",
                  "--validate"],
    "attention": ["attention", "--question", 1, "--keyword", "plants", "--heads", "0.1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(run_cli, hostile_flags):
    """The run directory of each command, made once."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = run_cli(*COMMANDS[name], *hostile_flags).run_dir
        return known[name]

    return run


def check_pages(folder):
    found = list(folder.rglob("*.html"))
    assert found
    for page in found:
        text = page.read_text(encoding="utf-8")
        faults, tags = live(text)
        assert faults == [], page.name
        assert not {"img", "svg"} & {t for t in tags if f"<{t} src=x" in text}, page.name
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_no_page_is_live(name, made):
    pages = check_pages(made(name))
    assert any("onerror=alert" in page.read_text(encoding="utf-8") for page in pages), (
        "the names are in the pages, so that the test is of something"
    )


def test_comparing_and_merging(made, run_cli, hostile_flags):
    run = made("collect")
    output = hostile_flags[-2:]
    check_pages(run_cli("compare", run, run, "--names", f"['{NAME}', b]", *output).run_dir)
    parts = [run_cli("collect", *hostile_flags, "--shard", f"{k}/2").run_dir for k in (1, 2)]
    check_pages(run_cli("merge", *parts, *output).run_dir)
    check_pages(run_cli("report", run).run_dir)


def array(title):
    values = xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("layer", "head"), name="x")
    values.attrs["title"] = title
    return values


@pytest.mark.parametrize("title", [NAME, TEXT, "$x$", "$\\nope$", "a_$b"])
def test_a_title_is_shown_as_it_is(title):
    shown = heatmap(array(title)).layout.title.text
    assert on_page(title).strip() in shown.replace("<br>", " ")
    assert "<img" not in shown
    assert heatmap_png(array(title)).startswith(b"\x89PNG")


def test_panels_and_their_series():
    series = Series(NAME, [1, 2], [1, 2], labels=[NAME, TEXT], hover=[NAME, TEXT])
    words = {0: NAME, 1: TEXT}
    hover = np.full((2, 2), TEXT, object)
    panels = [
        Panel(TEXT, NAME, TEXT, Heatmap(np.ones((2, 2)), NAME, hover=hover), x_ticks=words),
        Panel(NAME, TEXT, NAME, series=[series], y_ticks=words),
        Panel(TEXT, NAME, TEXT, heatmap=Heatmap(np.ones((2, 2))), raised=True, y_ticks=words),
    ]
    described = Figure(NAME, panels, 3, TEXT)
    figure = plotly.draw(described)
    texts = [a.text for a in figure.layout.annotations] + [figure.layout.title.text]
    texts += [trace.name or "" for trace in figure.data]
    assert [text.replace("<br>", " ").split() for text in texts[:3]] == [
        on_page(name).split() for name in (TEXT, NAME, TEXT)
    ]
    assert live("".join(texts).replace("<br>", " "))[1] == ["sub"]
    assert live(pages.page(NAME, {TEXT: figure}, TEXT))[0] == []
    assert png(described).startswith(b"\x89PNG")


def test_matplotlib_would_have_read_mathematics():
    """The rival: the name as it is stops the drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    def draw(text):
        figure = Canvas()
        FigureCanvasAgg(figure)
        figure.suptitle(text)
        figure.canvas.draw()

    with pytest.raises(ValueError, match=r"Expected \\frac"):
        draw("$\\frac{$")
    assert png(Figure("$\\frac{$", [Panel("$\\frac{$", "$\\nope$")])).startswith(b"\x89PNG")
