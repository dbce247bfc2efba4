"""Figures as interactive plotly ones. No torch."""

from typing import Any

import numpy as np

from tl_headnorm.plots.colors import DARK, NO_DATA
from tl_headnorm.plots.panel import Figure, Heatmap, Panel, Series
from tl_headnorm.plots.text import Number, on_page, wrapped

PIXELS = 100  # per inch
MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", ".": "circle", "": "circle"}


def draw(figure: Figure) -> Any:
    """The plotly figure."""
    from plotly.subplots import make_subplots

    bars = any(p.heatmap is not None and p.heatmap.bar for p in figure.panels)
    gap_x, gap_y = (135 if bars else 85), 75 + 17 * figure.heading_lines
    widths, heights = figure.sizes()
    places = figure.places()
    width = PIXELS * sum(widths) + gap_x * (len(widths) - 1)
    height = PIXELS * sum(heights) + gap_y * (len(heights) - 1)
    specs: list[list[Any]] = [[None] * len(widths) for _ in heights]
    for panel, (row, column) in zip(figure.panels, places, strict=True):
        kind = "scene" if panel.raised else "xy"
        specs[row][column] = {"type": kind, "colspan": panel.span}
    page = make_subplots(
        len(heights), len(widths), specs=specs, column_widths=widths, row_heights=heights,
        horizontal_spacing=min(1, gap_x / width), vertical_spacing=min(1, gap_y / height),
    )  # fmt: skip
    names: set[str] = set()
    left = ""
    for panel, (row, column) in zip(figure.panels, places, strict=True):
        _panel(page, panel, {"row": row + 1, "col": column + 1}, width, names)
        if column and panel.y == left:  # said once in a row: a narrow page has no room for more
            page.update_yaxes(title_text="", row=row + 1, col=column + 1)
        left = panel.y
    _layout(page, figure, width, height, names)
    return page


def _layout(page: Any, figure: Figure, width: Number, height: Number, names: set[str]) -> None:
    """Title, margins and size; a legend takes the room of its longest name."""
    title = [on_page(line) for line in wrapped(figure.title, max(540, width + 60), 17)]
    small = [on_page(line) for line in wrapped(figure.subtitle, max(540, width + 60), 12)]
    heading = "<br>".join(title)
    if small:
        heading += f"<br><sub>{'<br>'.join(small)}</sub>"
    top = 26 + 22 * len(title) + 17 * len(small) + 17 * figure.heading_lines
    room = 40 if not names else 70 + min(300, 7 * max(map(len, names)))
    page.update_layout(
        title={"text": heading, "x": 0.01, "y": 1 - 12 / (height + top), "yanchor": "top"},
        template="plotly_white", width=max(560, round(width + 80 + max(room, 90))),
        height=round(height + top + 60), margin={"l": 80, "r": 40, "t": top, "b": 60},
        barmode="overlay", hoverlabel={"align": "left"}, showlegend=bool(names),
    )  # fmt: skip


def _panel(page: Any, panel: Panel, where: dict[str, int], width: Number, names: set[str]) -> None:
    area = page.get_subplot(**where)
    x, y = (area.domain.x, area.domain.y) if panel.raised else (
        area.xaxis.domain, area.yaxis.domain)  # fmt: skip
    if panel.title:
        page.add_annotation(
            text="<br>".join(map(on_page, panel.heading)), font={"size": 13}, x=x[0], y=y[1],
            xref="paper", yref="paper", xanchor="left", yanchor="bottom", align="left",
            showarrow=False,
        )  # fmt: skip
    if panel.heatmap is not None and panel.raised:
        _raised(page, panel, panel.heatmap, where)
        return
    if panel.heatmap is not None:
        bar = {"x": x[1] + 6 / width, "y": sum(y) / 2, "len": y[1] - y[0]}
        _heatmap(page, panel, panel.heatmap, where, {**bar, "thickness": 11, "ypad": 0})
    for series in panel.series:
        shown = series.legend and series.name not in names
        names |= {series.name} if shown else set()
        page.add_trace(_trace(series, panel, shown), **where)
    _axes(page, panel, where)


def _heatmap(page: Any, panel: Panel, cells: Heatmap, where: dict[str, int], bar: Any) -> None:
    import plotly.graph_objects as go
    from plotly.colors import get_colorscale

    low, high = cells.range
    n_rows, n_columns = cells.z.shape
    where_is = f"{on_page(panel.y)} %{{y}}, {on_page(panel.x)} %{{x}}"
    hover: dict[str, Any] = {"hovertemplate": where_is + ": %{z:.4g}<extra></extra>"}
    if cells.hover is not None:
        text = [[on_page(cell) for cell in row] for row in cells.hover]
        hover = {"text": text, "hoverinfo": "text"}
    gap = 1 if cells.z.size <= 4096 else 0
    colors = get_colorscale(cells.palette)
    page.add_trace(
        go.Heatmap(
            z=cells.z, x=list(range(n_columns)), y=list(range(n_rows)), zmin=low, zmax=high,
            colorscale=[[t**2, c] for t, c in colors] if cells.root else colors,
            colorbar={**bar, "title": {"text": on_page(cells.label), "side": "right"}},
            showscale=cells.bar, hoverongaps=True, xgap=gap, ygap=gap, **hover,
        ),
        **where,
    )  # fmt: skip
    frame = {"x0": -0.5, "x1": n_columns - 0.5, "y0": -0.5, "y1": n_rows - 0.5}
    if cells.missing:
        page.add_shape(layer="below", fillcolor=NO_DATA, line_width=0, **frame, **where)
    for at in cells.separators:
        for color, line in (("white", 3), (DARK, 1)):
            ends = {**frame, "x0": at, "x1": at}
            page.add_shape(type="line", line={"color": color, "width": line}, **ends, **where)
    for row, column, value, dark in cells.written():
        page.add_annotation(x=column, y=row, text=value, showarrow=False, **where,
                            font={"size": 10, "color": "white" if dark else DARK})  # fmt: skip


def _trace(s: Series, panel: Panel, shown: bool) -> Any:
    import plotly.graph_objects as go

    common: dict[str, Any] = {"name": on_page(s.name), "legendgroup": s.name, "showlegend": shown,
                              "visible": "legendonly" if s.hidden else True}  # fmt: skip
    x, y = np.asarray(s.x), np.asarray(s.y)
    if s.kind == "band":
        low, high = np.asarray(s.low), np.asarray(s.high)
        return go.Scatter(
            x=np.r_[x, x[::-1]], y=np.r_[low, high[::-1]], fill="toself", mode="lines",
            line={"width": 0, "color": s.color}, opacity=0.35, hoverinfo="skip", **common,
        )  # fmt: skip
    common |= {"x": x, "y": y}
    if s.hover is not None:
        common |= {"hovertext": [on_page(text) for text in s.hover], "hoverinfo": "text"}
    if (spread := s.spread(panel.horizontal)) is not None:
        ends = {"type": "data", "array": spread[1], "arrayminus": spread[0], "thickness": 1.2}
        common["error_x" if panel.horizontal else "error_y"] = ends
    if s.kind == "bars":
        way = "h" if panel.horizontal else "v"
        text = {"text": s.labels, "textposition": "outside", "cliponaxis": False}
        return go.Bar(marker_color=s.color, width=s.width, orientation=way, **common,
                      **(text if s.labels else {}))  # fmt: skip
    symbol = MARKERS[s.marker] + ("-open" if s.hollow else "")
    marker = {"color": s.color, "size": 1.6 * s.size, "symbol": symbol}
    mode = "markers" if s.kind == "points" else "lines+markers" if s.marker else "lines"
    if s.labels is not None:
        mode += "+text"
        common |= {"text": [on_page(label) for label in s.labels], "textposition": "top center"}
    line = {"color": s.color, "dash": s.dash, "width": 1.8}
    return go.Scatter(mode=mode, marker=marker, line=line, **common)


def _raised(page: Any, panel: Panel, cells: Heatmap, where: dict[str, int]) -> None:
    import plotly.graph_objects as go

    names = panel.y_ticks or {}
    rows = [[on_page(names.get(row, ""))] * cells.z.shape[1] for row in range(len(cells.z))]
    x, y = on_page(panel.x), on_page(panel.y)
    hover = f"{x} %{{x}}, {y} %{{y}} %{{customdata}}<br>%{{z:.4g}}<extra></extra>"
    page.add_trace(
        go.Surface(z=cells.z, customdata=rows, colorscale=cells.palette, showscale=False,
                   hovertemplate=hover), **where,
    )  # fmt: skip
    eye, height = {"x": 1.7, "y": -1.7, "z": 1.1}, {"title": "", "range": cells.limits}
    page.update_scenes(xaxis_title=x, yaxis_title=y, zaxis=height, aspectmode="cube",
                       camera_eye=eye, **where)  # fmt: skip


def _axes(page: Any, panel: Panel, where: dict[str, int]) -> None:
    for axis, update in (
        (panel.axis("x"), page.update_xaxes),
        (panel.axis("y"), page.update_yaxes),
    ):
        how: dict[str, Any] = {"type": "log" if axis.log else "linear", "zeroline": False}
        if axis.limits is not None:
            how["range"] = list(np.log10(axis.limits) if axis.log else axis.limits)
        if axis.ticks is not None:
            how["tickvals"] = list(axis.ticks)
            how["ticktext"] = [on_page(text) for text in axis.ticks.values()]
        update(title_text=on_page(axis.label), showgrid=panel.heatmap is None, automargin=True,
               title_standoff=8,
               **how, **where)  # fmt: skip
