"""Figures as PNG, by matplotlib: no browser, no display, no state shared by threads. No torch."""

import io
from typing import Any

import numpy as np

from tl_headnorm.plots.colors import DARK, NO_DATA
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series
from tl_headnorm.plots.text import Number, drawable, families, wrapped

DPI = 160
TITLE, SMALL, PANEL, LABEL, TICK = 11, 8, 9, 8, 7  # points


def png(figure: Figure) -> bytes:
    """The picture."""
    stream = io.BytesIO()
    draw(figure).savefig(stream, format="png")
    return stream.getvalue()


def draw(figure: Figure) -> Any:
    """The matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    widths, heights = figure.sizes()
    bars = any(p.heatmap is not None and p.heatmap.bar for p in figure.panels)
    width = sum(w + (1.35 if bars else 0.8) for w in widths)
    lines = [(text, size, color) for content, size, color in
             ((figure.title, TITLE, "black"), (figure.subtitle, SMALL, "#555555"))
             for text in wrapped(content, 72 * (width - 0.2), size)]  # fmt: skip
    header = 0.14 + sum(1.4 * size / 72 for _, size, _ in lines)
    names = {s.name for p in figure.panels for s in p.series if s.legend and not s.hidden}
    columns = max(1, int(width / (0.55 + 0.068 * max(map(len, names), default=1))))
    height = header + sum(h + 0.75 for h in heights) + 0.2 * -(-len(names) // columns)
    picture = Canvas(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(picture)
    picture.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header / height),
                              w_pad=0.07, h_pad=0.07)  # fmt: skip
    at = 0.09
    for text, size, color in lines:
        picture.text(0.1 / width, 1 - at / height, text, size=size, color=color, va="top")
        at += 1.4 * size / 72
    grid = picture.add_gridspec(len(heights), len(widths), width_ratios=widths,
                                height_ratios=heights)  # fmt: skip
    handles: dict[str, Any] = {}
    for panel, (row, column) in zip(figure.panels, figure.places(), strict=True):
        spot = grid[row, column : column + panel.span]
        axes = picture.add_subplot(spot, projection="3d" if panel.raised else None)
        handles |= {k: v for k, v in _panel(axes, panel).items() if k not in handles}
    if handles:
        picture.legend(handles.values(), handles, loc="outside lower left", ncols=columns,
                       fontsize=LABEL, frameon=False)  # fmt: skip
    _any_script(picture)
    return picture


def _any_script(picture: Any) -> None:
    """Every text in fonts that can write it; "$" is a character like any other."""
    from matplotlib.text import Text

    fonts = families()
    for text in picture.findobj(Text):
        text.set(text=drawable(text.get_text()), parse_math=False, fontfamily=fonts)


def _panel(axes: Any, panel: Panel) -> dict[str, Any]:
    """Draw one panel; the handles of its legend by name."""
    axes.set_title("\n".join(panel.heading), loc="left", fontsize=PANEL)
    axes.tick_params(labelsize=TICK)
    if panel.heatmap is not None and panel.raised:
        _raised(axes, panel, panel.heatmap)
        return {}
    if panel.heatmap is not None:
        _heatmap(axes, panel.heatmap, panel.size[1])
    else:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#ececec", axis="x" if panel.horizontal else "y", lw=0.7)
        axes.set_axisbelow(True)
    shown = [s for s in panel.series if not s.hidden]
    drawn = [(s, _draw(axes, s, panel)) for s in shown]
    _axes(axes, panel)
    return {s.name: handle for s, handle in drawn if s.legend}


def _heatmap(axes: Any, cells: Heatmap, inches: Number) -> None:
    from matplotlib.colors import Normalize, PowerNorm

    low, high = cells.range
    norm = PowerNorm(0.5, low, high) if cells.root else Normalize(low, high)
    image = axes.imshow(
        np.ma.masked_invalid(np.asarray(cells.z, np.float64)), aspect="auto", cmap=cells.palette,
        norm=norm, interpolation="nearest" if cells.z.size <= 300_000 else "auto",
    )  # fmt: skip
    axes.set_facecolor(NO_DATA)
    for at in cells.separators:
        axes.axvline(at, color="white", lw=2)
        axes.axvline(at, color=DARK, lw=0.6)
    for row, column, text, dark in cells.written():
        axes.text(column, row, text, ha="center", va="center", fontsize=TICK,
                  color="white" if dark else DARK)  # fmt: skip
    if cells.bar:
        bar = axes.figure.colorbar(image, ax=axes, pad=0.015, aspect=inches / 0.13)
        bar.ax.tick_params(labelsize=TICK)
        bar.set_label(cells.label, fontsize=LABEL)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}".replace("-", "−"))
        for line, color in ((cells.mark, "#d55e00"), (0.0 if cells.signed else None, DARK)):
            if line is not None and low < line < high:
                bar.ax.axhline(line, color=color, lw=1.2)


def _draw(axes: Any, s: Series, panel: Panel) -> Any:
    """One series; its handle for a legend."""
    x, y = np.asarray(s.x), np.asarray(s.y)
    if s.kind == "band":
        return axes.fill_between(x, s.low, s.high, color=s.color, alpha=0.3, lw=0)
    if (spread := s.spread(panel.horizontal)) is not None:
        ends = {"xerr" if panel.horizontal else "yerr": np.maximum(0, np.stack(spread))}
        axes.errorbar(x, y, fmt="none", ecolor=DARK if s.kind == "bars" else s.color, lw=0.9,
                      capsize=2, zorder=4, **ends)  # fmt: skip
    if s.kind == "bars":
        bars = axes.barh(y, x, s.width, color=s.color) if panel.horizontal else axes.bar(
            x, y, s.width, color=s.color)  # fmt: skip
        top = (x if panel.horizontal else y) if s.high is None else np.asarray(s.high)
        x, y = (top, y) if panel.horizontal else (x, top)
        for at_x, at_y, label in zip(x, y, s.labels or (), strict=False):
            _label(axes, at_x, at_y, label, (4, 0) if panel.horizontal else (0, 3))
            axes.margins(**{"x" if panel.horizontal else "y": 0.12})
        return bars
    style = {"solid": "-", "dash": "--", "dot": ":"}[s.dash] if s.kind == "line" else ""
    marker = s.marker or ("o" if s.kind == "points" else "")
    (line,) = axes.plot(x, y, color=s.color, ls=style, lw=1.4, marker=marker, ms=s.size, mew=0.8,
                        mfc="none" if s.hollow else None)  # fmt: skip
    for at_x, at_y, label in zip(x, y, s.labels or (), strict=False):
        _label(axes, at_x, at_y, label, (3, 4))
    return line


def _label(axes: Any, x: Any, y: Any, text: str, shift: tuple[int, int]) -> None:
    axes.annotate(text, (x, y), xytext=shift, textcoords="offset points", fontsize=6.5,
                  ha="center" if shift[0] == 0 else "left",
                  va="center" if shift[1] == 0 else "bottom")  # fmt: skip


def _raised(axes: Any, panel: Panel, cells: Heatmap) -> None:
    """A curve per row: peaks of one cell stay visible."""
    from matplotlib import colormaps

    n_rows, n_columns = cells.z.shape
    for row in range(n_rows - 1, -1, -1):
        color, at = colormaps[cells.colors](row / max(1, n_rows - 1)), np.full(n_columns, row)
        axes.plot(np.arange(n_columns), at, cells.z[row], lw=0.8, color=color)
    axes.set_xlabel(panel.x, fontsize=LABEL)
    axes.set_ylabel(panel.y, fontsize=LABEL)
    if cells.limits is not None:
        axes.set_zlim(*cells.limits)


def _axes(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    for name, one in (("x", axes.xaxis), ("y", axes.yaxis)):
        axis = panel.axis(name)  # type: ignore[arg-type]
        axes.set(**{f"{name}scale": "log" if axis.log else "linear"})
        one.set_label_text(axis.label, fontsize=LABEL)
        if axis.ticks is not None:
            labels = [drawable(label) for label in axis.ticks.values()]
            tilt = _tilt(labels, panel.size[0]) if name == "x" else {}
            one.set_ticks(list(axis.ticks), labels, **tilt)
            one.set_minor_locator(NullLocator())
        else:  # layers, heads and tokens are whole numbers
            whole = all(np.all(np.asarray(s.x, np.float64) % 1 == 0) for s in panel.series)
            one.set_major_locator(MaxNLocator("auto", integer=name == "x" and whole,
                                              steps=[1, 2, 2.5, 5, 10]))  # fmt: skip
        if axis.limits is not None:
            axes.set(**{f"{name}lim": axis.limits})


def _tilt(labels: list[str], inches: Number) -> dict[str, Any]:
    """Labels along x stand as upright as they must, in order not to touch."""
    if sum(len(label) + 2 for label in labels) * 0.062 < inches:
        return {}
    if len(labels) * 0.3 < inches:
        return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    return {"rotation": 90}
