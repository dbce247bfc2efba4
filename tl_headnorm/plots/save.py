"""Figures as files: an interactive page and a PNG each."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_headnorm.plots import plotly, png
from tl_headnorm.plots.page import write_page
from tl_headnorm.plots.panel import Figure
from tl_headnorm.run.files import write_bytes


def save(figure: Figure, stem: Path) -> None:
    """Write `<stem>.html`, self-contained, and `<stem>.png`."""
    page = stem.with_name(f"{stem.name}.html")
    write_page(page, figure.title, [_untitled(figure)], figure.subtitle)
    save_png(figure, stem.with_name(f"{stem.name}.png"))


def save_all(figures: Mapping[str, Figure], folder: Path) -> None:
    """Each by its file stem."""
    for name, figure in figures.items():
        save(figure, folder / name)


def save_png(figure: Figure, path: Path) -> None:
    write_bytes(path, png.png(figure))


def save_page(figures: Mapping[str, Figure], folder: Path, stem: str, title: str) -> None:
    """Write `<stem>.html` with every figure, and `<name>.png` of each."""
    parts = {f.title: plotly.draw(replace(f, title="")) for f in figures.values()}
    write_page(folder / f"{stem}.html", title, parts)
    for name, figure in figures.items():
        save_png(figure, folder / f"{name}.png")


def _untitled(figure: Figure) -> Any:
    """For a page, which says the title in its own letters."""
    return plotly.draw(replace(figure, title="", subtitle=""))
