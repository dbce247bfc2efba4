"""summary.md of a study of massive activations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.massive.massive import is_layer_sweep
from tl_headnorm.plots.templates import render


def summary(run: xr.Dataset, sets: pd.DataFrame, meta: Mapping[str, Any]) -> str:
    """`sets` is sets.parquet: loss, perplexity and accuracy of every changed run."""
    at = int(run["ratio"].values.argmax())
    changed = sets[[not is_layer_sweep(str(name)) for name in sets["set"]]]
    return render(
        "commands/massive/summary.md.j2",
        meta=meta,
        at=at,
        largest={name: float(run[name][at]) for name in ("top1", "ratio", "top1_pos", "top1_dim")},
        dims=sorted({int(d) for d in run["entry_dim"].values}) if meta["has_massive"] else [],
        layers=run["entry_layer"].values if meta["has_massive"] else [],
        other_bos=_other_bos(run, at),
        head=_strongest_head(run),
        noise=float(run["noise_percent"][at]),
        pruned={
            name: float(run["change_percent"].sel(set=name)[at]) for name in run.attrs["pruned"]
        },
        sets=changed.rename(columns={"set": "changed"}),
    )


def _other_bos(run: xr.Dataset, at: int) -> dict[str, Any] | None:
    """The largest activation with BOS where the study has none, and the other way round."""
    if "other_bos_top1" not in run:
        return None
    return {"top1": float(run["other_bos_top1"][at]), "dims": run.attrs["other_bos_massive_dims"]}


def _strongest_head(run: xr.Dataset) -> dict[str, Any]:
    """The head with the most attention to the massive position, and what it adds."""
    weights, norms = run["first_token_weight"].values, run["head_resid_contrib_norm"].values
    layer, head = np.unravel_index(weights.argmax(), weights.shape)
    return {
        "name": f"{layer}.{head}",
        "weight": weights.max(),
        "uniform": float(run["uniform_weight"]),
        "norm": norms[layer, head],
        "median": np.median(norms),
    }
