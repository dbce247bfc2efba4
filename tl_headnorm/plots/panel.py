"""A figure as data: panels of cells, lines, bars and points. Drawn by `plotly` and by `png`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tl_headnorm.plots.colors import DIVERGING, PALETTE, SEQUENTIAL
from tl_headnorm.plots.text import Number, wrapped

PAPER = 15.5  # inches
MOST_TEXT = 200  # cells with their value written into them


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Cells [row, column], row 0 on top; NaN is grey.

    `signed` centres the colours at zero. `limits` are the colours' ends, those of the values
    where None. `root` spreads small values of weights from 0 to 1. `mark` is a line on the colour
    bar. `nan` says why cells are NaN; "" where they only part others. `groups` is the number of
    neighbouring columns between separators. `hover` is a text per cell, `text` writes values into
    few cells.
    """

    z: np.ndarray
    label: str = ""
    signed: bool = False
    limits: tuple[Number, Number] | None = None
    root: bool = False
    colors: str = SEQUENTIAL
    bar: bool = True
    nan: str = "no data"
    mark: Number | None = None
    groups: int | None = None
    hover: np.ndarray | None = None
    text: bool = False

    @property
    def palette(self) -> str:
        return DIVERGING if self.signed else self.colors

    @property
    def range(self) -> tuple[Number, Number]:
        """The values at the two ends of the colours."""
        if self.limits is not None:
            return self.limits
        real = self.z[np.isfinite(self.z)]
        if self.signed:
            return -bound(self.z), bound(self.z)
        low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 1.0)
        return (low, high) if high > low else (low, low + 1)

    @property
    def missing(self) -> bool:
        return bool(np.isnan(self.z).any())

    @property
    def separators(self) -> list[float]:
        """Where columns of one key/value group end, in columns."""
        n = self.z.shape[1]
        return [i - 0.5 for i in range(self.groups, n, self.groups)] if self.groups else []

    def written(self) -> list[tuple[int, int, str, bool]]:
        """(row, column, text, on a dark cell) of the values to write into the cells."""
        if not self.text or self.z.size > MOST_TEXT:
            return []
        low, high = self.range
        shares = (self.z - low) / (high - low)
        dark = abs(shares - 0.5) > 0.3 if self.signed else shares < 0.5
        return [
            (row, column, f"{value:.2f}", bool(dark[row, column]))
            for (row, column), value in np.ndenumerate(self.z) if np.isfinite(value)
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Series:
    """A line, points, bars, or the band between `low` and `high`.

    For the other kinds `low` and `high` are the ends of intervals: of y, or of x where the panel
    is horizontal. `marker` is matplotlib's sign of it; `hollow` marks are rings.
    `labels` stand at the points. `hidden` ones appear on a page at a click on the legend.
    """

    name: str
    x: Any
    y: Any = ()
    color: str = PALETTE[0]
    kind: Literal["line", "points", "bars", "band"] = "line"
    low: Any = None
    high: Any = None
    dash: str = "solid"  # or "dash", "dot"
    marker: str = ""
    size: Number = 4
    hollow: bool = False
    width: Number = 0.8
    labels: Sequence[str] | None = None
    hover: Sequence[str] | None = None
    legend: bool = True
    hidden: bool = False

    def spread(self, horizontal: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """(below, above) of the intervals, as lengths."""
        if self.low is None or self.high is None:
            return None
        value = np.asarray(self.x if horizontal else self.y, np.float64)
        return value - np.asarray(self.low), np.asarray(self.high) - value


@dataclass(frozen=True, eq=False)
class Panel:
    """One pair of axes.

    `horizontal`: bars and intervals lie along x, the first of y is on top. `log` names the
    logarithmic axes. `x_ticks`, `y_ticks`: labels by position, for names instead of numbers.
    `span`: columns of the figure's grid. `size`: inches. `raised`: the
    heatmap's values as heights over its rows and columns, in three dimensions.
    """

    title: str = ""
    x: str = ""
    y: str = ""
    heatmap: Heatmap | None = None
    raised: bool = False
    series: Sequence[Series] = ()
    horizontal: bool = False
    log: Literal["", "x", "y", "xy"] = ""
    x_ticks: Mapping[Any, str] | None = None
    y_ticks: Mapping[Any, str] | None = None
    x_range: tuple[Number, Number] | None = None
    y_range: tuple[Number, Number] | None = None
    span: int = 1
    size: tuple[Number, Number] = (3.6, 2.6)

    @property
    def heading(self) -> list[str]:
        """The title in lines as wide as the panel."""
        return wrapped(self.title, 72 * (self.size[0] + 0.4), 9)

    def axis(self, name: Literal["x", "y"]) -> "Axis":
        """Label, ticks and ends of one axis."""
        x, log, n, limits = name == "x", name in self.log, 0, None
        label, ticks, length = (self.x, self.x_ticks, self.size[0]) if x else (
            self.y, self.y_ticks, self.size[1])  # fmt: skip
        if self.heatmap is not None:
            n = self.heatmap.z.shape[1 if x else 0]
            limits = (-0.5, n - 0.5) if x else (n - 0.5, -0.5)
            if ticks is None:
                ticks = {i: str(i) for i in range(0, n, tick_step(n, int(length / 0.24)))}
            if x and self.heatmap.missing and self.heatmap.nan:
                label = f"{label} (grey: {self.heatmap.nan})".strip()
        elif log:
            ticks = _log_ticks([s.x if x else s.y for s in self.series])
        elif self.horizontal and not x:
            at = np.concatenate([np.ravel(s.y) for s in self.series])
            limits = float(at.max()) + 0.6, float(at.min()) - 0.6
        return Axis(label, ticks, (self.x_range if x else self.y_range) or limits, log)


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis as drawn: labels by position, and its two ends, where they are given."""

    label: str
    ticks: Mapping[Any, str] | None
    limits: tuple[Number, Number] | None
    log: bool


def _log_ticks(values: Sequence[Any], most: int = 7) -> dict[float, str]:
    """Labels of a logarithmic axis that do not overlap: 1, 2 and 5, or powers of ten."""
    real = np.concatenate([np.asarray(v, np.float64).ravel() for v in values])
    real = real[np.isfinite(real) & (real > 0)]
    low, high = (float(real.min()), float(real.max())) if real.size else (1.0, 1.0)
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    powers = range(first, last + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: -(-len(ticks) // most)]
    return {t: f"{t:g}" for t in (ticks if len(ticks) > 1 else np.linspace(low, high, 3))}


@dataclass(frozen=True, eq=False)
class Figure:
    """Panels in a grid, row by row, under a title and a smaller line.

    `columns` of the grid at most; as many as are well read side by side where 0.
    """

    title: str
    panels: Sequence[Panel]
    columns: int = 0
    subtitle: str = ""

    def places(self) -> list[tuple[int, int]]:
        """(row, column) of every panel."""
        found, row, column = [], 0, 0
        for panel in self.panels:
            if column + panel.span > self.width:
                row, column = row + 1, 0
            found.append((row, column))
            column += panel.span
        return found

    @property
    def width(self) -> int:
        """Columns of the grid."""
        most = self.columns or int(PAPER / (1.3 + max(panel.size[0] for panel in self.panels)))
        return max(1, min(most, sum(panel.span for panel in self.panels)))

    @property
    def heading_lines(self) -> int:
        """Lines of the longest panel title."""
        return max(len(panel.heading) for panel in self.panels)

    def sizes(self) -> tuple[list[Number], list[Number]]:
        """Inches of the grid's columns and rows: those of their largest panel."""
        places = self.places()
        widths: list[Number] = [1.0] * self.width
        heights: list[Number] = [1.0] * (places[-1][0] + 1)
        for panel, (row, column) in zip(self.panels, places, strict=True):
            heights[row] = max(heights[row], panel.size[1])
            for i in range(column, column + panel.span):
                widths[i] = max(widths[i], panel.size[0] / panel.span)
        return widths, heights


def bound(*grids: np.ndarray) -> float:
    """The largest absolute value: half the width of a colour scale centred at zero."""
    return max((float(np.nanmax(np.abs(g), initial=0)) for g in grids), default=0) or 1.0


def cells(shape: tuple[int, ...], part: float = 1.0) -> tuple[float, float]:
    """Inches of a heatmap [layer, head], or a `part` of them: many cells are smaller ones."""
    height, width = (n * (0.26 if n <= 16 else 0.2 if n <= 40 else 0.15) for n in shape)
    return part * max(2.4, width), part * max(1.9, height)


def tick_step(count: int, most: int = 20) -> int:
    """Every label up to `most`, then every second, fourth, eighth, and so on in round numbers."""
    steps = (1, 2, 4, 8, *(s * 10**p for p in range(1, 7) for s in (2, 5, 10)))
    return next(step for step in steps if count / step <= max(1, most))


def layers_by_heads(
    z: np.ndarray, title: str = "", *, layers: Sequence[int] | None = None, part: float = 1.0,
    **heatmap: Any,
) -> Panel:  # fmt: skip
    """A map [layer, head], smaller where it is a `part`; `layers` where they are not 0, 1, ..."""
    ticks = None
    if layers is not None and list(layers) != list(range(len(z))):
        ticks = {i: str(layer) for i, layer in enumerate(layers)}
    hover = np.array([[f"layer {i if layers is None else layers[i]}, head {j}\n{v:.4g}"
                       for j, v in enumerate(row)] for i, row in enumerate(z)], object)  # fmt: skip
    return Panel(title, "head", "layer", Heatmap(z, **{"hover": hover, **heatmap}),
                 y_ticks=ticks, size=cells(z.shape, part))  # fmt: skip


def group_size(n_key_value_heads: int | None, n_heads: int) -> int | None:
    """Heads that read the same keys and values; None where each has its own."""
    size = n_heads // n_key_value_heads if n_key_value_heads else 1
    return size if size > 1 else None


def side_by_side(names: Sequence[str], order: Sequence[str], part: int, parts: int) -> np.ndarray:
    """Positions of `names` on an axis of `order`, where `parts` series share each place."""
    shift = (part - (parts - 1) / 2) * 0.8 / parts
    return np.array([order.index(name) + shift for name in names])
