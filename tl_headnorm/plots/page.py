"""Pages: one HTML template, stylesheet and script for all. A page is one file, without network.

A command's own page is a template that extends `plots/page.html.j2`; a page of figures alone is
`write_page(path, title, figures)`. The plotly library is in a page once, deflated: 2 MB, not 4.8.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tl_headnorm.plots.templates import render, script_json
from tl_headnorm.run.files import write_text


def write_page(
    path: Path, title: str, figures: Mapping[str, Any] | Iterable[Any], about: str = ""
) -> None:
    """Write a page of plotly figures, each under its heading where `figures` is a mapping."""
    write_text(path, page(title, figures, about))


def page(title: str, figures: Mapping[str, Any] | Iterable[Any], about: str = "") -> str:
    """A page of plotly figures; title, text and headings are escaped."""
    named = figures.items() if isinstance(figures, Mapping) else (("", f) for f in figures)
    sections = [(heading, figure_html(figure)) for heading, figure in named]
    return render("plots/figures.html.j2", title=title, about=about, sections=sections,
                  plotly=plotly_library())  # fmt: skip


def figure_html(figure: Any) -> Markup:
    """A plotly figure as data; the page's script draws it in the page's colours and width."""
    data = figure.to_plotly_json()
    data["layout"].pop("template", None)  # the page's own colours and lines
    text = script_json(data)
    return Markup(
        '<div class="wide"><div class="figure"><script type="application/json">{}</script></div>'
        "</div>"
    ).format(text)


def packed(data: bytes) -> str:
    """Deflated bytes as base64; `inflate` of page.js reads them."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


@cache
def plotly_library() -> str:
    """The source of plotly.js, packed."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs().encode())
