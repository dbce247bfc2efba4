"""Inputs and files that the studies share."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.data.texts import Texts, read_texts
from tl_headnorm.model.loading import Model
from tl_headnorm.run import results
from tl_headnorm.run.files import write_with
from tl_headnorm.run.loading import open_both, open_model


def open_study(settings: Any) -> tuple[Model, Any, Texts | None]:
    """The model, the questions (None without a dataset) and the texts (None without a file)."""
    texts = read_texts(settings.texts) if settings.texts else None
    if settings.dataset != "none":
        model, questions = open_both(settings.updated(max_samples=-1))
        return model, questions, texts
    model = open_model(settings)
    return model, None, texts


def record(
    model: Model, settings: Any, texts: Texts | None, prepared: Mapping[str, Any], started: float,
    num_tokens: int, runs: int,
) -> dict[str, Any]:  # fmt: skip
    """What meta.json says of every study; `runs` of `num_tokens` each were made."""
    seconds = time.time() - started
    return {
        "num_skipped": {},
        "num_truncated": 0,
        "num_tokens": num_tokens,
        "num_runs": runs,
        "missing_layers": [],
        "accuracy": None,
        "dataset": None,
        "template": None,
        "token_agg": settings.token_agg,
        "validated_against_hf": None,
        **prepared,
        "model": model.info.as_dict(),
        "texts": None if texts is None else {"path": texts.path, "sha256": texts.sha256},
        "prepend_bos": settings.prepend_bos and model.tokenizer.bos_token_id is not None,
        "padding_side": settings.padding_side,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens * runs / max(seconds, 1e-9), 1),
        "peak_memory_bytes": results.peak_memory_bytes(model.device.type),
        "seed": settings.seed,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "finished_at": results.now(),
    }


def save_table(table: pd.DataFrame, path: Path) -> None:
    write_with(path, lambda f: table.to_parquet(f, index=False))


def save_npz(run: xr.Dataset, path: Path) -> None:
    """Every numeric variable by its name."""
    arrays = {str(k): v.values for k, v in run.data_vars.items() if v.dtype.kind in "fiub"}
    write_with(path, partial(np.savez, **arrays))  # type: ignore[arg-type]


def text_length(settings: Any, model: Model) -> int:
    return min(settings.text_length, model.n_ctx)
