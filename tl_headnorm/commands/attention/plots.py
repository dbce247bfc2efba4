"""Pictures of attention: all heads, one head with its tokens, maps, writing. No torch."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.attention.page import LABELS
from tl_headnorm.run.files import write_bytes

COLORS, CHANGE = "Blues", "RdBu"
# Tried in this order for what the first cannot write.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS", "Noto Emoji",
    "Symbola", "Segoe UI Symbol",
)  # fmt: skip
MOST_LABEL = 14
LABELS_PER_INCH = 8


def canvas(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """A figure as PNG, whole or not at all."""
    import io

    stream = io.BytesIO()
    # The layout cuts off titles above square axes otherwise.
    figure.savefig(stream, format="png", bbox_inches="tight", pad_inches=0.08)
    write_bytes(path, stream.getvalue())


@cache
def _fonts() -> list[tuple[str, frozenset[int]]]:
    """Fonts that are here, and the characters each can write."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    here = {font.name for font in fontManager.ttflist}
    names = [name for name in FONTS if name in here]
    return [
        (name, frozenset(get_font(fontManager.findfont(FontProperties(family=name))).get_charmap()))
        for name in names
    ]


def families() -> list[str]:
    """Font families for text of any script."""
    return [name for name, _ in _fonts()]


def printable(label: str, most: int = MOST_LABEL) -> str:
    """A token as a label: spaces and line ends seen, what no font here can write as its code."""
    seen = label.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    stripped = seen.strip(" ")
    left, right = len(seen) - len(seen.lstrip(" ")), len(seen) - len(seen.rstrip(" "))
    seen = "·" * left + stripped + "·" * (right if stripped else 0)
    known = frozenset().union(*(characters for _, characters in _fonts()))
    text = "".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in seen)
    return text if len(text) <= most else text[: most - 1] + "…"


def _style(size: int = 9) -> dict[str, Any]:
    """Text of any script, in which "$" is a character like any other."""
    return {"fontsize": size, "parse_math": False, "fontfamily": families()}


def _name_ticks(axes: Any, labels: Sequence[str], which: str, inches: float) -> None:
    """Labels at every so many ticks that they do not touch, with their positions then."""
    every = max(1, -(-len(labels) // max(1, int(inches * LABELS_PER_INCH))))
    places = range(0, len(labels), every)
    texts = [printable(labels[i]) + (f" {i}" if every > 1 else "") for i in places]
    axis = axes.xaxis if which == "x" else axes.yaxis
    rotation = {"rotation": 90} if which == "x" else {}
    axis.set_ticks(list(places), texts, fontsize=6, fontfamily=families(), **rotation)
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)  # "$" is a token like any other


def save_grid(found: Any, path: Path, title: str) -> None:
    """All heads as thumbnails, layers down and heads across."""
    n_layers, n_heads, side, _ = found.thumbnails.shape
    tiles = np.zeros((n_layers, n_heads, side + 2, side + 2), np.float32)
    tiles[..., 1:-1, 1:-1] = found.thumbnails / 255
    tiles[..., [0, -1], :] = tiles[..., :, [0, -1]] = np.nan
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(n_layers * (side + 2), n_heads * (side + 2))
    cell = min(1.0, 9.0 / n_heads)
    figure = canvas(n_heads * cell + 1.0, n_layers * cell + 1.0)
    axes = figure.add_subplot()
    axes.imshow(mosaic, cmap=COLORS, vmin=0, vmax=1, interpolation="antialiased")
    axes.set_facecolor("#c8ccd2")
    step = side + 2
    layers = [int(i) for i in found.run["layer"].values]
    every = max(1, n_heads // 16)
    axes.set_xticks([(h + 0.5) * step for h in range(0, n_heads, every)], range(0, n_heads, every))
    every = max(1, n_layers // 24)
    axes.set_yticks([(i + 0.5) * step for i in range(0, n_layers, every)], layers[::every])
    axes.tick_params(labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(printable(title, 160), loc="left", **_style())
    save(figure, path)


def save_pattern(pattern: np.ndarray, labels: Sequence[str], path: Path, title: str) -> None:
    """One pattern, queries down and keys across, with the tokens as labels."""
    size = 6.4
    figure = canvas(size + 1.6, size + 0.9)
    axes = figure.add_subplot()
    shown = np.where(np.tri(len(labels), dtype=bool), pattern.astype(np.float32), np.nan)
    image = axes.imshow(
        shown, cmap=COLORS, norm=_root(), interpolation="nearest" if len(labels) < 600 else None
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("attention weight (√ scale)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _name_ticks(axes, labels, "x", size)
    _name_ticks(axes, labels, "y", size)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    axes.set_title(printable(title, 160), loc="left", **_style())
    save(figure, path)


def _root() -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, 1)


def _save_maps(
    maps: Sequence[tuple[str, np.ndarray, float | None]], layers: Sequence[int], path: Path,
    title: str, *, signed: bool = False,
) -> None:  # fmt: skip
    """Grids of layers by heads, each with its own colour bar and a line at a uniform head."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    n_layers, n_heads = maps[0][1].shape
    height = min(4.2, max(2.2, 0.9 + 0.16 * n_layers))
    figure = canvas(3.9 * columns, height * rows + 0.5)
    figure.suptitle(printable(title, 160), x=0.01, ha="left", **_style())
    for i, (name, grid, uniform) in enumerate(maps):
        axes = figure.add_subplot(rows, columns, i + 1)
        most = float(np.nanmax(np.abs(grid), initial=0)) or 1.0
        image = axes.imshow(
            grid, aspect="auto", cmap=CHANGE if signed else COLORS, vmin=-most if signed else 0,
            vmax=most, interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(labelsize=6)
        if uniform is not None and np.isfinite(uniform) and uniform < most:
            bar.ax.axhline(uniform, color="#c2410c", lw=1.2)
        axes.set_title(printable(name, 48), loc="left", **_style(8))
        axes.set_xticks(range(0, n_heads, max(1, n_heads // 8)))
        every = max(1, n_layers // 8)
        axes.set_yticks(range(0, n_layers, every), list(layers)[::every])
        axes.tick_params(labelsize=6)
        if i % columns == 0:
            axes.set_ylabel("layer", fontsize=7)
        if i >= len(maps) - columns:
            axes.set_xlabel("head", fontsize=7)
    save(figure, path)


def save_scores(run: xr.Dataset, path: Path, title: str) -> None:
    """Every score of every head; the line on a colour bar is a uniform head."""
    uniform = run.attrs["uniform"]
    maps = [(label, run[n].values, uniform.get(n)) for n, label in LABELS.items() if n in run]
    _save_maps(maps, run["layer"].values.tolist(), path, f"{title} · line: a uniform head")


def save_focus(run: xr.Dataset, path: Path, title: str) -> None:
    """Attention to each keyword, per head, mean over the queries."""
    mean, expected = run["focus"].mean("query"), run["focus"].coords["uniform"].mean("query")
    maps = [
        (f"on “{word}”", mean.isel(keyword=i).values, float(expected[i]))
        for i, word in enumerate(run["keyword"].values)
    ]
    _save_maps(maps, run["layer"].values.tolist(), path, f"{title} · line: a uniform head")


def save_changes(
    changes: Sequence[tuple[str, np.ndarray]], layers: Sequence[int], path: Path, title: str
) -> None:
    """Change of attention to the keywords under distraction, signed."""
    _save_maps([(n, grid, None) for n, grid in changes], layers, path, title, signed=True)


def save_writing(writing: Any, path: Path, title: str) -> None:
    """One panel per watched head: a row per new token, a column per token so far."""
    n_heads, steps = writing.weights.shape[:2]
    width, height = 8.2, min(9.0, 0.14 * steps + 0.9)
    figure = canvas(width, height * n_heads + 0.9)
    figure.suptitle(printable(title, 160), x=0.01, ha="left", **_style())
    for i, (layer, head) in enumerate(writing.heads):
        axes = figure.add_subplot(n_heads, 1, i + 1)
        image = axes.imshow(
            writing.weights[i].astype(np.float32), cmap=COLORS, norm=_root(), aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.axvline(writing.n_prompt - 0.5, color="#c2410c", lw=1)
        axes.set_title(f"head {layer}.{head}", fontsize=8, loc="left")
        _name_ticks(axes, writing.labels[writing.n_prompt :], "y", height * 0.75)
        axes.set_ylabel("new token", fontsize=7)
        if i == n_heads - 1:
            _name_ticks(axes, writing.labels, "x", width * 0.82)
        else:
            axes.set_xticks([])
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=6)
    save(figure, path)
