"""Figures of massive activations, from the study's Dataset. No torch."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.ablate.plots import canvas, save
from tl_headnorm.plots.text import in_picture, on_page

PALETTE = ["#440154", "#2a788e", "#7ad151", "#d1495b", "#888888"]


def _lines(
    series: dict[str, np.ndarray], title: str, y: str, stem: Path, *, log: bool = False,
    band: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Curves over layers; `band` is shaded around zero."""
    import plotly.graph_objects as go

    page, picture = go.Figure(), canvas(7.6, 4.2)
    axes = picture.add_subplot()
    layers = np.arange(len(next(iter(series.values()))))
    if band is not None:
        axes.fill_between(
            layers, -band, band, color="#bbbbbb", alpha=0.6, label="noise of the dtype"
        )
        for sign, fill in ((1, None), (-1, "tonexty")):
            page.add_scatter(
                x=layers, y=sign * band, fill=fill, mode="lines", line={"width": 0.5},
                fillcolor="rgba(150,150,150,0.5)", name="noise of the dtype",
                line_color="#999999", showlegend=sign < 0,
            )  # fmt: skip
    for i, (name, values) in enumerate(series.items()):
        color = PALETTE[i % len(PALETTE)]
        page.add_scatter(x=layers, y=values, name=name, mode="lines+markers", line_color=color)
        axes.plot(layers, values, marker="o", ms=4, color=color, label=name)
    if log:
        axes.set_yscale("log")
        page.update_yaxes(type="log")
    axes.set_xticks(layers[:: max(1, len(layers) // 16)])
    axes.set_xlabel("layer (residual after the block)")
    axes.set_ylabel(y)
    axes.set_title(in_picture(title), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    page.update_layout(
        title={"text": on_page(title), "x": 0.02}, template="plotly_white", width=900
    )
    page.update_xaxes(title="layer (residual after the block)", dtick=1)
    page.update_yaxes(title=y)
    save(page, picture, stem)


def save_curve(run: xr.Dataset, stem: Path, title: str) -> None:
    """Largest three and median by layer."""
    names = {"top1": "largest", "top2": "second", "top3": "third", "median": "median"}
    series = {label: run[name].values for name, label in names.items()}
    _lines(series, f"Largest activations by layer · {title}", "|x|", stem, log=True)


def save_pruning(run: xr.Dataset, stem: Path, title: str) -> None:
    """Change of the largest activation by layer when heads are pruned, beside the noise."""
    sets = list(run.attrs["pruned"])
    series = {name: run["change_percent"].sel(set=name).values for name in sets}
    _lines(
        series, f"Largest activation after pruning · {title}", "change (%)", stem,
        band=run["noise_percent"].values,
    )  # fmt: skip


def save_makers(run: xr.Dataset, stem: Path, title: str) -> None:
    """The largest activation with all heads, and with all MLPs, switched off."""
    names = [name for name in ("clean", "all heads", "all mlps") if name in run["set"].values]
    label = {"clean": "clean", "all heads": "all heads off", "all mlps": "all MLPs off"}
    series = {label[name]: run["set_top1"].sel(set=name).values for name in names}
    _lines(series, f"Who makes them · {title}", "largest |x|", stem, log=True)


def save_layer_sweep(run: xr.Dataset, stem: Path, title: str) -> bool:
    """What switching off one layer's heads, or its MLP, does to every layer's largest."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    kinds = {"heads of layer ": "heads off", "mlp ": "MLP off"}
    grids = {}
    for start, label in kinds.items():
        rows = [name for name in run["set"].values if str(name).startswith(start)]
        if rows:
            grids[label] = run["change_percent"].sel(set=rows).values
    if not grids:
        return False
    bound = max(float(np.nanmax(np.abs(grid))) for grid in grids.values()) or 1.0
    bound = min(bound, 200.0)
    page = make_subplots(1, len(grids), subplot_titles=list(grids))
    picture = canvas(4.4 * len(grids) + 1, 4.2)
    axes = picture.subplots(1, len(grids), squeeze=False)[0]
    for i, (label, grid) in enumerate(grids.items()):
        cells = go.Heatmap(
            z=grid, zmin=-bound, zmax=bound, colorscale="RdBu_r", showscale=i == 0,
            colorbar={"title": {"text": "change (%)"}}, xgap=1, ygap=1,
            hovertemplate="off in layer %{y}, seen in layer %{x}<br>%{z:.3g}%<extra></extra>",
        )  # fmt: skip
        page.add_trace(cells, 1, i + 1)
        image = axes[i].imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        axes[i].set_title(label, fontsize=10)
        axes[i].set_xlabel("layer looked at")
        axes[i].set_ylabel("layer switched off")
        axes[i].set_xticks(range(0, grid.shape[1], max(1, grid.shape[1] // 12)))
        axes[i].set_yticks(range(0, len(grid), max(1, len(grid) // 12)))
    picture.colorbar(image, ax=axes).set_label("change of the largest |x| (%)", fontsize=8)
    picture.suptitle(in_picture(f"Layer by layer · {title}"), fontsize=10, x=0.01, ha="left")
    page.update_layout(title={"text": on_page(f"Layer by layer · {title}"), "x": 0.02},
                       template="plotly_white", width=950, height=470)  # fmt: skip
    page.update_yaxes(autorange="reversed", title="layer switched off", dtick=1)
    page.update_xaxes(title="layer looked at", dtick=1)
    save(page, picture, stem)
    return True


def save_ranking(run: xr.Dataset, stem: Path, title: str, most: int = 24) -> None:
    """Heads by attention to the token, the uniform baseline, and what they contribute."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    weights, sizes = run["first_token_weight"].values, run["head_resid_contrib_norm"].values
    order = np.argsort(-weights, axis=None, kind="stable")[:most]
    places = [np.unravel_index(i, weights.shape) for i in order]
    names = [f"{layer}.{head}" for layer, head in places]
    columns = {"attention to the token": weights.ravel()[order],
               "contribution ‖z_h W_O‖": sizes.ravel()[order]}  # fmt: skip
    uniform = float(run["uniform_weight"])
    page = make_subplots(1, 2, subplot_titles=list(columns), shared_yaxes=True)
    picture = canvas(8.4, 1.6 + 0.2 * len(names))
    axes = picture.subplots(1, 2, sharey=True)
    for i, (label, values) in enumerate(columns.items()):
        page.add_trace(
            go.Bar(y=names, x=values, orientation="h", marker_color=PALETTE[1 + i], name=label),
            1, i + 1,
        )  # fmt: skip
        axes[i].barh(names, values, color=PALETTE[1 + i])
        axes[i].set_xlabel(label)
        axes[i].spines[["top", "right"]].set_visible(False)
    page.add_vline(x=uniform, line_dash="dash", row=1, col=1, annotation_text="uniform",
                   annotation_position="bottom right")  # fmt: skip
    axes[0].axvline(uniform, ls="--", color="#333333", lw=1, label=f"uniform {uniform:.3g}")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("layer.head")
    heading = f"Heads by attention to the token · {title}"
    picture.suptitle(in_picture(heading), fontsize=10, x=0.01, ha="left")
    page.update_yaxes(autorange="reversed", type="category")
    page.update_layout(
        title={"text": on_page(heading), "x": 0.02}, showlegend=False,
        template="plotly_white", width=950, height=max(380, 160 + 20 * len(names)),
    )  # fmt: skip
    save(page, picture, stem)


def save_pictures(run: xr.Dataset, tokens: list[str], stem: Path, title: str) -> None:
    """Token x dimension of one layer in 3-D: before, after pruning, and the difference."""
    from plotly.subplots import make_subplots

    before, after = run["picture_before"].values, run["picture_after"].values
    pruned = next(iter(run.attrs["pruned"]))
    grids = {"before": before, f"without the {pruned}": after, "difference": after - before}
    page = make_subplots(
        1, 3, specs=[[{"type": "scene"}] * 3], subplot_titles=list(grids), horizontal_spacing=0.02
    )
    picture = canvas(13.0, 4.6)
    top = float(max(before.max(), after.max()))
    for i, (label, grid) in enumerate(grids.items()):
        page.add_trace(_bars(grid, tokens), 1, i + 1)
        axes = picture.add_subplot(1, 3, i + 1, projection="3d")
        _sticks(axes, grid)
        axes.set_title(label, fontsize=9)
        if label != "difference":
            axes.set_zlim(0, top)
    scene = {"xaxis_title": "dimension", "yaxis_title": "token", "zaxis_title": "|x|"}
    fixed = {**scene, "zaxis_range": [0, top]}
    heading = f"Layer {run.attrs['picture_layer']}, |x| of the residual · {title}"
    page.update_layout(scene=fixed, scene2=fixed, scene3=scene, template="plotly_white",
                       title={"text": on_page(heading), "x": 0.02}, height=520, width=1300,
                       showlegend=False)  # fmt: skip
    picture.suptitle(in_picture(heading), fontsize=10, x=0.01, ha="left")
    save(page, picture, stem)


def _bars(grid: np.ndarray, tokens: list[str]) -> Any:
    import plotly.graph_objects as go

    shown = [[on_page(repr(t))] * grid.shape[1] for t in tokens]
    return go.Surface(
        z=grid, customdata=shown, colorscale="Viridis", showscale=False,
        hovertemplate="dim %{x}, token %{y} %{customdata}<br>%{z:.4g}<extra></extra>",
    )  # fmt: skip


def _sticks(axes: Any, grid: np.ndarray) -> None:
    """A line per token over the dimensions: peaks of one cell stay visible."""
    from matplotlib import colormaps

    dims = np.arange(grid.shape[1])
    for token in range(len(grid) - 1, -1, -1):
        color = colormaps["viridis"](token / max(1, len(grid) - 1))
        axes.plot(dims, np.full(len(dims), token), grid[token], lw=0.7, color=color)
    axes.set_xlabel("dimension", fontsize=8)
    axes.set_ylabel("token", fontsize=8)
    axes.tick_params(labelsize=7)
