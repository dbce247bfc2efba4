"""The heatmaps of a run directory."""

from pathlib import Path
from typing import Any

import xarray as xr

from tl_headnorm.plots.heatmaps import save_heatmap
from tl_headnorm.run.results import measures_of


def save_heatmaps(run: xr.Dataset, path: Path, _questions: Any = None) -> None:
    """`<measure>_heatmap.html` and `.png` of every measure's mean."""
    for name in measures_of(run):
        save_heatmap(run[f"{name}_mean"], path / f"{name}_heatmap")
